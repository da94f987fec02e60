"""Export rows on their way to Arrow: kept as JSON lines on disk until every column's type is known, so that memory stays bounded.

A column's type is what Arrow makes of all its values together; values that fit no common type (numbers beside text) become text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from curate.data.arrow_types import as_typed

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1000
OWN = "\0"  # before the name of a column of the user's, until it is known whether the export has that name too
BYTES = re.compile(r"<\d+ bytes>")


class Learner:
    """The types of columns, learnt from rows in their order. typed: types of a source's, kept where every value is of it. fixed: columns that are not
    looked at.
    """

    def __init__(self, typed: Mapping[str, pa.DataType], fixed: Collection[str] = ()):
        self._typed, self._fixed = dict(typed), fixed
        self._types: dict[str, pa.DataType] = {}
        self._waiting: list[dict[str, Any]] = []
        self._as_text: set[str] = set()

    def add(self, held: dict[str, Any]) -> None:
        self._check_types(held)
        self._waiting.append(held)
        if len(self._waiting) == BATCH:
            self.learn()

    def _check_types(self, held: dict[str, Any]) -> None:
        """Forget the type of a column with a value that is not of it: then it is what its values are together."""
        import pyarrow as pa

        for name in self._typed.keys() & held.keys():
            try:
                pa.scalar(as_typed(held[name], self._typed[name]), self._typed[name])
            except (pa.ArrowException, AttributeError, ArithmeticError, TypeError, ValueError):
                del self._typed[name]

    def learn(self) -> None:
        """Take in the rows that wait: the last ones, too."""
        import pyarrow as pa

        names = dict.fromkeys(name for row in self._waiting for name in row if name not in self._fixed)
        for name in names:
            known = self._types.get(name, pa.null())
            if name not in self._as_text:
                try:
                    new = pa.array([row.get(name) for row in self._waiting]).type
                    merged = pa.unify_schemas(
                        [pa.schema([(name, known)]), pa.schema([(name, new)])], promote_options="permissive"
                    )
                    known = merged.field(name).type
                except (pa.ArrowException, TypeError, OverflowError, ValueError):
                    known = pa.string()
                    self._as_text.add(name)
            self._types[name] = known
        self._waiting = []

    def types(self) -> dict[str, pa.DataType]:
        """In the order of the columns' coming. A column that never held a value is text."""
        import pyarrow as pa

        return {
            name: self._typed.get(name) or (pa.string() if pa.types.is_null(kind) else kind)
            for name, kind in self._types.items()
        }

    def texts_of_several(self) -> set[str]:
        """The columns that had to become text."""
        return self._as_text - self._typed.keys()

    def shown(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as Arrow takes it for these types."""
        row = dict(row)
        for name in self._typed.keys() & row.keys():
            row[name] = as_typed(row[name], self._typed[name])
        for name in self.texts_of_several() & row.keys():
            value = row[name]
            row[name] = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return row


class Spool:
    """Dicts in, tables of one schema out. ours: the columns that the export adds. own: the user's, in the order of their coming. called: what the
    export calls those of them whose names it has itself (settled before anything is read back).

    `n_rows` counts. It is a `Part` of an export (parts.py).
    """

    def __init__(
        self, path: Path, fixed: dict[str, pa.DataType], typed: Mapping[str, pa.DataType] | None = None
    ) -> None:
        """`fixed`: columns whose type is settled; they come first. typed: types of the user's columns, kept where every value is of it."""
        self._file: TextIO = open(path, "w+", encoding="utf-8")  # noqa: SIM115 (lives as long as the spool)
        self._fixed = fixed
        self._learner = Learner({OWN + name: kind for name, kind in (typed or {}).items()}, fixed)
        self.ours = set(fixed)
        self.own: dict[str, None] = {}
        self.called: dict[str, str] = {}
        self._without_bytes: set[str] = set()
        self.n_rows = 0

    def add(self, row: dict[str, Any], own: dict[str, Any]) -> None:
        self.ours |= row.keys()
        self.own |= dict.fromkeys(own)
        held = {OWN + name: value for name, value in own.items()} | row
        self._file.write(json.dumps(held, ensure_ascii=False, default=str) + "\n")
        self.n_rows += 1
        self._without_bytes |= {
            name.removeprefix(OWN) for name, value in held.items() if name not in self._fixed and said_bytes(value)
        }
        self._learner.add(held)

    def schema(self) -> pa.Schema:
        """Of all rows so far. A column that never held a value is text."""
        import pyarrow as pa

        self._learner.learn()
        learned = ((self._named(name), kind) for name, kind in self._learner.types().items())
        return pa.schema([*self._fixed.items(), *learned])

    def rows(self) -> Iterator[dict[str, Any]]:
        self._file.flush()
        self._file.seek(0)
        for line in self._file:
            yield {self._named(name): value for name, value in self._learner.shown(json.loads(line)).items()}

    def tables(self) -> Iterator[pa.Table]:
        import pyarrow as pa

        rows, schema = self.rows(), self.schema()
        as_text = pa.schema([(field.name, _as_text(field.type)) for field in schema])
        while batch := list(islice(rows, BATCH)):
            yield pa.Table.from_pylist(batch, schema=as_text).cast(schema)

    def texts_of_several(self) -> list[str]:
        return sorted(set(map(self._named, self._learner.texts_of_several())))

    def without_bytes(self) -> set[str]:
        return self._without_bytes

    def _named(self, held: str) -> str:
        """What the export calls a column that is held as OWN + its name, or as it is called."""
        own = held.removeprefix(OWN)
        return self.called.get(own, own) if own != held else held

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def said_bytes(value: Any) -> bool:
    """Whether a value holds what `jsonable` makes of bytes: "<79 bytes>"."""
    if isinstance(value, str):
        return value.endswith(" bytes>") and BYTES.fullmatch(value) is not None
    if isinstance(value, dict):
        return any(map(said_bytes, value.values()))
    return isinstance(value, list) and any(map(said_bytes, value))


def _as_text(kind: pa.DataType) -> pa.DataType:
    """The type without Arrow's type of JSON texts, which takes no Python values."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return pa.list_(_as_text(kind.value_type))
    return pa.string() if isinstance(kind, pa.JsonType) else kind
