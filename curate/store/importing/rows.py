"""Which row each line of an imported file is about.

    on        a column of the user's own rows that holds the same ids as a column of the file (also one of ours: prompt, answer, …)
    row_id    our row id
    index     a number into a source, from 0; in the column `row` also source:index, or source#number from 1
    row       whichever of these it is; in a store without rows of its own, somebody else's id, which then makes a row without text

A line that finds no row through `on` is left out, counted and said; nothing found at all is an error that shows both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from curate.errors import UsageError, ValidationError, did_you_mean, nearest
from curate.models.naming import natural
from curate.rows import ID_DIGITS, foreign_id
from curate.store.importing.table import WHOLE_FLOAT, Table, text_of
from curate.store.sql import json_pointer, literal, quote
from curate.store.store import Store

OURS = ("prompt", "completion", "answer", "chosen", "rejected")  # columns of ours that people may join on
NUMBERS = ("BIGINT", "UBIGINT", "HUGEINT", "UHUGEINT", "DOUBLE", "INTEGER", "UINTEGER")


@dataclass(frozen=True)
class Found:
    """lines[i] of the file is about the row row_ids[i]. foreign: ids to be added as rows without text. how: in words. notes: what to say."""

    lines: np.ndarray
    row_ids: list[str]
    how: str
    foreign: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_rows(
    store: Store,
    table: Table,
    how: str,
    column: str,
    *,
    ours: str = "",
    source: str | None,
    origin: str,
    new_rows: bool,
) -> Found:
    """The row of each line, by the values of `column`. how: on (with `ours`), row_id, index or row.

    Raises UsageError or ValidationError where lines cannot be told to be about rows.
    """
    keys = text_of(table.frame[column])
    unique = keys.unique(maintain_order=True)
    if how == "on":
        return _on(store, table, column, keys, ours, source)
    read = [s["source"] for s in store.sources()]
    if how == "row":
        how = _kind(store, table, column, unique, source, origin, read, new_rows)
    if how == "foreign":
        ids = {key: foreign_id(origin, key) for key in unique.to_list()}
        return Found(np.arange(len(keys)), [ids[key] for key in keys.to_list()], "its own ids", list(ids))
    if how == "row_id":
        of = _by_row_id(store, table, column, keys, unique)
    elif how == "place":
        of = _by_place(store, table, column, keys, read)
    else:
        of = _by_index(store, table, column, keys, source, read)
    return Found(
        np.arange(len(keys)),
        [of[key] for key in keys.to_list()],
        {"row_id": "our row ids", "place": "source:index"}.get(how, "row numbers"),
    )


def check_lines(table: Table, column: str, labels: pl.DataFrame) -> None:
    """ValidationError for a line that names no row, and for two that are about the same row, run and checkpoint."""
    keys = text_of(table.frame[column])
    table.refuse(keys.is_null().to_numpy(), column, "which row the line is about, not an empty cell")
    lines = labels.with_columns(keys.alias("key"))
    twice = lines.is_duplicated()
    if twice.any():
        first = int(twice.arg_max() or 0)
        same = lines.with_row_index().filter(
            pl.all_horizontal(pl.col(n).eq_missing(lines[n][first]) for n in lines.columns)
        )
        raise ValidationError(
            f"{table.at(first)} and {table.at(same['index'][1]).removeprefix(table.shown + ', ')} are about the same row, run and checkpoint "
            f"({column} {keys[first]!r}). Map what tells them apart with run= or checkpoint=, or remove one."
        )


def _kind(
    store: Store,
    table: Table,
    column: str,
    unique: pl.Series,
    source: str | None,
    origin: str,
    read: list[str],
    new_rows: bool,
) -> str:
    """What the column `row` holds: row_id, place (source:index), index or foreign."""
    if (
        bool(unique.str.contains(rf"^[0-9a-f]{{{ID_DIGITS}}}$").all())
        and (store.positions(unique.to_list()) >= 0).any()
    ):
        return "row_id"
    if (
        read
        and bool(unique.str.contains(r"[:#]\d+$").all())
        and {re.split(r"[:#]\d+$", k)[0] for k in unique.to_list()} & set(read)
    ):
        return "place"
    if source in read:
        return "index"
    meant = [name for name in read if source and Path(name).name == Path(source).name]
    if meant:
        raise UsageError(f"--source {source}: rows were read as {meant[0]}. Say --source {meant[0]}.")
    with_text, of_origin = store.sql(
        "SELECT (SELECT count(*) FROM data.rows WHERE prompt IS NOT NULL), (SELECT count(*) FROM data.occurrences o JOIN data.rows r "
        "USING (row_id) WHERE o.source = ? AND r.prompt IS NULL)",
        [origin],
    ).row(0)
    if with_text and not of_origin and not new_rows:
        raise UsageError(_not_known(store, table, column, unique, source, read, with_text))
    return "foreign"


def _not_known(
    store: Store, table: Table, column: str, unique: pl.Series, source: str | None, read: list[str], with_text: int
) -> str:
    """Why ids that nobody knows are refused in a store that has rows, and what was probably meant."""
    hints = []
    fitting = _fitting(store, unique.head(1000).to_list())
    if fitting:
        name, n = fitting[0]
        named = name if name == column else f"{name}={column}"
        of = f"{n:,} of the first {min(len(unique), 1000):,}"
        hints.append(
            f"They are values of the rows' column {name!r} ({of}): say `--on {named}` instead of row={column}."
        )
    else:
        columns = ", ".join(own_columns(store)) or "none"
        hints.append(f"If a column of your data holds the same ids, say `--on COLUMN` (yours are: {columns}).")
    if bool(unique.str.contains(r"^\d+$").all()) and read:
        hints.append(
            f"If they are row numbers of a source, counted from 0: `--source {read[0] if len(read) == 1 else 'FILE'}`."
        )
    hints.append("If they are other rows, without text here and known by these ids alone: `--new-rows`.")
    where = f" --source {source} was not read into it; it has {', '.join(read)}." if source else ""
    values = f"none of the {len(unique):,} values of {column!r} ({_some(unique.to_list())})"
    return f"{table.shown}: {values} is a row of {store.folder}, which has {with_text:,} rows.{where} " + " ".join(
        hints
    )


def own_columns(store: Store) -> list[str]:
    """The user's own columns of the rows that were read, as the file has them."""
    names = store.sql(
        "SELECT name FROM data.source_columns JOIN data.source_state USING (source, role) GROUP BY name ORDER BY min(ordinal), name"
    )
    return names["name"].to_list()


