"""How models are run: one file per way. Arrays in, arrays out; no files but weights, no database."""
