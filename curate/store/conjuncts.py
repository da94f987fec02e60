"""The parts of a condition that `AND` joins: which of them is false for a row, and by which number."""

from __future__ import annotations

from dataclasses import dataclass

from curate.store import syntax
from curate.store.sql import Connection
from curate.store.syntax import Node

EXACT = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "DOUBLE")
PREFIX = "SELECT (\n"
NUMBERS = "('TINYINT', 'SMALLINT', 'INTEGER', 'BIGINT', 'HUGEINT', 'UTINYINT', 'USMALLINT', 'UINTEGER', 'UBIGINT', 'DOUBLE', 'FLOAT')"


@dataclass(frozen=True)
class Conjunct:
    """text: as the user wrote it. value, cut: SQL of what is compared and of the bound; NULL where it compares nothing."""

    text: str
    value: str = "NULL"
    cut: str = "NULL"


def conjuncts(con: Connection, where: str) -> list[Conjunct]:
    """The parts of `where` in their order; [] for what does not parse."""
    tree = syntax.parse(con, f"{PREFIX}{where}\n) FROM scored")
    if tree is None:
        return []
    return [_conjunct(con, where, part) for part in _flat(tree["statements"][0]["node"]["select_list"][0])]


def _flat(part: Node) -> list[Node]:
    if part.get("type") != "CONJUNCTION_AND":
        return [part]
    return [inner for child in part["children"] for inner in _flat(child)]


def _conjunct(con: Connection, where: str, part: Node) -> Conjunct:
    start = part.get("query_location", 0) - len(PREFIX.encode())
    written = where.encode()[start : start + part.get("query_location_length", 0)] if start >= 0 else b""
    text = " ".join(written.decode(errors="ignore").split()) or syntax.text_of(con, part)
    if part.get("class") == "BETWEEN":
        value, low, high = (syntax.text_of(con, part[side]) for side in ("input", "lower", "upper"))
        return Conjunct(text, value, f"CASE WHEN {value} < {low} THEN {low} ELSE {high} END")
    if part.get("class") != "COMPARISON":
        return Conjunct(text)
    left, right = part["left"], part["right"]
    if left.get("class") == "CONSTANT":
        left, right = right, left
    return Conjunct(text, syntax.text_of(con, left), syntax.text_of(con, right))


def as_number(sql: str, type_name: str = "") -> str:
    """SQL of the value where it is a number or a decimal, else of NULL. type_name: its SQL type, where that is known: then it is read as it is."""
    if type_name in EXACT:
        return f"({sql})::DOUBLE"
    kind = f"typeof({sql})"
    return (
        f"CASE WHEN {kind} IN {NUMBERS} OR starts_with({kind}, 'DECIMAL') THEN TRY_CAST(({sql})::VARCHAR AS DOUBLE) END"
    )
