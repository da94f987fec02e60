"""Reading sources in: records to parquet files first, with nobody locked out, then one short transaction.

A row is kept once, under its content id, and keeps its position for ever. Each time it occurs is a line of `occurrences` with the user's
other columns as JSON; the type of each such column is remembered, so that views show it as what it is.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import pyarrow as pa

from curate.errors import StoreError
from curate.rows import Example, Pair, Text, foreign_id, is_plain, text_ids, text_to_column
from curate.store import readings
from curate.store.database import Database
from curate.store.entries import Ingested, Role, SourceBlock, SourceRecord
from curate.store.locks import process_alive
from curate.store.shapes import Shape, merged, merged_all, shape_of, written
from curate.store.shards import clean_text, write_parquet
from curate.store.sql import Connection, literal

BATCH = 10_000
TABLE_COLUMNS = (
    "row_id",
    "kind",
    "style",
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "answer",
    "label",
    "template_args",
)
STAGED = pa.schema(
    [("n", pa.int64()), ("index", pa.int64())]
    + [(name, pa.bool_() if name == "label" else pa.string()) for name in TABLE_COLUMNS]
    + [("columns", pa.string())]
)


def add(
    folder: Path,
    database: Database,
    source: str,
    fingerprint: str,
    records: Iterable[SourceRecord | SourceBlock],
    *,
    role: Role,
    waits: bool = False,
) -> Ingested:
    """Read a source in: its new rows are appended, its earlier occurrences (of this role) are replaced, in one transaction."""
    types: dict[str, Shape] = {}
    bad = 0

    def lines() -> Iterator[list[Sequence[Any]]]:
        nonlocal bad
        for record in records:
            if isinstance(record, SourceBlock):
                yield block_columns(record, types)
            elif record.row is None:
                bad += 1
            else:
                columns = json_columns(record.columns, types)
                yield [(value,) for value in (record.index, *row_columns(record.row), columns)]

    staging = _staging(folder)
    try:
        good = _stage(staging, lines())
        with database.write() as con:
            if waits:
                source = readings.waiting_name(source, fingerprint)
                readings.note_first(con, source)
            new, distinct = _ingest(con, staging, source, role)
            con.execute("DELETE FROM data.source_columns WHERE source = ? AND role = ?", [source, role])
            for i, (name, kind) in enumerate(types.items()):
                con.execute(
                    "INSERT INTO data.source_columns VALUES (?, ?, ?, ?, ?)", [source, role, i, name, written(kind)]
                )
            con.execute("DELETE FROM data.source_state WHERE source = ? AND role = ?", [source, role])
            state = [source, role, fingerprint, good, bad, distinct]
            con.execute("INSERT INTO data.source_state VALUES (?, ?, ?, ?, ?, ?, now()::TIMESTAMP)", state)
            from curate.store import views

            database.before_commit(views.define)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Ingested(good, new, good - distinct, bad)


def add_foreign(folder: Path, database: Database, source: str, keys: Sequence[Any], *, kind: str) -> list[str]:
    """Add rows that are known by somebody else's ids alone; returns their row ids, aligned to `keys`."""
    with foreign_staged(folder, source, keys, kind=kind) as staged, database.write() as con:
        ingest_foreign(con, staged, source)
        from curate.store import views

        database.before_commit(views.define)
    return [foreign_id(source, key) for key in keys]


@contextmanager
def foreign_staged(folder: Path, source: str, keys: Sequence[Any], *, kind: str) -> Iterator[Path]:
    """Rows known by somebody else's ids, staged. The key is kept as the column `key`; the index is the key where it is a whole number."""
    lines: list[list[Sequence[Any]]] = []
    for i, key in enumerate(dict.fromkeys(keys)):
        index = int(key) if re.fullmatch(r"\d{1,18}", str(key)) else i
        columns = json.dumps({"key": str(key)})
        nothing = [None for _ in TABLE_COLUMNS[2:]]
        lines.append([(value,) for value in (index, foreign_id(source, key), kind, *nothing, columns)])
    staging = _staging(folder)
    try:
        _stage(staging, lines)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def ingest_foreign(con: Connection, staging: Path, source: str) -> None:
    """Rows of `foreign_staged` into the store, in the caller's transaction; adding them again changes nothing."""
    _ingest(con, staging, source, "train", replace=False)
    known = con.execute(
        "SELECT count(*) FROM data.source_columns WHERE source = ? AND name = 'key'", [source]
    ).fetchall()
    if not known[0][0]:
        con.execute("INSERT INTO data.source_columns VALUES (?, 'train', 0, 'key', 'VARCHAR')", [source])


