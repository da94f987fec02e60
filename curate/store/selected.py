"""The rows of a selection as Arrow tables, many at a time: what an export writes.

A list of them first, in the order they are written in, as an Arrow file: where each row and its occurrence is, why it was dropped, and the
columns of `scored` that stand beside it. Then the rows themselves, BATCH of the list at a time, so that memory does not grow with them; between two
batches others may write. What is picked is SQL over l (the list), r (data.rows) and o (data.occurrences).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from curate.rows import Row
from curate.store import query, views
from curate.store.narrowing import ViewFacts, occur_once
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

    def __init__(self, selection: Selection, lines: pa.Table):
        self.selection, self.store, self.list = selection, selection.store, lines

    @classmethod
    def both(
        cls, selection: Selection, folder: Path, beside: Sequence[str] = (), *, by_rank: bool = False
    ) -> tuple[Selected, Selected]:
        """The kept rows and the dropped ones, listed in this folder. by_rank: in the order of `order_by`, not as they were read."""
        files = {True: folder / "kept", False: folder / "dropped"}
        with selection.store.database.read() as con, ExitStack() as opened:
            writers: dict[bool, Any] = {}
            for text in _listings(selection, con, beside, by_rank=by_rank):
                lines = con.sql(text).to_arrow_reader(BATCH)
                for kept, file in files.items():
                    if kept not in writers:
                        sink = opened.enter_context(pa.OSFile(str(file), "wb"))
                        writers[kept] = opened.enter_context(pa.ipc.new_file(sink, lines.schema))
                for batch in lines:
                    for kept in files:
                        writers[kept].write_batch(batch.filter(batch["kept"] if kept else pc.invert(batch["kept"])))
        kept, dropped = (pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files.values())
        return cls(selection, kept), cls(selection, dropped)

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


def _listings(selection: Selection, con: Connection, beside: Sequence[str], *, by_rank: bool) -> list[str]:
    """The queries of the lists of both, one after another."""
    once = selection.spec.get("duplicates", "once") != "as_found"
    sources = selection.sources(con)
    seen = "role = 'train'" + ("" if sources is None else f" AND source IN ({literals(sources)})")
    every = f"(SELECT * FROM data.occurrences WHERE {seen})"
    if beside:
        facts = ViewFacts(con, selection.recipe)
        facts.joined = views.tables_named(facts, " ".join(beside))
        views.narrow(facts, "scored")

    def listing(reason: str, occurrences: str, condition: str) -> str:
        picked = "".join(f", s.{quote(name)} AS {quote(BESIDE + name)}" for name in beside)
        scored = "LEFT JOIN scored s ON s.row_id = d.row_id" if beside else ""
        return (
            f"SELECT r.position, o.seq, d.kept, {reason} AS reason{picked} FROM data.decisions d JOIN data.rows r USING (row_id) "
            f"LEFT JOIN {occurrences} o USING (row_id) {scored} WHERE d.selection = {literal(selection.name)} AND d.kept IS NOT NULL {condition} "
            f"ORDER BY {'d.rank, ' if by_rank else ''}r.position, o.seq"
        )

    why = f"CASE WHEN d.kept THEN NULL ELSE {REASON} END"
    if occur_once(con, seen):
        return [listing(why, every, "")]
    first = f"(SELECT row_id, min(seq) AS seq FROM {every} GROUP BY row_id)"
    if not once:
        return [listing(why, every, "AND d.kept"), listing(why, first, "AND NOT d.kept")]
    again = (
        f"(SELECT o.row_id, o.seq, f.source || ':' || f.index AS whence FROM {every} o JOIN {first} one USING (row_id) "
        "JOIN data.occurrences f ON f.seq = one.seq WHERE o.seq > one.seq)"
    )
    duplicate = "'duplicate of ' || d.row_id || ', which is kept from ' || o.whence"
    more = listing(duplicate, again, "AND d.kept AND o.seq IS NOT NULL").replace(", d.kept,", ", false AS kept,", 1)
    return [listing(why, first, ""), more]
