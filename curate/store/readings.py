"""What waits: taken in by a run that is not whole yet, and seen by that run alone.

What a source holds is kept under its name. A reading that waits is kept beside it under a name of its own, and takes the source's place in the same
transaction as everything else that its run changes; a run that fails leaves the views as they were, and the next one finds what was read. A recipe
waits in the same way: as it will be, with its scores, so that its selection can be asked of views that nobody else sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from curate.store.sql import Connection, first_column, literal, one

MARK = "\x1e"  # no path has it
TABLES = ("occurrences", "source_columns", "source_state")
WAITS = "starts_with(source, chr(30))"
PLAIN = f"CASE WHEN {WAITS} THEN split_part(source, chr(30), 3) ELSE source END"  # a source's name as typed
NO_RECIPE_WAITS = "NOT starts_with(name, chr(30))"
FIRST = "first new row of "  # a key of data.meta: rows from this position on came with the reading
HIDDEN = (
    "SELECT o.row_id FROM data.occurrences o JOIN data.rows r USING (row_id) "
    f"LEFT JOIN data.meta m ON m.key = {literal(FIRST)} || o.source GROUP BY o.row_id "
    "HAVING bool_and(starts_with(o.source, chr(30))) AND any_value(r.position) >= min(m.value::BIGINT)"
)  # rows that no whole run has seen


def waiting_name(source: str, fingerprint: str) -> str:
    """The name under which a reading of a source waits."""
    return f"{MARK}{fingerprint}{MARK}{source}"


def waiting_recipe(name: str) -> str:
    """The name under which a recipe waits."""
    return f"{MARK}{name}"


def plain_name(source: str) -> str:
    """A source's name as it was typed, of one that waits too."""
    return source.split(MARK)[2] if source.startswith(MARK) else source


def any_waits(con: Connection) -> bool:
    return one(con, f"SELECT 1 FROM data.source_state WHERE {WAITS} LIMIT 1") is not None


def note_first(con: Connection, name: str) -> None:
    """Before a reading's rows come in: those that it brings are told apart from those that were there."""
    con.execute(
        "INSERT OR REPLACE INTO data.meta SELECT ?, (coalesce(max(position), -1) + 1)::VARCHAR FROM data.rows",
        [FIRST + name],
    )


def take(con: Connection, waiting: Mapping[str, Sequence[str]], names: Iterable[str]) -> None:
    """Put readings in their sources' places. waiting: source -> its readings (one a role). names: the sources whose other readings are dropped."""
    for source, readings in waiting.items():
        for reading in readings:
            roles = [
                row[0]
                for row in con.execute("SELECT role FROM data.source_state WHERE source = ?", [reading]).fetchall()
            ]
            for table in TABLES:
                con.execute(
                    f"DELETE FROM data.{table} WHERE source = ? AND role IN (SELECT unnest(?::VARCHAR[]))",
                    [source, roles],
                )
                con.execute(f"UPDATE data.{table} SET source = ? WHERE source = ?", [source, reading])
            con.execute("DELETE FROM data.meta WHERE key = ?", [FIRST + reading])
    _drop(con, names)


def _drop(con: Connection, names: Iterable[str]) -> None:
    """Forget readings that nobody waits for any more, and rows that came with them alone."""
    waiting = first_column(con, f"SELECT source FROM data.source_state WHERE {WAITS}")
    left = sorted({name for name in waiting if plain_name(name) in set(names)})
    if not left:
        return
    marks = ", ".join("?" * len(left))
    con.execute(
        f"DELETE FROM data.rows WHERE row_id IN ({HIDDEN}) AND row_id NOT IN "
        f"(SELECT row_id FROM data.occurrences WHERE source NOT IN ({marks}))",
        left,
    )
    for table in TABLES:
        con.execute(f"DELETE FROM data.{table} WHERE source IN ({marks})", left)
    con.execute(f"DELETE FROM data.meta WHERE key IN ({marks})", [FIRST + name for name in left])
