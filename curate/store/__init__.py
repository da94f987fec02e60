"""The store: everything that knows DuckDB. One folder keeps rows, what was measured on them, scores, selections and runs.

store.py writes, reader.py reads; tables.py, views.py and query.py hold the SQL, shards.py the files; importing/ brings in what others measured.
"""

from __future__ import annotations

from curate.store.entries import DatasetValue, Ingested, Measured, Place, Role, SelectedRow, Trajectories
from curate.store.imports import Forgotten, Import
from curate.store.selection import Selection
from curate.store.store import Store

__all__ = [
    "DatasetValue",
    "Forgotten",
    "Import",
    "Ingested",
    "Measured",
    "Place",
    "Role",
    "SelectedRow",
    "Selection",
    "Store",
    "Trajectories",
]
