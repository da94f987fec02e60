"""A store's shards beside its database: the two hold the same values, so what one has lost the other still has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.store.entries import Measured
from curate.store.shards import ANSWER, Shards
from curate.store.sql import Connection, quote
from curate.store.tables import columns_of, table_of

CHUNK = 2048  # rows of a shard that is written from the database


@dataclass
class Compared:
    """One measurement of one model. other: shard -> of how many rows it has other values than the database. lost: shards with rows that the
    database does not have. uncovered: rows of the database that no shard has.
    """

    measured: Measured
    other: dict[Path, int] = field(default_factory=dict)
    lost: list[Path] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)


def fingerprint_of(path: Path) -> str:
    """Of a shard that is whole."""
    return Measured.from_json(pq.read_schema(path).metadata[b"curate.measured"]).fingerprint


def compare(con: Connection, measured: Measured, files: Sequence[Path]) -> Compared:
    """What the database has of a measurement, beside these whole shards of it."""
    compared, table = Compared(measured), table_of(measured.measurement)
    there = columns_of(con, table)
    shapes: dict[tuple[str, ...], list[tuple[Path, pa.Table]]] = defaultdict(list)
    for file in files:
        shard = pq.read_table(file)
        shapes[tuple(f"{f.name} {f.type}" for f in shard.schema)].append((file, shard))
    ids = [pa.table({"row_id": pa.array([], pa.string())})]
    agreeing: set[str] = set()
    differing: list[tuple[str, Path]] = []
    for alike in shapes.values():
        ids += [shard.select(["row_id"]) for _, shard in alike]
        numbers = pa.chunked_array([pa.repeat(pa.scalar(i), shard.num_rows) for i, (_, shard) in enumerate(alike)])
        together = pa.concat_tables([shard.replace_schema_metadata() for _, shard in alike])
        con.register("shard_rows", together.append_column("shard_number", numbers))
        for row_id, number, known, same in _lines(con, measured.fingerprint, table, there, together.schema):
            if not known:
                compared.lost += [alike[number][0]] if alike[number][0] not in compared.lost else []
            elif same:
                agreeing.add(row_id)
            else:
                differing.append((row_id, alike[number][0]))
        con.unregister("shard_rows")
    for row_id, file in differing:
        if row_id not in agreeing:  # of a row that was measured twice one shard agrees
            compared.other[file] = compared.other.get(file, 0) + 1
    if there or files:
        con.register("shard_rows", pa.concat_tables(ids))
        compared.uncovered = _uncovered(con, measured.fingerprint, table)
        con.unregister("shard_rows")
    return compared


def _lines(
    con: Connection, fingerprint: str, table: str, there: dict[str, str], schema: pa.Schema
) -> Iterator[tuple[str, int, bool, bool]]:
    """(row id, number of the shard, whether the database has the row, whether with the same values) of the rows of shards that the database
    does not have, or has with other values, and of those that are in several shards.
    """
    kinds = {name.lower(): (name, kind) for name, kind in there.items()}
    same = ["true"]
    for name in schema.names:
        if name.lower() in kinds and name != "row_id":
            column, kind = kinds[name.lower()]
            same.append(f"s.{quote(name)}::{kind} IS NOT DISTINCT FROM t.{quote(column)}")
        elif name not in ("row_id", "samples"):
            same.append(f"s.{quote(name)} IS NULL")
    answers = ""
    if "samples" in schema.names:
        written = [
            field.name for field in schema.field("samples").type.value_type
        ]  # earlier shards keep less of an answer
        same.append("coalesce(s.samples, []) IS NOT DISTINCT FROM coalesce(a.samples, [])")
        answers = (
            f"LEFT JOIN (SELECT row_id, list({_answer(written)} ORDER BY sample) AS samples FROM data.samples "
            "WHERE fingerprint = $1 GROUP BY row_id) a "
            "ON a.row_id = s.row_id"
        )
    values = f"(SELECT * FROM data.{quote(table)} WHERE fingerprint = $1)" if there else "(SELECT NULL AS row_id)"
    query = (
        f"SELECT s.row_id, s.shard_number, t.row_id IS NOT NULL AS known, {' AND '.join(same)} AS same FROM shard_rows s "
        f"LEFT JOIN {values} t ON t.row_id = s.row_id {answers} "
        "QUALIFY NOT known OR NOT same OR count(*) OVER (PARTITION BY s.row_id) > 1 ORDER BY s.shard_number, s.row_id"
    )
    yield from con.execute(query, [fingerprint] if "$1" in query else []).fetchall()


def _answer(names: Sequence[str]) -> str:
    """A sampled answer as a shard has it."""
    return "{" + ", ".join(f"'{name}': {name}" for name in names) + "}"


def _uncovered(con: Connection, fingerprint: str, table: str) -> list[str]:
    if not con.execute(
        "SELECT 1 FROM duckdb_tables() WHERE schema_name = 'data' AND table_name = ?", [table]
    ).fetchall():
        return []
    query = f"SELECT row_id FROM data.{quote(table)} WHERE fingerprint = ? AND row_id NOT IN (SELECT row_id FROM shard_rows) ORDER BY row_id"
    return [row_id for (row_id,) in con.execute(query, [fingerprint]).fetchall()]


def write_again(con: Connection, shards: Shards, measured: Measured, row_ids: Sequence[str], first: int) -> list[Path]:
    """Shards of what the database has of these rows, numbered from `first`."""
    table, written = table_of(measured.measurement), []
    names = list(columns_of(con, table))
    for at in range(0, len(row_ids), CHUNK):
        part = list(row_ids[at : at + CHUNK])
        con.register("shard_rows", pa.table({"row_id": pa.array(part, pa.string()), "i": pa.array(range(len(part)))}))
        picked = ", ".join(["row_id", *map(quote, names)])
        query = (
            f"SELECT {picked} FROM data.{quote(table)} JOIN shard_rows USING (row_id) WHERE fingerprint = ? ORDER BY i"
        )
        values: Any = con.sql(query, params=[measured.fingerprint]).to_arrow_table()
        query = (
            f"SELECT list({_answer(ANSWER)} ORDER BY sample) FILTER (sample IS NOT NULL) FROM shard_rows LEFT JOIN (SELECT * FROM data.samples "
            "WHERE fingerprint = ?) USING (row_id) GROUP BY row_id, i ORDER BY i"
        )
        answers = [line[0] or [] for line in con.execute(query, [measured.fingerprint]).fetchall()]
        con.unregister("shard_rows")
        columns = {name: values[name] for name in names if values[name].null_count < len(part)}
        written.append(shards.write(measured, first + at // CHUNK, part, columns, answers if any(answers) else None))
    return written