def _fitting(store: Store, keys: Sequence[str]) -> list[tuple[str, int]]:
    """The rows' columns that hold some of these values, with how many, the best first."""
    fitting = []
    for name in [*own_columns(store)[:50], *OURS]:
        n = store.sql(
            f"SELECT count(DISTINCT value) FROM ({_values_sql(name, own=name not in OURS)}) WHERE value IN (SELECT unnest(?::VARCHAR[]))",
            [list(keys)],
        ).item()
        if n:
            fitting.append((name, int(n)))
    return sorted(fitting, key=lambda pair: -pair[1])


def _values_sql(name: str, *, own: bool, source: str | None = None) -> str:
    """SQL: row_id, value (text), kind (its JSON type) of a column of the rows that have text."""
    where = "" if source is None else f"AND o.source = {literal(source)}"
    if not own:
        return (
            f"SELECT DISTINCT r.row_id, r.{quote(name)} AS value, 'VARCHAR' AS kind FROM data.rows r JOIN data.occurrences o USING (row_id) "
            f"WHERE r.{quote(name)} IS NOT NULL {where}"
        )
    pointer = json_pointer(name)
    return (
        f"SELECT DISTINCT o.row_id, json_extract_string(o.columns, {pointer}) AS value, json_type(o.columns, {pointer}) AS kind "
        f"FROM data.occurrences o JOIN data.rows r USING (row_id) WHERE r.prompt IS NOT NULL AND value IS NOT NULL {where}"
    )


def _on(store: Store, table: Table, column: str, keys: pl.Series, ours: str, source: str | None) -> Found:
    """Lines by equal values of the file's column and the rows' own."""
    own = own_columns(store)
    if ours not in own and ours not in OURS:
        near = nearest(ours, [*own, *OURS])
        hint = (
            f"Did you mean --on {near}{'' if near == column else '=' + column}?"
            if near
            else f"There are: {', '.join([*own, *OURS])}."
        )
        if not store.sources():
            hint = "No rows were read into it yet: `curate plan RECIPE` reads them."
        raise UsageError(f"--on: the rows of {store.folder} have no column {ours!r}. {hint}")
    if source is not None and source not in {s["source"] for s in store.sources()}:
        raise UsageError(_no_source(source, [s["source"] for s in store.sources()]))
    frame = store.sql(_values_sql(ours, own=ours in own, source=source))
    of: dict[str, list[str]] = {}
    for row_id, value, kind in frame.iter_rows():
        of.setdefault(_canonical(value) if kind in NUMBERS else value.strip(), []).append(row_id)
    lines: list[int] = []
    row_ids: list[str] = []
    missed: list[int] = []
    for i, key in enumerate(keys.to_list()):
        matching = of.get(key) or of.get(_canonical(key))
        if matching is None:
            missed.append(i)
            continue
        lines += [i] * len(matching)
        row_ids += matching
    if not lines:
        raise UsageError(_nothing_joined(store, table, column, keys, ours, of))
    notes = []
    if missed:
        values = list(dict.fromkeys(keys[i] for i in missed))
        notes.append(
            f"{len(missed):,} of {len(keys):,} lines are about no row of {store.folder} and were left out: {column} {_some(values)} "
            f"(the first: {table.at(missed[0])})."
        )
    taken = {keys[i] for i in lines}
    several = [
        key
        for key in dict.fromkeys(keys.to_list())
        if key in taken and len(of.get(key) or of.get(_canonical(key)) or ()) > 1
    ]
    if several:
        notes.append(
            f"{len(several):,} values of {ours!r} stand for several rows ({_some(several)}): each of these rows gets the line's values."
        )
    without = len({r for rows in of.values() for r in rows} - set(row_ids))
    if without:
        notes.append(
            f"{without:,} of the rows that have a {ours!r} are not in the file: their values are unknown (NULL)."
        )
    return Found(np.array(lines), row_ids, f"{ours} = {column}", [], notes)


