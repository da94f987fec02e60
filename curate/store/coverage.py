"""Which rows measurements have no line for: asked for all measurements of a plan at once, whatever their number.

A measurement that has a line for just the rows that are asked about is told by the number of its lines and a sum over their ids, which costs half of
comparing them; for the others the rows that have a line come back as one bit each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curate.store.query import rows_to_cover
from curate.store.sql import Connection, literal, quote
from curate.store.tables import table_of


@dataclass(frozen=True)
class Coverage:
    """Rows with text by position, and of every measurement which of them it has no line for.

    n: rows of the sources, those without text too. positions, row_ids (objects): of those with text; where no measurement lacks a row, of none.
    lacking: fingerprint -> (rows,) bool; measurements that lack the same rows have the same array.
    """

    n: int
    positions: np.ndarray
    row_ids: np.ndarray
    lacking: dict[str, np.ndarray]


def coverage(con: Connection, sources: Sequence[str] | None, kind: str | None, fingerprints: Iterable[str]) -> Coverage:
    """Which rows of these sources (all, if None) and this kind each of the fingerprints has no line for."""
    about = "count(*), count(r.prompt), coalesce(bit_xor(hash(r.row_id)) FILTER (r.prompt IS NOT NULL), 0::UBIGINT)"
    n, n_text, xor = (column[0].as_py() for column in rows_to_cover(con, sources, kind, about).columns)
    nothing, everything = np.zeros(n_text, bool), np.ones(n_text, bool)
    lacking = dict.fromkeys(fingerprints, everything)
    tables = _tables(con, lacking) if n_text else {}
    if tables:
        each = "SELECT fingerprint, count(*), bit_xor(hash(row_id)) FROM data.{table} GROUP BY fingerprint"
        for fingerprint, *lines in con.execute(_union(each, tables)).fetchall():
            if lines == [n_text, xor] and fingerprint in lacking:
                lacking[fingerprint] = nothing
    if not n_text or all(array is nothing for array in lacking.values()):
        return Coverage(n, np.zeros(0, np.int64), np.zeros(0, object), lacking)
    found = rows_to_cover(con, sources, kind, "r.position, r.row_id, r.prompt IS NOT NULL AS has_text")
    found = found.filter(found["has_text"])
    positions, row_ids = found["position"].to_numpy(), found["row_id"].to_numpy(zero_copy_only=False)
    con.register("asked_rows", pa.table({"i": pa.array(np.arange(n_text), pa.int32()), "row_id": found["row_id"]}))
    partly = {table: of for table, prints in tables.items() if (of := [f for f in prints if lacking[f] is everything])}
    alike = {array.tobytes(): array for array in (nothing, everything)}
    if partly:
        each = (
            f"SELECT fingerprint, bitstring_agg(i, 0, {n_text - 1}) FROM data.{{table}} JOIN asked_rows USING (row_id) "
            "WHERE fingerprint IN ({prints}) GROUP BY fingerprint"
        )
        found = con.sql(_union(each, partly)).to_arrow_table()
        for fingerprint, bits in zip(found.column(0).to_pylist(), found.column(1).to_pylist(), strict=True):
            array = ~_unpacked(bits, n_text)
            lacking[fingerprint] = alike.setdefault(array.tobytes(), array)
    con.unregister("asked_rows")
    return Coverage(n, positions, row_ids, lacking)


def _tables(con: Connection, fingerprints: Iterable[str]) -> dict[str, list[str]]:
    """table -> those of the fingerprints that have lines in it, or may have."""
    of = dict(con.execute("SELECT fingerprint, measurement FROM data.measured").fetchall())
    there = {
        row[0] for row in con.execute("SELECT table_name FROM duckdb_tables() WHERE schema_name = 'data'").fetchall()
    }
    found: dict[str, list[str]] = {}
    for fingerprint in fingerprints:
        if fingerprint in of and (table := table_of(of[fingerprint])) in there:
            found.setdefault(table, []).append(fingerprint)
    return found


def _union(each: str, tables: dict[str, list[str]]) -> str:
    """One query over several tables."""
    return " UNION ALL ".join(
        each.format(table=quote(table), prints=", ".join(map(literal, prints))) for table, prints in tables.items()
    )


def _unpacked(bits: bytes, n: int) -> np.ndarray:
    """(n,) bool of a DuckDB BIT: its first byte says how many bits of padding come before the others."""
    return np.unpackbits(np.frombuffer(bits, np.uint8)[1:])[bits[0] :][:n].astype(bool)
