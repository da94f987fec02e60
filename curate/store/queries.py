"""The store, asked in SQL: queries of its views, and checks of a recipe's expressions over `scored`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.store import conjuncts, misread, query, syntax, views
from curate.store.database import DATABASE, Database
from curate.store.narrowing import ViewFacts
from curate.store.shards import Shards
from curate.store.sql import Connection

if TYPE_CHECKING:
    import polars as pl


class StoreQueries:
    """A store's folder, as its views are queried. Every method opens the database for one short transaction. See `Store`."""

    def __init__(
        self, folder: str | Path, *, patience: float | None = None, on_wait: Callable[[str], None] | None = None
    ):
        self.folder = Path(folder)
        self.database = Database(self.folder / DATABASE, patience=patience, on_wait=on_wait)
        self.shards = Shards(self.folder / "shards")
        self._waiting: dict[str, list[str]] = {}  # source -> its readings that this object sees in its place

    def _see(self, source: str, reading: str) -> None:
        seen = self._waiting.setdefault(source, [])
        if reading not in seen:
            seen.append(reading)

    def _read_as(self, names: Sequence[str] | None) -> list[str] | None:
        """Sources as the tables have them for this object."""
        return None if names is None else [kept for name in names for kept in self._waiting.get(name, [name])]

    def sql(
        self,
        text: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        recipe: str | None = None,
        source: str | Sequence[str] | None = None,
        names_columns: bool = False,
    ) -> pl.DataFrame:
        """Query the views; reading only. recipe, source: narrow every view to a recipe (its sources, scores and fingerprints) or to sources.
        names_columns: the text names all columns of `scored` that it reads (no `*`), so that the tables of others are left alone.

        Raises UsageError for SQL that does not parse or names no column (the nearest is named), or that wants to write.
        """
        names = self._read_as((source,) if isinstance(source, str) else source)
        with self.database.read() as con:
            if recipe is not None or names is not None or self.database.is_in_transaction or views.outdated(con):
                con = self._narrowed(con, text, recipe, names, names_columns=names_columns).con
            return query.run(con, text, params)

    def _narrowed(
        self,
        con: Connection,
        text: str,
        recipe: str | None,
        sources: Sequence[str] | None = None,
        *,
        names_columns: bool = False,
    ) -> ViewFacts:
        """What a query is about, and the connection that has the views so that it is."""

        def facts(joined: frozenset[str] | None) -> ViewFacts:
            key = (recipe, None if sources is None else tuple(sources), joined)
            kept = self.database.cached(key, lambda con: ViewFacts(con, recipe, sources))
            kept = kept or ViewFacts(con, recipe, sources)
            kept.joined = joined
            return kept

        whole = facts(None)
        return views.narrow(facts(views.tables_named(whole, text)) if names_columns else whole, text)

    def own_names(self) -> dict[str, str]:
        """The user's columns -> what `occurrences` calls them."""
        with self.database.read() as con:
            return {column.name: column.shown for column in views.own_names(ViewFacts(con))["occurrences"]}

    def frame(self, *, recipe: str | None = None, planned: Collection[str] = ()) -> misread.Frame:
        """What a recipe's SQL sees as `scored`, with the columns that are still to come (`planned`) as NULL."""
        with self.database.read() as con:
            return misread.frame(self._narrowed(con, "scored", recipe), planned)

    def check_sql(
        self, text: str, key: str, *, recipe: str | None = None, planned: Collection[str] = (), is_order: bool = False
    ) -> str:
        """A recipe's SQL expression over `scored`, as it is to be asked. is_order: rows are ordered by its value.

        Raises UsageError naming `key` for a name that two columns have, and where numbers would be ordered as text.
        """
        with self.database.read() as con:
            facts = self._narrowed(con, f"scored occurrences {text}", recipe)
            return misread.checked(facts.con, text, key, misread.frame(facts, planned), is_order=is_order)

    def numbers_in(self, column: str, *, recipe: str | None = None) -> misread.Numbers | None:
        """Of a column of `scored` that is text: which of it are numbers, and the cast that reads them. None where less than half are."""
        with self.database.read() as con:
            facts = self._narrowed(con, "scored", recipe)
            return misread.numbers_in(facts.con, misread.quoted(column), "scored")

    def conjuncts(self, where: str) -> list[conjuncts.Conjunct]:
        """The parts of a condition that AND joins, with what they compare."""
        with self.database.read() as con:
            return conjuncts.conjuncts(con, where)

    def unclear_names(self, text: str, *, recipe: str | None = None) -> list[str]:
        """A sentence for every name in a query that curate and the user have a column of; what it means is curate's."""
        with self.database.read() as con:
            tree = syntax.parse(con, text)
            return list(misread.ambiguous(con, tree, views.own_names(ViewFacts(con, recipe)))) if tree else []

    def scored(self, *, recipe: str | None = None, source: str | Sequence[str] | None = None) -> pl.DataFrame:
        """The view `scored`, one line a row, by position."""
        return self.sql("SELECT * FROM scored ORDER BY position", recipe=recipe, source=source)