def _nothing_joined(store: Store, table: Table, column: str, keys: pl.Series, ours: str, of: Iterable[str]) -> str:
    unique = keys.unique(maintain_order=True)
    fitting = [(name, n) for name, n in _fitting(store, unique.head(1000).to_list()) if name != ours]
    if fitting:
        named = fitting[0][0] if fitting[0][0] == column else f"{fitting[0][0]}={column}"
        hint = f"They are values of the rows' column {fitting[0][0]!r}: `--on {named}`."
    else:
        hint = f"Name columns that hold the same ids: `--on OURS=THEIRS` (the rows' columns are: {', '.join(own_columns(store)) or 'none'})."
    return (
        f"{table.shown}: no line is about a row of {store.folder}: the file's {column!r} is {_some(unique.to_list())}, the rows' {ours!r} is "
        f"{_some(sorted(of, key=natural)) or 'always empty'}. {hint}"
    )


def _by_row_id(store: Store, table: Table, column: str, keys: pl.Series, unique: pl.Series) -> dict[str, str]:
    ids = unique.to_list()
    unknown = {ids[i] for i in np.flatnonzero(store.positions(ids) < 0)}
    bad = keys.is_in(list(unknown)).to_numpy()
    if unknown:
        first = int(np.flatnonzero(bad)[0])
        raise ValidationError(
            f"{table.at(first)}: {column!r} names row {keys[first]}, which is not in this store ({len(unknown):,} of {len(ids):,} rows)."
        )
    return {row_id: row_id for row_id in ids}


def _by_index(
    store: Store, table: Table, column: str, keys: pl.Series, source: str | None, read: list[str]
) -> dict[str, str]:
    if source is None and len(read) == 1:
        source = read[0]
    if source not in read:
        raise UsageError(f"index= needs the source that the numbers count in. {_no_source(source, read)}")
    of = _places(store, source)
    bad = np.array([key not in of for key in keys.to_list()])
    table.refuse(bad, column, f"the number of a good row of {source} (counted from 0; it has {len(of):,})")
    return of


def _by_place(store: Store, table: Table, column: str, keys: pl.Series, read: list[str]) -> dict[str, str]:
    of = {}
    for source in dict.fromkeys(read):
        for index, row_id in _places(store, source).items():
            of[f"{source}:{index}"] = of[f"{source}#{int(index) + 1}"] = row_id
    bad = np.array([key not in of for key in keys.to_list()])
    table.refuse(bad, column, f"source:index (from 0) or source#number (from 1) of a good row of {', '.join(read)}")
    return of


def _places(store: Store, source: str) -> dict[str, str]:
    """index in a source, as text -> row id."""
    frame = store.sql(
        "SELECT index::VARCHAR AS key, row_id FROM data.occurrences WHERE source = ? ORDER BY role = 'train'", [source]
    )
    return dict(zip(frame["key"], frame["row_id"], strict=True))


def _no_source(source: str | None, read: list[str]) -> str:
    listed = ", ".join(read) or "none; `curate plan RECIPE` reads one"
    others = f"Sources that have been read: {listed}."
    hint = did_you_mean(source or "", read, others, sentence=True, show=lambda name: f"--source {name}")
    return f"No rows were read from {source!r}. {hint}" if source else f"Say --source. {hint}"


def _canonical(text: str) -> str:
    """7.0 as 7; everything else, 007 too, as it is."""
    text = text.strip()
    return text.partition(".")[0] if re.match(WHOLE_FLOAT, text) else text


def _some(values: Sequence[str], n: int = 3) -> str:
    shown = ", ".join(repr(v if len(v) <= 40 else v[:39] + "…") for v in values[:n])
    return shown + (", …" if len(values) > n else "")
