"""What a query of the views is about: the recipe, the condition on the occurrences of its rows, and what the store has of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from curate.errors import UsageError, did_you_mean
from curate.store import imports
from curate.store.readings import NO_RECIPE_WAITS, WAITS, any_waits, plain_name
from curate.store.sql import Connection, first_column, literal, literals, one
from curate.store.tables import columns_of

PLACED = "fingerprint, measurement, reads, run, checkpoint, step, model_fingerprint, created"


class Placed(NamedTuple):
    """A line of data.measured."""

    fingerprint: str
    measurement: str
    reads: str
    run: str
    checkpoint: str
    step: int | None
    model_fingerprint: str
    created: Any


class ViewFacts:
    """What a query is about. recipe None: the one registered or scored last. Each thing is asked of the store once, when it is needed.

    uses, plain: fingerprints of the recipe, and those that `scored` shows. only: the condition of `_condition`, "" for all.
    joined: the tables of scores and measurements that `scored` needs, None for all: a query that names its columns reads no others.
    Raises UsageError naming the nearest recipe or source.
    """

    joined: Collection[str] | None = None

    def __init__(self, con: Connection, recipe: str | None = None, sources: Sequence[str] | None = None):
        self.con, self.recipe = con, recipe
        self.tables: dict[str, dict[str, str]] = {}
        self.made: set[str] = set()  # the views that are made already, on this connection
        self.name, self.scores_table, uses, plain = _recipe(con, recipe)
        self.only = _condition(con, recipe, sources)
        visible = literals(dict.fromkeys([*uses, *plain]))
        self.measured = [
            Placed(*line)
            for line in con.execute(
                f"SELECT {PLACED} FROM data.measured WHERE reads = 'import' OR fingerprint IN ({visible})"
            ).fetchall()
        ]
        self.measured.sort(key=lambda m: (m.created, m.fingerprint))
        imported = [m.fingerprint for m in self.measured if m.reads == "import"]
        self.uses = list(dict.fromkeys([*uses, *imported] if recipe is None else uses))
        self.plain = list(dict.fromkeys([*plain, *self._lone_imports(plain)]))

    def _lone_imports(self, plain: Sequence[str]) -> list[str]:
        """Measurements that a program put in once only, so that there is no choice which values a column shows."""
        taken = {m.measurement for m in self.measured if m.fingerprint in plain} | {imports.MEASUREMENT}
        of: dict[str, list[str]] = {}
        for m in self.measured:
            if m.reads == "import" and m.measurement not in taken:
                of.setdefault(m.measurement, []).append(m.fingerprint)
        return [prints[0] for prints in of.values() if len(prints) == 1]

    def columns(self, table: str) -> dict[str, str]:
        """`columns_of` a table."""
        if table not in self.tables:
            self.tables[table] = columns_of(self.con, table)
        return self.tables[table]

    @cached_property
    def any_waits(self) -> bool:
        return any_waits(self.con)

    @cached_property
    def visible(self) -> str:
        """The condition on the sources: readings that wait are seen where they are named alone. "" for all."""
        return self.only or (f"NOT {WAITS}" if self.any_waits else "")

    @property
    def occurring(self) -> str:
        """The occurrences, as a FROM."""
        return f"data.occurrences WHERE {self.visible}" if self.visible else "data.occurrences"

    @cached_property
    def each_once(self) -> bool:
        """Whether these are the rows of one source, each of which occurs there once."""
        return bool(self.only) and occur_once(self.con, self.only)

    @cached_property
    def imported(self) -> list[imports.Import]:
        return imports.listed(self.con)

    @cached_property
    def own_types(self) -> dict[str, list[str]]:
        """The user's columns of the visible sources, in their order -> their types there."""
        where = f"WHERE {self.visible}" if self.visible else ""
        lines = self.con.execute(f"SELECT ordinal, name, type FROM data.source_columns {where}").fetchall()
        types: dict[str, list[str]] = {}
        for _, name, kind in sorted(lines):
            types.setdefault(name, []).append(kind)
        return types


def occur_once(con: Connection, condition: str) -> bool:
    """Whether the occurrences of this condition, on source and role, are of one source's rows, each of which occurs there once."""
    read = con.execute(f"SELECT n_records, n_rows FROM data.source_state WHERE {condition}").fetchall()
    return len(read) == 1 and one(con, f"SELECT count(*), count(*) FROM data.occurrences WHERE {condition}") == read[0]


def _recipe(con: Connection, recipe: str | None) -> tuple[str | None, str | None, list[str], list[str]]:
    """name, table of scores, uses, plain."""
    lines = con.execute(
        f"SELECT name, scores_table, uses, plain, updated FROM data.recipes WHERE {NO_RECIPE_WAITS} OR name = ?",
        [recipe],
    ).fetchall()
    lines.sort(key=lambda line: line[0])
    lines.sort(key=lambda line: line[4], reverse=True)
    for name, table, uses, plain, _ in lines:
        if recipe is None or name == recipe:
            return name, table, list(uses), list(plain)
    if recipe is None:
        return None, None, [], []
    names = [row[0] for row in lines if plain_name(row[0]) == row[0]]
    hint = did_you_mean(recipe, names, f"There are: {', '.join(names) or 'none yet'}.", sentence=True)
    raise UsageError(f"no recipe {recipe!r} in this store. {hint}")


def _condition(con: Connection, recipe: str | None, sources: Sequence[str] | None) -> str:
    """The condition on (source, role) of the occurrences that a narrowed query is about; "" for all.

    A recipe's own: its training rows and its held-out rows, each from where it takes them, whatever another recipe takes from the same file.
    """
    conditions = []
    if recipe is not None:
        noted = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"roles of {recipe}"])
        if noted:
            roles = [(role, names) for role, names in json.loads(noted[0]).items() if names]
            conditions.append(
                " OR ".join(f"(role = {literal(r)} AND source IN ({literals(names)}))" for r, names in roles)
            )
        elif sources is None:  # registered before roles were noted
            names = con.execute("SELECT sources FROM data.recipes WHERE name = ?", [recipe]).fetchall()[0][0]
            conditions.append(f"source IN ({literals(names)})" if names else "")
    if sources is not None:
        _check_sources(con, sources)
        conditions.append(f"source IN ({literals(sources)})")
    return " AND ".join(f"({condition})" for condition in conditions if condition)


def _check_sources(con: Connection, sources: Sequence[str]) -> None:
    known = first_column(
        con, "SELECT source FROM data.occurrences UNION SELECT source FROM data.source_state ORDER BY 1"
    )
    for source in sources:
        if source not in known:
            seen = [name for name in known if plain_name(name) == name]
            hint = did_you_mean(source, known, f"There are: {', '.join(seen) or 'none yet'}.", sentence=True)
            raise UsageError(f"no source {source!r} in this store. {hint}")
