"""SQL by hand: how a name and a text are written in a query, and small answers fetched whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import duckdb

Connection = duckdb.DuckDBPyConnection


def quote(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """An SQL string."""
    return "'" + text.replace("'", "''") + "'"


def literals(texts: Iterable[str] | None) -> str:
    """SQL strings for `IN (…)`; of none NULL, which nothing is in."""
    return ", ".join(literal(text) for text in texts or ()) or "NULL"


def after_all(table: str, column: str) -> str:
    """SQL of the time now, or of one just behind all times in a table's column: the last is the last, on a clock that was set back, too."""
    return f"(SELECT greatest(now()::TIMESTAMP, coalesce(max({column}) + INTERVAL 1 MICROSECOND, now()::TIMESTAMP)) FROM {table})"


def json_pointer(name: str) -> str:
    """A key of a JSON object, as DuckDB's JSON functions take it."""
    return literal("/" + name.replace("~", "~0").replace("/", "~1"))


def first_column(con: Connection, text: str, params: Sequence[Any] = ()) -> list[Any]:
    """The first column of a result, fetched whole."""
    return [row[0] for row in con.execute(text, list(params)).fetchall()]


def one(con: Connection, text: str, params: Sequence[Any] = ()) -> tuple[Any, ...] | None:
    """The first line of a result, fetched whole: an unfinished result makes the connection's next query fail."""
    lines = con.execute(text, list(params)).fetchall()
    return lines[0] if lines else None
