"""Rows of an export into the files of a trainer other than TRL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.data.columns import free_name
from curate.data.texts import jsonable
from curate.data.trainers import TRAINERS, check_sort
from curate.data.trainers.base import PROMPTS, UNPAIRED, About, Row, Trainer, Unfit
from curate.data.written import in_files
from curate.errors import ValidationError

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = ("prompt", "chosen", "rejected", "completion", "messages")
OURS = (*TEXTS, "tools", "chat_template_kwargs", "row_id")
OF_SORTS = {PROMPTS: ("answer",), UNPAIRED: ("label",)}  # elsewhere columns beside the texts like any other


def write_layout(
    layout: str, tables: Iterator[pa.Table], schema: pa.Schema, folder: Path, about: About, rows_per_file: int | None
) -> tuple[int, list[str]]:
    """Write the rows and what stands beside them. Returns how many rows there were, and what a reader of the card should know.

    about: without the own columns, which are those of the schema that no format has. ValidationError, with the rows that are at fault, where the
    trainer does not take one.
    """
    check_sort(layout, about.sort)
    trainer = TRAINERS[layout]
    called = _called(schema, trainer, about.sort)
    names = tuple(name for name in (*called.values(), *(name for name in schema.names if name == "tools")))
    about = replace(about, own=names)
    rows = Rows(trainer, about, called)
    types = {new: schema.field(old).type for old, new in called.items()}
    made = trainer.schema(about, types) if trainer.schema is not None else None
    end = "jsonl" if made is None else "parquet"
    files: list[str] = []
    n_rows = 0
    for number, part in enumerate(in_files(tables, rows_per_file)):
        path = folder / "data" / f"{about.split}-{number:05d}.{end}"
        path.parent.mkdir(parents=True, exist_ok=True)
        n_rows += _lines(path, rows.of(part)) if made is None else _parquet(path, rows.of(part), made)
        files.append(f"data/{path.name}")
    rows.check()
    for name, text in trainer.beside(about, files).items():
        (folder / name).write_text(text, encoding="utf-8")
    renamed = [
        f"Column `{old}` is called `{new}` here: {trainer.title} would take it for its own."
        for old, new in called.items()
        if old != new
    ]
    return n_rows, [*renamed, *trainer.notes(about)]


class Rows:
    """Tables to the trainer's rows, remembering those that do not fit."""

    def __init__(self, trainer: Trainer, about: About, called: Mapping[str, str]):
        self.trainer, self.about, self.called = trainer, about, called
        self.n = 0
        self.unfit: dict[str, list[str]] = {}

    def of(self, tables: Iterator[pa.Table]) -> Iterator[list[dict[str, Any]]]:
        for table in tables:
            yield [made for row in table.to_pylist() if (made := self._made(row)) is not None]

    def _made(self, row: dict[str, Any]) -> dict[str, Any] | None:
        given = {name: _read(row[name]) for name in TEXTS if name in row} | {
            name: row[name] for name in ("row_id", *OF_SORTS.get(self.about.sort, ())) if name in row
        }
        for name in ("tools", "chat_template_kwargs"):
            if row.get(name):
                given[name] = json.loads(row[name])
        own = {new: row[old] for old, new in self.called.items()}
        given |= {"index": self.n, "own": own}
        self.n += 1
        try:
            made = self.trainer.takes[self.about.sort](_without_empty(given), self.about)
        except Unfit as why:
            self.unfit.setdefault(str(why), []).append(row["row_id"])
            return None
        return made if self.trainer.takes_own else made | {"row_id": row["row_id"]} | own

    def check(self) -> None:
        """ValidationError where a row did not fit: nothing is left out unasked."""
        if not self.unfit:
            return
        wrong = "; ".join(
            f"{len(ids):,} {why} (row {', row '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
            for why, ids in self.unfit.items()
        )
        raise ValidationError(
            f"export.layout {self.trainer.name}: of {self.n:,} rows {wrong}. Leave them out with select.where, or take `--set export.layout=trl`, "
            "which keeps rows whole."
        )


def _called(schema: pa.Schema, trainer: Trainer, sort: str) -> dict[str, str]:
    """The columns beside the texts, and what they are called: not as a column of the trainer's own."""
    beside = [name for name in schema.names if name not in (*OURS, *OF_SORTS.get(sort, ()))]
    taken = trainer.fields | set(beside)
    called: dict[str, str] = {}
    for name in beside:
        called[name] = free_name(name, {*taken, *called.values()}) if name in trainer.fields else name
    return called


def _read(value: Any) -> Any:
    """A text, or messages: dicts, or the JSON of such."""
    if isinstance(value, list):
        return [json.loads(item) if isinstance(item, str) else item for item in value]
    return value


def _without_empty(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}


def _lines(path: Path, batches: Iterator[list[dict[str, Any]]]) -> int:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for batch in batches:
            file.writelines(json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in batch)
            written += len(batch)
    return written


def _parquet(path: Path, batches: Iterator[list[dict[str, Any]]], schema: pa.Schema) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    written = 0
    with pq.ParquetWriter(path, schema) as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            written += len(batch)
    return written