def row_columns(row: Pair | Example) -> tuple[Any, ...]:
    """A row as the values of TABLE_COLUMNS."""
    prompt = text_to_column(row.prompt)
    if isinstance(row, Pair):
        return (
            row.row_id,
            row.kind,
            row.style,
            prompt,
            text_to_column(row.chosen),
            text_to_column(row.rejected),
            None,
            None,
            None,
            _beyond_text(row, (row.prompt, row.chosen, row.rejected)),
        )
    beyond = _beyond_text(row, (row.prompt, row.completion))
    completion = text_to_column(row.completion)
    return (row.row_id, row.kind, row.style, prompt, None, None, completion, row.answer, row.label, beyond)


def _beyond_text(row: Pair | Example, texts: Sequence[Text | None]) -> str | None:
    """The row's `template_args`; "{}" where its messages alone hold more than roles and texts; None where all is roles and texts."""
    if row.template_args:
        return row.template_args
    is_plain_text = all(text is None or isinstance(text, str) or all(map(is_plain, text)) for text in texts)
    return None if is_plain_text else "{}"


def json_columns(columns: Mapping[str, Any], types: dict[str, Shape]) -> str | None:
    """The user's columns as JSON; `types` learns each column's type: the narrowest that has room for all its values."""
    if not columns:
        return None
    clean = {}
    for name, value in columns.items():
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        types[name] = merged(types.get(name, "NULL"), shape_of(value))
        clean[name] = value
    try:
        return json.dumps(clean, ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError:  # NaN inside a list or a mapping
        return json.dumps(_finite(clean), ensure_ascii=False, default=_plain)


def block_columns(block: SourceBlock, types: dict[str, Shape]) -> list[Sequence[Any]]:
    """A block as the columns of STAGED but the first, as `row_columns` and `json_columns` have each of its rows."""
    n = len(block.index)
    nothing, texts = [None] * n, block.texts
    sides = [texts["chosen"], texts["rejected"]] if block.kind == "preference" else [texts["completion"], None, None]
    ids = text_ids(block.kind, [texts["prompt"], *sides])
    columns = dict.fromkeys(TABLE_COLUMNS, nothing) | dict(texts)
    columns |= {"row_id": ids, "kind": [block.kind] * n, "style": ["standard"] * n}
    return [block.index, *(columns[name] for name in TABLE_COLUMNS), _json_of(block.own, n, types)]


def _json_of(own: Mapping[str, Sequence[Any]], n: int, types: dict[str, Shape]) -> Sequence[str | None]:
    if not own:
        return [None] * n
    for name, values in own.items():
        for value in {type(value): value for value in values if type(value) is not int}.values():
            types[name] = merged(types.get(name, "NULL"), shape_of(value))
        if whole := [value for value in values if type(value) is int]:
            types[name] = merged_all((types.get(name, "NULL"), shape_of(min(whole)), shape_of(max(whole))))
    names = ", ".join(f"{encode_basestring(name).replace('%', '%%')}: %s" for name in own)
    template, cells = f"{{{names}}}", ([AS_JSON[type(value)](value) for value in values] for values in own.values())
    return [template % row for row in zip(*cells, strict=True)]


AS_JSON: dict[type, Callable[[Any], str]] = {
    str: encode_basestring,
    int: int.__repr__,
    float: float.__repr__,
    bool: lambda value: "true" if value else "false",
    type(None): lambda value: "null",
}


def sweep(folder: Path) -> None:
    """Remove staging folders of processes that are gone."""
    for left in left_behind(folder):
        shutil.rmtree(left, ignore_errors=True)


def left_behind(folder: Path) -> list[Path]:
    """Staging folders of processes that are gone."""
    pids = {path: path.name.split("-")[0] for path in (folder / "staging").glob("*-*")}
    return [path for path, pid in pids.items() if pid.isdigit() and not process_alive(int(pid))]


def _staging(folder: Path) -> Path:
    try:
        (folder / "staging").mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=folder / "staging"))
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot write there ({error.strerror}). Free some space or choose another folder with --store."
        ) from None


