"""The rows of a selection as Arrow tables, many at a time: what an export writes.

A list of them first, in the order they are written in, as an Arrow file: where each row and its occurrence is, why it was dropped, and the
columns of `scored` that stand beside it. Then the rows themselves, BATCH of the list at a time, so that memory does not grow with them; between two
batches others may write. What is picked is SQL over l (the list), r (data.rows) and o (data.occurrences).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from curate.rows import Row
from curate.store import query, views
from curate.store.narrowing import ViewFacts
from curate.store.openings import let_go
from curate.store.sql import Connection, literal, literals, quote

if TYPE_CHECKING:
    from curate.store.selection import Selection

BATCH = 1 << 16
BESIDE = "beside "  # before the name of a column of `scored`
REASON = (  # as `str(Reason)` has it
    "CASE WHEN d.value IS NULL THEN d.reason WHEN d.cut IS NULL THEN d.reason || printf(' (%.6g)', d.value) "
    "ELSE d.reason || printf(' (%.6g against %.6g)', d.value, d.cut) END"
)


class Selected:
    """The kept rows of a selection, or the dropped ones, in the order of `Selection.kept` and `dropped`. beside: columns of `scored`."""

    def __init__(self, selection: Selection, file: Path, *, kept: bool, beside: Sequence[str] = ()):
        self.selection, self.store, self.beside = selection, selection.store, list(beside)
        with self.store.database.read() as con:
            parts = self._listings(con, kept)
            if self.beside:
                views.narrow(ViewFacts(con, selection.recipe), "scored")
            first, *others = parts
            lines = con.sql(first).to_arrow_reader(BATCH)
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, lines.schema) as writer:
                for batch in lines:
                    writer.write_batch(batch)
                for text in others:
                    for batch in con.sql(text).to_arrow_reader(BATCH):
                        writer.write_batch(batch)
        self.list = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def __len__(self) -> int:
        return len(self.list)

    def read(self, picked: Mapping[str, str]) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The lines of the list and their rows, in their order. picked: name -> SQL."""
        text = ", ".join(f"{sql} AS {quote(name)}" for name, sql in picked.items())
        for start in range(0, len(self.list), BATCH):
            if start:
                let_go()
            part = self.list.slice(start, BATCH)
            at = part["position"].to_numpy()
            seen = part["seq"].drop_null().to_numpy()
            low, high = (int(seen.min()), int(seen.max())) if len(seen) else (0, -1)
            with self.store.database.read() as con:
                con.register("listed", part.append_column("i", pa.array(range(len(part)), pa.int32())))
                found = con.sql(
                    f"SELECT {text} FROM listed l JOIN (SELECT * FROM data.rows WHERE position BETWEEN {at.min()} AND {at.max()}) r USING (position) "
                    f"LEFT JOIN (SELECT * FROM data.occurrences WHERE seq BETWEEN {low} AND {high}) o ON o.seq = l.seq ORDER BY l.i"
                ).to_arrow_table()
                con.unregister("listed")
            yield part, found

    def structures(self, answer: str) -> list[tuple[str | None, bool]]:
        """The shapes of the users' columns as JSON, in the order of their first rows, each with whether these rows have an answer. answer: SQL."""
        with self.store.database.read() as con:
            numbered = self.list.select(["position", "seq"]).append_column(
                "i", pa.array(range(len(self.list)), pa.int64())
            )
            con.register("listed", numbered)
            found = con.execute(
                f"SELECT json_structure(o.columns) AS structure, ({answer}) IS NOT NULL AS answers, min(l.i) FROM listed l "
                "JOIN data.rows r USING (position) LEFT JOIN data.occurrences o ON o.seq = l.seq GROUP BY ALL ORDER BY 3"
            ).fetchall()
            con.unregister("listed")
        return [(structure, bool(answers)) for structure, answers, _ in found]

    def first(self) -> Row | None:
        """The first of the rows; None where it has no text, and where there are none."""
        with self.store.database.read() as con:
            return next(iter(query.rows_at(con, self.list["position"].slice(0, 1).to_numpy())), None)

    def column_types(self) -> dict[str, set[str]]:
        """The user's columns -> the types that their sources gave them, as `source_columns` keeps them."""
        with self.store.database.read() as con:
            lines = con.execute(
                "SELECT name, list(DISTINCT type) FROM data.source_columns WHERE role = 'train' GROUP BY name"
            ).fetchall()
        return {name: set(types) for name, types in lines}

    def _listings(self, con: Connection, kept: bool) -> list[str]:
        """The queries of the list, one after another."""
        selection = self.selection
        once = selection.spec.get("duplicates", "once") != "as_found"
        sources = selection.sources(con)
        of = "role = 'train'" + ("" if sources is None else f" AND source IN ({literals(sources)})")
        every = f"(SELECT * FROM data.occurrences WHERE {of})"
        first = f"(SELECT row_id, min(seq) AS seq FROM {every} GROUP BY row_id)"
        decided = f"d.selection = {literal(selection.name)} AND d.kept"
        if kept:
            return [self._listing("NULL::VARCHAR", first if once else every, decided)]
        dropped = self._listing(REASON, first, f"{decided} IS FALSE")
        if not once:
            return [dropped]
        again = (
            f"(SELECT o.row_id, o.seq, f.source || ':' || f.index AS whence FROM {every} o JOIN {first} one USING (row_id) "
            "JOIN data.occurrences f ON f.seq = one.seq WHERE o.seq > one.seq)"
        )
        why = "'duplicate of ' || d.row_id || ', which is kept from ' || o.whence"
        return [dropped, self._listing(why, again, f"{decided} AND o.seq IS NOT NULL")]

    def _listing(self, reason: str, occurrences: str, condition: str) -> str:
        picked = "".join(f", s.{quote(name)} AS {quote(BESIDE + name)}" for name in self.beside)
        scored = "LEFT JOIN scored s ON s.row_id = d.row_id" if self.beside else ""
        return (
            f"SELECT r.position, o.seq, {reason} AS reason{picked} FROM data.decisions d JOIN data.rows r USING (row_id) "
            f"LEFT JOIN {occurrences} o USING (row_id) {scored} WHERE {condition} ORDER BY r.position, o.seq"
        )
