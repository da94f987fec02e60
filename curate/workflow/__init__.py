"""The line: run.py wires read -> plan -> measure -> score -> select -> export; runners/ has one file a pass."""
