"""Measurements taken elsewhere, brought into a store: `curate import STORE FILE --map ours=theirs …`.

    row         the row: our row id, source:index, or a number into the source named by `source`; in a store without rows, somebody else's id
    index       always a number into a source that has been read        row_id      always our row id
    run, checkpoint, step      which training run and checkpoint (a checkpoint that is a whole number is its step too)
    correct, samples           -> n_correct, n_samples, accuracy = correct / samples (NULL for no samples)
    perplexity                 -> target_nll = ln(perplexity), in float64 because perplexities come as low as 1.0000026
    nll, logp                  -> target_nll (mean nats a token), target_logp (summed nats)
    trained                    whether that run trained on the row
    any other name             a column of that name: numbers, true and false, or text

Instead of a row, `on` names a column that the rows have too. With neither the file is about datasets: every other name is a dataset value,
with `n`, `low` and `high` where mapped. Empty cells, NaN and infinities are unknown (NULL). Importing a file again replaces what it brought.
An import is numbered, and `curate forget STORE --import N` takes it back (store/forgetting.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from curate.console import counted
from curate.errors import UsageError
from curate.store.importing.mapping import PLACES, ROWS, check_names, check_worst, sides
from curate.store.importing.notes import check_columns, notes_of
from curate.store.importing.rows import Found, check_lines, find_rows
from curate.store.importing.table import Table, read_table
from curate.store.importing.values import check_places, convert, dataset_values, lines_of, read_places
from curate.store.imports import Import
from curate.store.store import Store


@dataclass(frozen=True)
class Imported:
    """What an import brought, and its number. lines: of the file. rows: distinct rows, new_rows: of them unknown before. values: dataset values.

    notes: what may be other than meant, a sentence each.
    """

    file: str
    source: str
    lines: int
    rows: int
    new_rows: int
    runs: int
    checkpoints: int
    columns: tuple[str, ...]
    values: int
    number: int = 0
    notes: tuple[str, ...] = ()
    per_row: bool = False

    @property
    def hint(self) -> str:
        return "\n".join(self.notes)

    def __str__(self) -> str:
        series = "" if self.per_row else f" over {self.checkpoints:,} checkpoints of {self.runs:,} runs"
        names = ", ".join(self.columns)
        if not self.rows:
            text = f"{self.file}: {self.values:,} dataset values ({names}) over {self.checkpoints:,} checkpoints of {self.runs:,} runs."
        else:
            new = f" ({self.new_rows:,} of them known only by the file's ids)" if self.new_rows else ""
            text = f"{self.file}: {names} for {self.rows:,} rows{new}{series}, {self.lines:,} lines."
        return counted("\n".join([text, *self.notes]))


def import_file(
    store: Store | str | Path,
    file: str | Path,
    mapping: Mapping[str, str],
    *,
    source: str | None = None,
    kind: str | None = None,
    on: str | None = None,
    new_rows: bool = False,
    worst: Mapping[str, Literal["high", "low"]] | None = None,
    text: Sequence[str] = (),
) -> Imported:
    """Bring a file (parquet, csv, tsv, json, jsonl; text also .gz) into a store (made if there is none). All of it, or nothing.

    mapping: ours -> the file's column. on: a column that the rows have too, "ours=theirs" where the file calls it otherwise. source: which
    source row numbers, or the file's own ids, belong to; the file, if None. new_rows: ids that no row has are rows without text. worst:
    column -> the end that is bad, for `drop_worst`. text: columns that are text although they look like numbers. kind: of rows that have
    no text here ("preference" where a chosen_ or rejected_ column is mapped, else "sft").
    Raises UsageError for what cannot be meant (a column that is not there: the nearest is named), ValidationError for a value that is not what
    its column holds, naming file, line and column (lines count from 1).
    """
    path = Path(file)
    check_names(mapping, on)
    joins = sides(path, on, mapping) if on else None
    columns_of_file = {**mapping, **({"on": joins[1]} if joins else {})}
    table = read_table(path, columns_of_file)
    how = next((k for k in ROWS if k in mapping), "on" if joins else "")
    labels = read_places(table, mapping)
    columns = convert(
        table, {k: v for k, v in mapping.items() if k not in (*PLACES, *ROWS)}, text=text, of_rows=bool(how)
    )
    if not columns:
        raise UsageError(
            "--map: no column to import, only which row and run it is. Add one, such as correct=n_correct samples=n_samples."
        )
    ends = check_worst(worst or {}, columns)
    ours, theirs = joins or ("", mapping.get(how, ""))
    if how:
        check_lines(table, theirs, labels)
    else:
        check_places(table, labels)
    origin = source or "/".join(path.resolve().parts[-2:])
    needs_rows = bool(joins) or how in ("index", "row_id")
    made = not isinstance(store, Store) and not (Path(store) / "curate.duckdb").exists()
    store = store if isinstance(store, Store) else Store(store, create=not needs_rows)
    one = Import(
        0, table.shown, str(path.resolve()), origin, "", tuple(columns), ends, not any(k in mapping for k in PLACES), n_lines=len(table.frame)
    )  # fmt: skip
    if not how:
        return _import_values(store, table, one, labels, columns, made)
    joined = find_rows(store, table, how, theirs, ours=ours, source=source, origin=origin, new_rows=new_rows)
    return _import_rows(store, table, one, labels, columns, joined, kind, made)


def _import_rows(
    store: Store,
    table: Table,
    one: Import,
    labels: pl.DataFrame,
    columns: dict[str, np.ndarray],
    joined: Found,
    kind: str | None,
    made: bool,
) -> Imported:
    """Values of rows into the store. joined: the rows of the lines. made: whether the store was made for them."""
    check_columns(store, columns)
    kind = kind or ("preference" if any(c.startswith(("chosen_", "rejected_")) for c in columns) else "sft")
    measured, values = lines_of(table, labels, columns, joined, one.origin)
    one = Import(
        **{
            **vars(one),
            "how": joined.how,
            "fingerprints": tuple(m.fingerprint for m in measured),
            "n_rows": len(set(joined.row_ids)),
        }
    )
    new = 0
    if joined.foreign:
        ids = list(dict.fromkeys(joined.row_ids))
        new = int((store.positions(ids) < 0).sum())
    notes = [*joined.notes, *notes_of(store, one, labels, columns)]
    kept, replaced = store.write_import(one, measured, values, keys=joined.foreign, kind=kind)
    notes += _notes(store, kept, replaced, made)
    runs, checkpoints = labels["run"].n_unique(), labels.n_unique()
    return Imported(
        one.file,
        one.origin,
        one.n_lines,
        one.n_rows,
        new,
        runs,
        checkpoints,
        one.columns,
        0,
        kept.number,
        tuple(notes),
        one.per_row,
    )


def _import_values(
    store: Store, table: Table, one: Import, labels: pl.DataFrame, columns: dict[str, np.ndarray], made: bool
) -> Imported:
    """Dataset values into the store, of a file whose lines are about no rows."""
    values = dataset_values(labels, columns)
    kept, replaced = store.write_import(one, [], dataset_values=values)
    runs, checkpoints = labels["run"].n_unique(), labels.n_unique()
    notes = _notes(store, kept, replaced, made)
    return Imported(
        one.file, one.origin, one.n_lines, 0, 0, runs, checkpoints, one.columns, len(values), kept.number, tuple(notes)
    )


def _notes(store: Store, kept: Import, replaced: Sequence[int], made: bool) -> list[str]:
    notes = []
    if any(number != kept.number for number in replaced):
        notes.append(f"It replaces import {' and '.join(map(str, replaced))}.")
    if made:
        notes.append(f"There was no store at {store.folder}: it was made.")
    return notes
