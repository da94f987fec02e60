"""The user's columns of an export, out of the JSON that the store keeps of them, column by column.

A column whose values are all whole numbers, all numbers with a point, all texts or all truth values is read by the database (`Own.picked`).
Any other (lists, mappings, several types, times that a source had a type for) is read value by value, as spool.py does it for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curate.data.spool import BYTES, Learner, said_bytes

WHOLE = {"UBIGINT", "BIGINT"}
PLAIN: tuple[
    tuple[set[str], set[str], pa.DataType, str], ...
] = (  # types in the JSON, in the source, in the export, in SQL
    (WHOLE, {"BIGINT", "DOUBLE", "NULL"}, pa.int64(), "BIGINT"),
    ({"DOUBLE"}, {"BIGINT", "DOUBLE", "NULL"}, pa.float64(), "DOUBLE"),
    ({"BOOLEAN"}, {"BOOLEAN", "NULL"}, pa.bool_(), "BOOLEAN"),
)
TEXTS = (pa.string(), pa.large_string())


def plain_type(
    found: Collection[str], told: Collection[str], typed: pa.DataType | None
) -> tuple[pa.DataType, str] | None:
    """The Arrow type of a column and the SQL type that it is read as; None where its values have to be looked at one by one.

    found: the types of its values in the JSON, NULL aside. told: the types that its sources gave it. typed: its type in a source that has types.
    """
    kinds = set(found)
    if not kinds:
        return (typed or pa.string()), "VARCHAR"
    if kinds == {"VARCHAR"}:
        if typed is None or typed in TEXTS:
            return (typed or pa.string()), "VARCHAR"
        return None
    for values, source, kind, sql in PLAIN:
        if kinds <= values and set(told) <= source and typed in (None, kind):
            return kind, sql
    return None


class Own:
    """The user's columns of one part of an export. structures: the shapes of their JSON, in the order of their first rows (`Selected.structures`).

    told: column -> the types that its sources gave it. typed: column -> its type in a source that has types.
    """

    def __init__(
        self, structures: Sequence[str | None], told: Mapping[str, Collection[str]], typed: Mapping[str, pa.DataType]
    ):
        kinds: dict[str, set[str]] = {}
        for structure in structures:
            for name, kind in _members(structure):
                kinds.setdefault(name, set()).add(kind)
        self.names = list(kinds)
        self.plain: dict[str, tuple[pa.DataType, str]] = {}
        for name, found in kinds.items():
            plain = plain_type(found - {"NULL"}, told.get(name, ()), typed.get(name))
            if plain is not None:
                self.plain[name] = plain
        self.mixed = [name for name in self.names if name not in self.plain]
        self._learner = Learner({name: kind for name, kind in typed.items() if name in self.mixed})
        self.without_bytes: set[str] = set()

    def names_of(self, structure: str | None) -> list[str]:
        return [name for name, _ in _members(structure)]

    def learn(self, columns: Iterator[pa.Table]) -> None:
        """Read the columns that are looked at value by value once, for their types. columns: tables with the JSON as `columns`."""
        for table in columns:
            for values in _read(table["columns"]):
                self._learner.add({name: values[name] for name in self.mixed if name in values})
        self._learner.learn()

    @property
    def types(self) -> dict[str, pa.DataType]:
        known = {name: kind for name, (kind, _) in self.plain.items()} | self._learner.types()
        return {name: known.get(name, pa.string()) for name in self.names}

    @property
    def as_text(self) -> set[str]:
        return self._learner.texts_of_several()

    def picked(self, pointer: Callable[[str], str]) -> dict[str, str]:
        """name -> SQL, of what the database reads, over o.columns. pointer: a column's name as a JSON function takes it."""
        names = list(self.plain)
        every = ", ".join(map(pointer, names))
        return {
            name: f"json_extract_string(o.columns, [{every}])[{number}]::{self.plain[name][1]}"
            for number, name in enumerate(names, 1)
        }

    def arrays(self, table: pa.Table, names: Mapping[str, str]) -> dict[str, Any]:
        """name -> the column of these rows. names: what `picked` is called in the table, whose `columns` is the JSON."""
        found: dict[str, Any] = {}
        for name, (kind, _) in self.plain.items():
            found[name] = table[names[name]].cast(kind)
            if kind in TEXTS and says_bytes(found[name]):
                self.without_bytes.add(name)
        if self.mixed:
            rows = [{name: values[name] for name in self.mixed if name in values} for values in _read(table["columns"])]
            self.without_bytes |= {name for row in rows for name, value in row.items() if said_bytes(value)}
            types = self._learner.types()
            shown = [self._learner.shown(row) for row in rows]
            for name in self.mixed:
                found[name] = pa.array([row.get(name) for row in shown], types[name])
        return found


def says_bytes(column: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.match_substring_regex(column, f"^{BYTES.pattern}$")).as_py())


def _members(structure: str | None) -> Iterator[tuple[str, str]]:
    """The columns of a shape, with the type of each; lists and mappings are OTHER."""
    read = json.loads(structure) if structure else None
    for name, kind in (read or {}).items() if isinstance(read, dict) else ():
        yield name, kind if isinstance(kind, str) else "OTHER"


def _read(columns: pa.ChunkedArray) -> Iterator[dict[str, Any]]:
    return (json.loads(text) if text else {} for text in columns.to_pylist())
