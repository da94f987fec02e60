"""The store: one folder that keeps rows, what was measured on them, scores, selections and runs.

    from curate.store import Store
    store = Store("store")
    store.sql("SELECT run, checkpoint, avg(accuracy) FROM trajectories GROUP BY ALL")     # -> polars

`curate.duckdb` holds the tables (schema `data`) and the views that people query; `shards/` holds what passes measured, one parquet file a
shard. DuckDB is the only place that ranks, and this package the only owner of SQL that writes.
"""

from curate.store.entries import DatasetValue, Ingested, Measured, Role, SelectedRow
from curate.store.selection import Selection
from curate.store.store import Store

__all__ = ["DatasetValue", "Ingested", "Measured", "Role", "SelectedRow", "Selection", "Store"]
