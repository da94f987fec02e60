"""Measured values, read: numbers over checkpoints, texts, sampled answers, aligned to rows that are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curate.errors import UsageError, did_you_mean
from curate.models.naming import natural
from curate.store.entries import Measured
from curate.store.shards import ANSWER
from curate.store.sql import Connection, quote
from curate.store.tables import MEASURED, columns_of, table_of


def measured(con: Connection, wanted: Mapping[str, Any]) -> list[Measured]:
    """What has been measured, ordered by run, step and age. wanted: fields of `Measured` and the values that they must have."""
    unknown = sorted(set(wanted) - set(MEASURED))
    if unknown:
        raise UsageError(f"no field {unknown[0]!r} of a measurement; there are {', '.join(MEASURED)}.")
    where = " AND ".join(f"{name} IS NOT DISTINCT FROM ?" for name in wanted) or "true"
    lines = con.execute(
        f"SELECT {', '.join(MEASURED)} FROM data.measured WHERE {where} ORDER BY run, step NULLS FIRST, created, fingerprint",
        list(wanted.values()),
    ).fetchall()
    records = [
        Measured(**{**dict(zip(MEASURED, row, strict=True)), "params": json.loads(row[-1] or "{}")}) for row in lines
    ]
    # Imported together, checkpoints without a step have nothing else to be ordered by than their names.
    order = {id(record): i for i, record in enumerate(records)}
    return sorted(
        records,
        key=lambda m: (
            m.run,
            m.step is not None,
            m.step or 0,
            natural(m.checkpoint) if m.reads == "import" and m.step is None else (),
            order[id(m)],
        ),
    )


def known_columns(con: Connection, names: Sequence[str] | None) -> dict[str, list[str]]:
    """fingerprint -> its columns (of `names`, or all) that have a value in some row."""
    result: dict[str, list[str]] = {}
    for (measurement,) in con.execute("SELECT DISTINCT measurement FROM data.measured ORDER BY 1").fetchall():
        table = table_of(measurement)
        listed = [c for c in columns_of(con, table) if names is None or c in names]
        if not listed:
            continue
        counts = ", ".join(f"count({quote(c)}) > 0" for c in listed)
        for fingerprint, *known in con.execute(
            f"SELECT fingerprint, {counts} FROM data.{quote(table)} GROUP BY 1"
        ).fetchall():
            result.setdefault(fingerprint, []).extend(c for c, k in zip(listed, known, strict=True) if k)
    return result


def ids_view(con: Connection, row_ids: Sequence[str], name: str = "wanted_ids") -> None:
    """Make `row_ids` queryable as a table (i, row_id)."""
    con.register(
        name, pa.table({"i": pa.array(np.arange(len(row_ids))), "row_id": pa.array(list(row_ids), pa.string())})
    )


def _table_with(con: Connection, fingerprints: Sequence[str | None], names: Sequence[str]) -> str | None:
    """The one table where these fingerprints' columns are; None where nothing of them was ever measured."""
    known = [f for f in fingerprints if f is not None]
    marks = ", ".join("?" * len(known)) or "NULL"
    names_of = con.execute(
        f"SELECT DISTINCT measurement FROM data.measured WHERE fingerprint IN ({marks})", known
    ).fetchall()
    if len(names_of) > 1:
        raise ValueError(f"one measurement at a time, found {sorted(f[0] for f in names_of)}")
    if not names_of:
        return None
    table = table_of(names_of[0][0])
    there = columns_of(con, table)
    for name in names:
        if name not in there:
            hint = did_you_mean(name, there, f"it has {', '.join(there)}.", show=str)
            raise UsageError(f"the measurement {names_of[0][0]} has no column {name!r}; {hint}")
    return table


def series(
    con: Connection, fingerprints: Sequence[str | None], names: Sequence[str], row_ids: Sequence[str]
) -> dict[str, np.ndarray]:
    """name -> (rows, fingerprints) float64, NaN where nothing is known. Fingerprints are of one measurement, None of none."""
    result = {name: np.full((len(row_ids), len(fingerprints)), np.nan) for name in names}
    table = _table_with(con, fingerprints, names)
    if table is None or not names or not len(row_ids):
        return result
    ids_view(con, row_ids)
    listed = [(k, f) for k, f in enumerate(fingerprints) if f is not None]
    con.register("wanted_prints", pa.table({"k": [k for k, _ in listed], "fingerprint": [f for _, f in listed]}))
    kinds = columns_of(con, table)
    text = [n for n in names if kinds[n] == "VARCHAR"]
    if text:
        raise UsageError(f"{text[0]} is text, not a number.")
    picked = ", ".join(f"t.{quote(n)}::DOUBLE" for n in names)
    cells = con.sql(
        f"SELECT ids.i, p.k, {picked} FROM data.{quote(table)} t JOIN wanted_prints p USING (fingerprint) JOIN wanted_ids ids USING (row_id)"
    ).to_arrow_table()
    i, k = cells.column(0).to_numpy(), cells.column(1).to_numpy()
    for n, name in enumerate(names):
        result[name][i, k] = cells.column(2 + n).to_numpy()  # NULL arrives as NaN
    return result


def texts(con: Connection, fingerprint: str, name: str, row_ids: Sequence[str]) -> list[str | None]:
    """A text column of one fingerprint, one entry a row id; None where there is none."""
    result: list[str | None] = [None] * len(row_ids)
    table = _table_with(con, [fingerprint], [name])
    if table is not None and len(row_ids):
        ids_view(con, row_ids)
        column = quote(name)
        query = (
            f"SELECT i, {column}::VARCHAR FROM data.{quote(table)} JOIN wanted_ids USING (row_id) "
            f"WHERE fingerprint = ? AND {column} IS NOT NULL"
        )
        for i, value in con.execute(query, [fingerprint]).fetchall():
            result[i] = value
    return result


def samples(con: Connection, fingerprint: str, row_ids: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The sampled answers of each row as dicts, in sample order; an empty list where there are none."""
    result: list[list[dict[str, Any]]] = [[] for _ in row_ids]
    ids_view(con, row_ids)
    query = f"SELECT i, {', '.join(ANSWER)} FROM data.samples JOIN wanted_ids USING (row_id) WHERE fingerprint = ? ORDER BY i, sample"
    for i, *values in con.execute(query, [fingerprint]).fetchall():
        result[i].append(dict(zip(ANSWER, values, strict=True)))
    return result


def n_answers(con: Connection, fingerprint: str, row_ids: Sequence[str]) -> dict[str, int]:
    """row id -> how many sampled answers are kept of it, 0 too, of the rows that this fingerprint has a line for."""
    table = _table_with(con, [fingerprint], [])
    if table is None or not columns_of(con, table):
        return {}
    ids_view(con, row_ids)
    kept = "SELECT row_id, count(*) AS n FROM data.samples WHERE fingerprint = ? GROUP BY row_id"
    counts = con.execute(
        f"SELECT row_id, coalesce(k.n, 0) FROM data.{quote(table)} JOIN wanted_ids USING (row_id) LEFT JOIN ({kept}) k USING (row_id) "
        "WHERE fingerprint = ?",
        [fingerprint, fingerprint],
    ).fetchall()
    return {row_id: int(n) for row_id, n in counts}
