"""Imported columns as the view `scored` shows them: which fingerprints a column's values are from, and the SQL that lays them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from curate.store.imports import VALUES, Import
from curate.store.sql import literal, literals, quote


def shown(imports: Sequence[Import]) -> dict[str, list[str]]:
    """column -> the fingerprints whose values `scored` shows, the latest import's last: those that name no run and no checkpoint, else the only
    one there is. A column of several checkpoints is in `trajectories` alone.
    """
    without_run: dict[str, list[str]] = {}
    placed: dict[str, set[str]] = {}
    for one in imports:
        for column in one.columns if one.fingerprints else ():
            if one.per_row:
                prints = without_run.setdefault(column, [])
                prints[:] = [*(p for p in prints if p not in one.fingerprints), *one.fingerprints]
            else:
                placed.setdefault(column, set()).update(one.fingerprints)
    names = dict.fromkeys(column for one in imports for column in one.columns)
    lone = {column: list(prints) for column, prints in placed.items() if len(prints) == 1}
    return {
        column: without_run.get(column) or lone[column] for column in names if column in without_run or column in lone
    }


def shown_table(columns: Mapping[str, Sequence[str]]) -> str:
    """SQL of a table with row_id and each of these columns; of several fingerprints the value of the last that has one."""
    picked = []
    for column, prints in columns.items():
        if len(prints) == 1:
            picked.append(
                f"any_value({quote(column)}) FILTER (WHERE fingerprint = {literal(prints[0])}) AS {quote(column)}"
            )
        else:
            place = " ".join(f"WHEN {literal(p)} THEN {i}" for i, p in enumerate(prints))
            picked.append(f"arg_max({quote(column)}, CASE fingerprint {place} END) AS {quote(column)}")
    every = literals(dict.fromkeys(print for prints in columns.values() for print in prints))
    table = f"data.{quote(VALUES)}"
    return f"SELECT row_id, {', '.join(picked)} FROM {table} WHERE fingerprint IN ({every}) GROUP BY row_id"


def worst_ends(imports: Sequence[Import]) -> dict[str, Literal["high", "low"]]:
    """column -> the end that its import called bad, the latest that did."""
    return {column: end for one in imports for column, end in one.worst.items()}
