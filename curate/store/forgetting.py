"""Taking an import back: its values, the rows that nothing else knows, its dataset values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from curate.errors import UsageError
from curate.store.imports import NUMBER, VALUES, Import, ensure, outdate_selections
from curate.store.recipes import outdate
from curate.store.sql import Connection, first_column, literals, quote
from curate.store.tables import columns_of, merge


@dataclass(frozen=True)
class Forgotten:
    """What forgetting an import removes. values: known ones of rows. rows: those that nothing else knows. outdated: recipes and selections."""

    number: int
    file: str
    columns: tuple[str, ...]
    values: int
    rows: int
    dataset_values: int
    shown_again: tuple[int, ...]
    outdated: tuple[str, ...]
    dry_run: bool = False

    def __str__(self) -> str:
        verb = "would be removed" if self.dry_run else "removed"
        parts = []
        if self.values:
            parts.append(f"{self.values:,} values of {', '.join(self.columns)}")
        if self.rows:
            parts.append(f"{self.rows:,} rows that only this file's ids knew")
        if self.dataset_values:
            parts.append(f"{self.dataset_values:,} dataset values ({', '.join(self.columns)})")
        lines = [f"Import {self.number} ({self.file}) {verb}: {', '.join(parts) or 'it had no values left'}."]
        if self.shown_again:
            lines.append(
                f"Where import {' and '.join(map(str, self.shown_again))} had values of the same columns, those count again."
            )
        if self.outdated:
            lines.append(
                f"Made with its values, and out of date now: {', '.join(self.outdated)}. `curate run RECIPE` makes them anew."
            )
        return "\n".join(lines)


def forget(con: Connection, number: int) -> Forgotten:
    """Take an import back. Raises UsageError where there is none of this number."""
    imports = ensure(con)
    one = next((i for i in imports if i.number == number), None)
    if one is None:
        there = ", ".join(f"{i.number} ({i.file})" for i in imports)
        raise UsageError(f"no import {number} in this store. There are: {there or 'none'}.")
    row_ids = first_column(con, f"SELECT DISTINCT row_id FROM data.imported_lines WHERE {NUMBER} = ?", [number])
    values = sum(_known(con, one))
    again = _unmerge(con, one, [other for other in imports if other.number != number])
    con.execute("DELETE FROM data.imports WHERE number = ?", [number])
    rows = _forget_rows(con, row_ids)
    dataset_values = 0
    if one.values_origin:
        dataset_values = con.execute(
            "SELECT count(*) FROM data.dataset_values WHERE origin = ?", [one.values_origin]
        ).fetchall()[0][0]
        con.execute("DELETE FROM data.dataset_values WHERE origin = ?", [one.values_origin])
    outdated = [*outdate(con, one.fingerprints), *outdate_selections(con, one.columns if one.fingerprints else ())]
    return Forgotten(number, one.file, one.columns, values, rows, dataset_values, again, tuple(dict.fromkeys(outdated)))


def _known(con: Connection, one: Import) -> list[int]:
    """How many values of each column it brought."""
    if not one.fingerprints:
        return []
    counts = ", ".join(f"count({quote(c)})" for c in one.columns) or "0"
    return list(con.execute(f"SELECT {counts} FROM data.imported_lines WHERE {NUMBER} = ?", [one.number]).fetchall()[0])


def _unmerge(con: Connection, one: Import, others: Sequence[Import]) -> tuple[int, ...]:
    """The values without this import's: its lines are laid anew from what the others have of them. Returns those that are seen again."""
    if not one.fingerprints:
        return ()
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE affected AS SELECT DISTINCT fingerprint, row_id FROM data.imported_lines WHERE {NUMBER} = ?",
        [one.number],
    )
    con.execute(f"DELETE FROM data.imported_lines WHERE {NUMBER} = ?", [one.number])
    con.execute(
        f"DELETE FROM data.{quote(VALUES)} WHERE (fingerprint, row_id) IN (SELECT (fingerprint, row_id) FROM affected)"
    )
    again = []
    for other in sorted(others, key=lambda i: i.number):
        if not set(other.fingerprints) & set(one.fingerprints):
            continue
        picked = ", ".join(["fingerprint", "row_id", *map(quote, other.columns)])
        con.execute(
            f"CREATE OR REPLACE TEMP TABLE incoming AS SELECT {picked} FROM data.imported_lines JOIN affected USING (fingerprint, row_id) "
            f"WHERE {NUMBER} = {other.number}"
        )
        if con.execute("SELECT count(*) FROM incoming").fetchall()[0][0]:
            merge(con, VALUES, "incoming")
            if set(other.columns) & set(one.columns):
                again.append(other.number)
        con.execute("DROP TABLE incoming")
    con.execute("DROP TABLE affected")
    left = {c for other in others for c in other.columns if other.fingerprints}
    for table in (VALUES, "imported_lines"):
        for column in one.columns:
            if column not in left and column in columns_of(con, table):
                con.execute(f"ALTER TABLE data.{quote(table)} DROP COLUMN {quote(column)}")
    gone = [f for f in one.fingerprints if not any(f in other.fingerprints for other in others)]
    con.execute(f"DELETE FROM data.measured WHERE fingerprint IN ({literals(gone)})")
    return tuple(again)


def _forget_rows(con: Connection, row_ids: Sequence[str]) -> int:
    """Remove those of these rows that have no text and that nothing measured or imported is about any more. Returns how many."""
    con.register("forget_view", pa.table({"row_id": pa.array(row_ids, pa.string())}))
    con.execute(
        "CREATE OR REPLACE TEMP TABLE lone AS SELECT row_id FROM data.rows JOIN forget_view USING (row_id) WHERE prompt IS NULL"
    )
    con.unregister("forget_view")
    tables = first_column(
        con,
        "SELECT table_name FROM duckdb_columns() WHERE schema_name = 'data' AND column_name = 'row_id' AND database_name = current_database()",
    )
    for table in tables:
        if table in ("samples", "imported_lines") or table.startswith("m_"):
            con.execute(f"DELETE FROM lone WHERE row_id IN (SELECT row_id FROM data.{quote(table)})")
    n = int(con.execute("SELECT count(*) FROM lone").fetchall()[0][0])
    if n:
        for table in tables:
            con.execute(f"DELETE FROM data.{quote(table)} WHERE row_id IN (SELECT row_id FROM lone)")
        con.execute(
            "DELETE FROM data.source_columns WHERE source NOT IN (SELECT source FROM data.occurrences UNION SELECT source FROM data.source_state)"
        )
    con.execute("DROP TABLE lone")
    return n
