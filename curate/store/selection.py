"""A selection: what was decided about every row, and the way from there to rows and a dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from curate.errors import UsageError
from curate.rows import content_id
from curate.store import query
from curate.store.decisions import Reason
from curate.store.entries import SelectedRow
from curate.store.openings import let_go
from curate.store.recipes import control_name
from curate.store.sql import Connection, one, quote
from curate.store.values import ids_view

if TYPE_CHECKING:
    import polars as pl

    from curate.store.reader import StoreReader

BATCH = 20_000
Occurrence = tuple[str | None, int | None, dict[str, Any]]  # source, index, the user's columns


@dataclass(frozen=True)
class Selection:
    """name, recipe, spec (the recipe's `select`), counts (kept, dropped and why)."""

    store: StoreReader
    name: str
    recipe: str | None
    spec: dict[str, Any]
    counts: dict[str, Any]
    created: datetime

    def table(self) -> pl.DataFrame:
        """row_id, kept, rank, reason, rule, value, cut: one line a row, by position."""
        return self.store.sql(
            "SELECT row_id, kept, rank, reason, rule, value, cut FROM selections JOIN data.rows USING (row_id) WHERE selection = ? ORDER BY position",
            [self.name],
        )

    @property
    def control(self) -> Selection | None:
        """The control that was drawn beside it, None where none was."""
        return find_selection(self.store, control_name(self.name)) if self.spec.get("control") else None

    @property
    def holds_more_than_text(self) -> bool:
        """Whether a row, kept or dropped, holds more than texts, or roles and texts: calls of tools, reasoning, tools."""
        text = "SELECT 1 FROM data.rows WHERE template_args IS NOT NULL AND row_id IN (SELECT row_id FROM data.decisions WHERE selection = ?) LIMIT 1"
        with self.store.database.read() as con:
            return one(con, text, [self.name]) is not None

    def kept(self, columns: Sequence[str] = (), *, by_rank: bool = False) -> Iterator[SelectedRow]:
        """The kept rows by position, with the user's columns and those named (columns of `scored`). by_rank: in the order of `order_by`.

        With `duplicates: as_found` a row comes once for every time it occurs in the training sources, each with its own columns.
        """
        decided = self.table().filter("kept")
        if by_rank:
            decided = decided.sort("rank", maintain_order=True)
        yield from self._rows(decided, columns, first=self.spec.get("duplicates", "once") != "as_found")

    def dropped(self, columns: Sequence[str] = ()) -> Iterator[SelectedRow]:
        """The dropped rows with their reasons; then, with `duplicates: once`, further occurrences of rows as "duplicate of …"."""
        import polars as pl

        table = self.table()
        yield from self._rows(table.filter(~pl.col("kept")), columns, first=True)
        if self.spec.get("duplicates", "once") != "as_found":
            yield from self._rows(table.filter(pl.col("kept")), columns, first=False, skip_first=True)

    def to_dataset(self, columns: Sequence[str] = ()) -> Any:
        """The kept rows as a `datasets.Dataset` of TRL's columns, in the style they came in, memory-mapped from `<store>/datasets`.

        Raises ValidationError for rows that have no text here, or of which some are text and some messages.
        """
        from curate.data.exported import ExportRow
        from curate.data.selected import to_dataset

        folder = (
            self.store.folder
            / "datasets"
            / (re.sub(r"\W+", "-", self.name).strip("-") + "-" + content_id(self.name)[:6])
        )
        folder.parent.mkdir(exist_ok=True)
        return to_dataset((ExportRow(kept.row, kept.row_id, kept.columns) for kept in self.kept(columns)), folder)

    def _rows(
        self, decided: pl.DataFrame, columns: Sequence[str], *, first: bool, skip_first: bool = False
    ) -> Iterator[SelectedRow]:
        names, renamed = self._asked(columns)
        if names:
            picked = ", ".join(f"s.{quote(n)} AS {quote(f'+{n}')}" for n in names)
            text = f"SELECT s.row_id, {picked} FROM scored s WHERE s.row_id IN (SELECT d.row_id FROM data.decisions d WHERE d.selection = ?)"
            extra = self.store.sql(text, [self.name], recipe=self.recipe)
            decided = decided.join(extra, on="row_id", how="left", maintain_order="left")
        for start in range(0, len(decided), BATCH):
            if start:
                let_go()  # between long batches others may write
            part = decided[start : start + BATCH]
            ids = part["row_id"].to_list()
            rows = self.store.iter_rows(ids, batch=BATCH)
            with self.store.database.read() as con:
                grouped = _occurrences(con, ids, self.sources(con))
            for row, line in zip(rows, part.iter_rows(named=True), strict=True):
                row_id = line["row_id"]
                asked = {n: line[f"+{n}"] for n in names}
                reason = str(Reason(line["rule"] or "", line["reason"], line["value"], line["cut"]))
                occurrences: list[Occurrence] = grouped.get(row_id) or [(None, None, {})]
                for source, index, own in occurrences[1:] if skip_first else occurrences[:1] if first else occurrences:
                    why = (
                        f"duplicate of {row_id}, which is kept from {occurrences[0][0]}:{occurrences[0][1]}"
                        if skip_first
                        else reason
                    )
                    own = {renamed.get(name, name): value for name, value in own.items()}
                    yield SelectedRow(row_id, row, source, index, {**own, **asked}, line["rank"], why)

    def _asked(self, columns: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The columns of `scored` to fetch beside the user's own, and what those of the user's are called whose names these have."""
        names = [n for n in dict.fromkeys(columns) if n != "row_id"]
        if not names:
            return [], {}
        own = [column for column in self.store.frame(recipe=self.recipe).own["scored"] if not column.imported]
        kept = {c.name for c in own if not c.taken_by}
        names = [n for n in names if n not in kept]
        asked = {n.lower() for n in names}
        return names, {c.name: c.shown for c in own if c.taken_by and c.name.lower() in asked}

    def sources(self, con: Connection) -> list[str] | None:
        """The names of the sources whose training rows were decided on; None for all."""
        if self.recipe is None:
            return None
        roles = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"roles of {self.recipe}"])
        if roles:  # a held-out file of this recipe may be another's to train on
            return list(json.loads(roles[0]).get("train") or []) or None
        recipe = one(con, "SELECT sources FROM data.recipes WHERE name = ?", [self.recipe])
        return list(recipe[0]) if recipe and recipe[0] else None


def _occurrences(con: Connection, row_ids: Sequence[str], sources: list[str] | None) -> dict[str, list[Occurrence]]:
    """row_id -> its training occurrences in reading order: source, index, the user's columns."""
    ids_view(con, row_ids)
    narrowed = "" if sources is None else "AND list_contains(?, o.source)"
    lines = query.dicts(
        con,
        "SELECT o.row_id, o.source, o.index, o.columns FROM data.occurrences o JOIN wanted_ids USING (row_id) "
        f"WHERE o.role = 'train' {narrowed} ORDER BY o.seq",
        [] if sources is None else [sources],
    )
    result: dict[str, list[Occurrence]] = {}
    for line in lines:
        result.setdefault(line["row_id"], []).append(
            (line["source"], line["index"], json.loads(line["columns"] or "{}"))
        )
    return result


def find_selection(store: StoreReader, name: str | None = None) -> Selection:
    """A selection by name; the latest if None. Raises UsageError naming those that exist."""
    with store.database.read() as con:
        known = query.dicts(con, "SELECT * FROM data.selections ORDER BY created DESC, length(name), name")
    chosen = [s for s in known if name is None or s["name"] == name]
    chosen.sort(key=lambda s: "control_of" in json.loads(s["spec"] or "{}"))  # a control is nobody's latest selection
    if not chosen:
        names = ", ".join(s["name"] for s in known)
        asked = f"no selection {name!r}" if name is not None else "no selection"
        hint = f"There are: {names}." if names else "Make one with `curate select RECIPE`."
        raise UsageError(f"{store.folder}: {asked} in this store. {hint}")
    first = chosen[0]
    spec, counts = json.loads(first["spec"] or "{}"), json.loads(first["counts"])
    return Selection(store, first["name"], first["recipe"], spec, counts, first["created"])