def _stage(staging: Path, lines: Iterable[list[Sequence[Any]]]) -> int:
    """Write lines as parquet files of BATCH or a little more; returns how many there were. A file always exists, so that an empty source can be
    read. lines: one or more at a time, the columns of STAGED but the first.
    """
    total, held = 0, 0
    batch: list[list[Any]] = [[] for _ in STAGED]
    for columns in lines:
        for kept, column in zip(batch[1:], columns, strict=True):
            kept.extend(column)
        held = len(batch[1])
        if held >= BATCH:
            _write(staging, total, batch)
            total, held, batch = total + held, 0, [[] for _ in STAGED]
    if held or not total:
        _write(staging, total, batch)
    return total + held


def _write(staging: Path, first: int, batch: list[list[Any]]) -> None:
    batch[0] = list(range(first, first + len(batch[1])))
    arrays = []
    for field, column in zip(STAGED, batch, strict=True):
        try:
            arrays.append(pa.array(column, field.type))
        except UnicodeEncodeError:
            arrays.append(pa.array([None if v is None else clean_text(v) for v in column], field.type))
    table = pa.Table.from_arrays(arrays, schema=STAGED)
    write_parquet(table, staging, lambda _: f"{first:012d}.parquet", for_now=True)


def _ingest(con: Connection, staging: Path, source: str, role: str, *, replace: bool = True) -> tuple[int, int]:
    """Staged lines into rows and occurrences. Returns (new rows, distinct rows)."""
    staged = f"read_parquet({literal(str(staging / '*.parquet'))})"
    con.execute(
        f"CREATE TEMP TABLE first_seen AS SELECT row_id, min(n) AS n, bool_or(known.row_id IS NOT NULL) AS known "
        f"FROM {staged} s LEFT JOIN data.rows known USING (row_id) GROUP BY row_id"
    )
    names = ", ".join(TABLE_COLUMNS)
    end = "(SELECT coalesce(max(position), -1) FROM data.rows)"
    new, distinct = con.execute("SELECT count(*) FILTER (NOT known), count(*) FROM first_seen").fetchall()[0]
    if new == con.execute(f"SELECT count(*) FROM {staged}").fetchall()[0][0]:  # each line is a row of its own
        con.execute(f"INSERT INTO data.rows (position, {names}) SELECT {end} + 1 + n, {names} FROM {staged}")
    else:
        con.execute(
            f"CREATE TEMP TABLE first_lines AS SELECT n, {end} + row_number() OVER (ORDER BY n) AS position FROM first_seen WHERE NOT known"
        )
        con.execute(
            f"INSERT INTO data.rows (position, {names}) SELECT position, {names} FROM {staged} JOIN first_lines USING (n)"
        )
        con.execute("DROP TABLE first_lines")
    start = "(SELECT coalesce(max(seq), -1) + 1 FROM data.occurrences)"
    if replace:
        con.execute("DELETE FROM data.occurrences WHERE source = ? AND role = ?", [source, role])
        new_alone = ""
    else:
        new_alone = f"WHERE row_id NOT IN (SELECT row_id FROM data.occurrences WHERE source = {literal(source)})"
    con.execute(
        f"INSERT INTO data.occurrences (seq, row_id, source, index, role, columns) "
        f"SELECT {start} + n, row_id, ?, index, ?, columns FROM {staged} {new_alone}",
        [source, role],
    )
    con.execute("DROP TABLE first_seen")
    return int(new), int(distinct)


def _plain(value: Any) -> Any:
    """What JSON has no word for: numpy scalars as numbers, the rest as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
