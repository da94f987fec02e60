"""Measurements as tables: one wide table each (`m_<name>`). A recipe's scores and decisions are in recipes.py.

A table is made when its first values arrive and widened when a column appears. All functions take a connection inside a transaction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from curate.rows import content_id
from curate.store.entries import Measured
from curate.store.readings import NO_RECIPE_WAITS
from curate.store.shards import ANSWER, arrow_column, read_shard
from curate.store.sql import Connection, after_all, first_column, literal, one, quote

MEASURED = (
    "fingerprint",
    "measurement",
    "reads",
    "model",
    "model_fingerprint",
    "run",
    "checkpoint",
    "step",
    "engine",
    "params",
)


def table_of(measurement: str) -> str:
    """The table of a measurement, such as m_likelihood; a user's `package.module:name` keeps a hash of its full name."""
    name = re.sub(r"\W+", "_", measurement.lower())
    return f"m_{name}" if name == measurement else f"m_{name}_{content_id(measurement)[:6]}"


def columns_of(con: Connection, table: str) -> dict[str, str]:
    """name -> SQL type of a table's columns, without fingerprint and row_id; {} when there is no such table."""
    try:
        listed = con.execute(f"DESCRIBE data.{quote(table)}").fetchall()
    except duckdb.CatalogException:
        return {}
    return {name: kind for name, kind, *_ in listed if name not in ("fingerprint", "row_id")}


def remember(con: Connection, measured: Measured) -> None:
    """Note what a fingerprint stands for; names for people (run, checkpoint, step, model path) are brought up to date."""
    values = [getattr(measured, name) for name in MEASURED]
    values[-1] = json.dumps(dict(measured.params), sort_keys=True, default=str)
    marks = ", ".join("?" * len(values))
    con.execute(
        f"INSERT INTO data.measured ({', '.join(MEASURED)}, created) VALUES ({marks}, {after_all('data.measured', 'created')}) "
        "ON CONFLICT (fingerprint) DO UPDATE SET model = excluded.model, run = excluded.run, checkpoint = excluded.checkpoint, step = excluded.step",
        values,
    )


def ingest(con: Connection, paths: Sequence[Path]) -> bool:
    """Bring shards into tables. True if a table, column or fingerprint is new to what the last registered recipe uses: views have to follow."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Path]] = {}
    records: dict[str, Measured] = {}
    for path in paths:
        record, schema = read_shard(path)
        records[record.fingerprint] = record
        groups.setdefault((record.fingerprint, tuple((f.name, str(f.type)) for f in schema)), []).append(path)
    known = set(first_column(con, "SELECT fingerprint FROM data.measured"))
    for fingerprint, record in records.items():
        if (
            fingerprint not in known
        ):  # whoever measures more of it under another name says so when the run is whole (`remember`)
            remember(con, record)
    last = one(con, f"SELECT uses FROM data.recipes WHERE {NO_RECIPE_WAITS} ORDER BY updated DESC, name LIMIT 1")
    shown = set(last[0]) if last else set()
    changed = not shown.isdisjoint(set(records) - known)
    for (fingerprint, schema), files in groups.items():
        names = [name for name, _ in schema if name not in ("row_id", "samples")]
        listing = "[" + ", ".join(literal(str(f)) for f in files) + "]"
        source = f"read_parquet({listing})"
        picked = ", ".join(["row_id", *map(quote, names)])
        # a shard that was repeated after a kill may be here twice: its rows count once
        con.execute(
            f"CREATE OR REPLACE TEMP TABLE incoming AS SELECT {literal(fingerprint)} AS fingerprint, {picked} FROM {source} "
            "QUALIFY row_number() OVER (PARTITION BY row_id) = 1"
        )
        changed |= merge(con, table_of(records[fingerprint].measurement), "incoming") and fingerprint in shown
        if kept := dict(schema).get("samples"):
            _ingest_samples(con, fingerprint, source, [name for name in ANSWER if f"{name}: " in kept])
        con.execute("DROP TABLE incoming")
    return changed


def put(con: Connection, measurement: str, values: pa.Table) -> None:
    """Bring a table with fingerprint, row_id and columns into the measurement's table."""
    arrays = {
        name: values[name] if name in ("fingerprint", "row_id") else arrow_column(values[name])
        for name in values.column_names
    }
    con.register("values_view", pa.table(arrays))
    con.execute(
        "CREATE OR REPLACE TEMP TABLE incoming AS SELECT * FROM values_view QUALIFY row_number() OVER (PARTITION BY fingerprint, row_id) = 1"
    )
    con.unregister("values_view")
    merge(con, table_of(measurement), "incoming")
    con.execute("DROP TABLE incoming")


def merge(con: Connection, table: str, incoming: str) -> bool:
    """Update the lines that are there, append the others. True if the table was made or widened."""
    arriving = {
        name: _column_type(kind)
        for name, kind in con.execute(f"SELECT column_name, column_type FROM (DESCRIBE {incoming})").fetchall()
        if name not in ("fingerprint", "row_id")
    }
    there = columns_of(con, table)
    exists = con.execute(
        "SELECT count(*) FROM duckdb_tables() WHERE schema_name = 'data' AND table_name = ?", [table]
    ).fetchall()[0][0]
    if not exists:
        con.execute(f"CREATE TABLE data.{quote(table)} (fingerprint VARCHAR, row_id VARCHAR)")
    lower = {name.lower(): name for name in there}
    changed = not exists
    for name, kind in arriving.items():
        if name.lower() not in lower:
            con.execute(f"ALTER TABLE data.{quote(table)} ADD COLUMN {quote(name)} {kind}")
            changed = True
        elif kind == "VARCHAR" and there[lower[name.lower()]] != "VARCHAR":
            con.execute(f"ALTER TABLE data.{quote(table)} ALTER COLUMN {quote(name)} TYPE VARCHAR")
            changed = True
    same = "t.fingerprint = i.fingerprint AND t.row_id = i.row_id"
    overlap = con.execute(
        f"SELECT count(*) FROM {incoming} i WHERE EXISTS (FROM data.{quote(table)} t WHERE {same})"
    ).fetchall()[0][0]
    if overlap and arriving:
        sets = ", ".join(f"{quote(n)} = i.{quote(n)}" for n in arriving)
        con.execute(f"UPDATE data.{quote(table)} t SET {sets} FROM {incoming} i WHERE {same}")
    fresh = f"WHERE NOT EXISTS (FROM data.{quote(table)} t WHERE {same})" if overlap else ""
    con.execute(f"INSERT INTO data.{quote(table)} BY NAME SELECT * FROM {incoming} i {fresh}")
    return changed


def _column_type(kind: str) -> str:
    if kind in ("BOOLEAN", "VARCHAR"):
        return kind
    return "DOUBLE"


def _ingest_samples(con: Connection, fingerprint: str, source: str, names: Sequence[str]) -> None:
    """names: what these shards keep of an answer; earlier ones keep less."""
    con.execute(
        f"DELETE FROM data.samples WHERE fingerprint = {literal(fingerprint)} AND row_id IN (SELECT row_id FROM {source})"
    )
    con.execute(
        f"INSERT INTO data.samples (fingerprint, row_id, sample, {', '.join(names)}) "
        f"SELECT {literal(fingerprint)}, row_id, i::INTEGER - 1, {', '.join(f's.{name}' for name in names)} FROM "
        f"(SELECT row_id, unnest(samples) AS s, generate_subscripts(samples, 1) AS i FROM "
        f"(SELECT row_id, samples FROM {source} QUALIFY row_number() OVER (PARTITION BY row_id) = 1))"
    )
