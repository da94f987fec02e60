"""The user's own columns in the views: their types, and what each is called where its name is taken.

A column keeps its name. Where a view has that name for something else (SQL does not see case), the user's is called user_<name> there; SQL
that uses such a name by itself is refused (store/misread.py), so that nobody takes the one for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from curate.store.shapes import merged_all, read, transform, written
from curate.store.sql import json_pointer, literal, quote


@dataclass(frozen=True)
class OwnColumn:
    """A column of the user's.

    kind: its SQL type, or its shape. shown: what the view calls it. taken_by: the column that has its name there instead, "" where none has;
    by_own: that one is the user's too. imported: it is in no source, but was imported.
    """

    name: str
    shown: str
    kind: str
    taken_by: str = ""
    by_own: bool = False
    imported: bool = False

    def picked(self, columns: str) -> str:
        """The column out of the occurrence's JSON, typed, as an item of a SELECT."""
        key = json_pointer(self.name)
        if self.kind == "JSON":
            value = f"json_extract({columns}, {key})"
        elif self.kind.startswith(("[", "{")):
            value = f"json_transform(json_extract({columns}, {key}), {literal(self.kind)})"
        else:
            value = f"TRY_CAST(json_extract_string({columns}, {key}) AS {self.kind})"
        return f"{value} AS {quote(self.shown)}"


def own_columns(columns: Mapping[str, Sequence[str]], taken: Mapping[str, str] | Iterable[str]) -> list[OwnColumn]:
    """found: the user's columns in their order -> their types. taken: the names of the view's other columns, in lower case
    (-> as they are written).
    """
    holders = dict(taken) if isinstance(taken, Mapping) else {name: name for name in taken}
    shown: dict[str, str] = {}
    for name in columns:  # who can keep a name keeps it, before anyone is called user_…
        if name.lower() not in holders:
            holders[name.lower()] = shown[name] = name
    for name in columns:
        if name not in shown:
            other = f"user_{name}"
            while other.lower() in holders:
                other = f"user_{other}"
            holders[other.lower()] = shown[name] = other
    kept = {name for name in shown if shown[name] == name}
    taken_by = {name: "" if name in kept else holders[name.lower()] for name in shown}
    return [
        OwnColumn(name, shown[name], _kind(types), taken_by[name], taken_by[name] in kept)
        for name, types in columns.items()
    ]


def _kind(types: Iterable[str]) -> str:
    """One type for a column that several sources have; of lists and mappings their shape."""
    shape = merged_all(map(read, sorted(set(types))))
    return "VARCHAR" if shape == "NULL" else written(transform(shape))
