"""What a query of the views is about: the recipe, and the condition on the occurrences of its rows."""

from __future__ import annotations

import json
from collections.abc import Sequence

from curate.errors import UsageError, did_you_mean
from curate.store.readings import NO_RECIPE_WAITS, WAITS, any_waits, plain_name
from curate.store.sql import Connection, first_column, literal, literals, one


def recipe_of(con: Connection, recipe: str | None) -> tuple[str | None, str | None, list[str], list[str]]:
    lines = con.execute(
        f"SELECT name, scores_table, uses, plain FROM data.recipes WHERE {NO_RECIPE_WAITS} OR name = ? ORDER BY updated DESC, name",
        [recipe],
    ).fetchall()
    for name, table, uses, plain in lines:
        if recipe is None or name == recipe:
            return name, table, list(uses), list(plain)
    if recipe is None:
        return None, None, [], []
    names = [row[0] for row in lines if plain_name(row[0]) == row[0]]
    hint = did_you_mean(recipe, names, f"There are: {', '.join(names) or 'none yet'}.", sentence=True)
    raise UsageError(f"no recipe {recipe!r} in this store. {hint}")


def condition_of(con: Connection, recipe: str | None, sources: Sequence[str] | None) -> str:
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


def visible(con: Connection, only: str) -> str:
    """The condition on the sources that a query is about: readings that wait are seen where they are named alone. "" for all."""
    return only or (f"NOT {WAITS}" if any_waits(con) else "")


def occurring(con: Connection, only: str) -> str:
    seen = visible(con, only)
    return f"data.occurrences WHERE {seen}" if seen else "data.occurrences"


def _check_sources(con: Connection, sources: Sequence[str]) -> None:
    known = first_column(
        con, "SELECT source FROM data.occurrences UNION SELECT source FROM data.source_state ORDER BY 1"
    )
    for source in sources:
        if source not in known:
            seen = [name for name in known if plain_name(name) == name]
            hint = did_you_mean(source, known, f"There are: {', '.join(seen) or 'none yet'}.", sentence=True)
            raise UsageError(f"no source {source!r} in this store. {hint}")
