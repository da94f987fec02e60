"""The store: everything that knows DuckDB. One folder keeps rows, what was measured on them, scores, selections and runs.

store.py and results.py write, reader.py and queries.py read; tables.py, values.py, recipes.py, views.py and query.py hold the SQL;
shards.py has the files; importing/ brings in what others measured.
Its names are imported when first used: a lock or an error needs no DuckDB.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curate.store.entries import DatasetValue, Ingested, Measured, Place, Role, SelectedRow, Trajectories
    from curate.store.forgetting import Forgotten
    from curate.store.imports import Import
    from curate.store.selection import Selection
    from curate.store.store import Store

_HOMES = {
    "entries": ("DatasetValue", "Ingested", "Measured", "Place", "Role", "SelectedRow", "Trajectories"),
    "forgetting": ("Forgotten",),
    "imports": ("Import",),
    "selection": ("Selection",),
    "store": ("Store",),
}

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


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"curate.store.{home}"), name)
    raise AttributeError(f"module 'curate.store' has no attribute {name!r}")
