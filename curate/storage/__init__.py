"""The parts that `curate.storage.Store` is made of, one subject a file; the only home of DuckDB beside it."""
