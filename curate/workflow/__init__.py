"""The line: steps.py wires read -> plan -> measure -> score -> select -> publish -> export, run.py runs it; runners/ has one file a pass."""
