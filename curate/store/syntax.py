"""What a piece of SQL consists of: DuckDB's own parse of it, with the tables that each part can see.

The tree is the one of DuckDB's `json_serialize_sql`: mappings and lists, a mapping for each expression with its `class` and `type`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from curate.store.sql import Connection

Node = dict[str, Any]


@dataclass
class Scope:
    """One SELECT of a query: its tables (name or alias, in lower case -> the view; None for anything else) and the names its lambdas bind."""

    node: Node
    outer: Scope | None = None
    tables: dict[str, str | None] = field(default_factory=dict)
    bound: frozenset[str] = frozenset()

    def chain(self) -> Iterator[Scope]:
        here: Scope | None = self
        while here is not None:
            yield here
            here = here.outer


def parse(con: Connection, text: str) -> Node | None:
    """The tree of one SELECT statement; None for what does not parse, or is another statement: running it says what is wrong."""
    tree = json.loads(con.execute("SELECT json_serialize_sql(?::VARCHAR)", [text]).fetchall()[0][0])
    return None if tree.get("error") or len(tree.get("statements", [])) != 1 else tree


def text_of(con: Connection, expression: Node) -> str:
    """An expression as SQL."""
    return _written(con, "SELECT 1", select_list=[expression]).removeprefix("SELECT ")


def from_text(con: Connection, scope: Scope) -> str:
    """The FROM of a SELECT as SQL, without the word."""
    return _written(con, "SELECT * FROM scored", from_table=scope.node["from_table"]).removeprefix("SELECT * FROM ")


def _written(con: Connection, like: str, **changes: Any) -> str:
    """A statement like this one, with other parts, as SQL."""
    tree = parse(con, like)
    assert tree is not None
    tree["statements"][0]["node"].update(changes)
    return str(con.execute("SELECT json_deserialize_sql(?::JSON)", [json.dumps(tree)]).fetchall()[0][0]).rstrip(";")


def parts(tree: Node) -> Iterator[tuple[Node, Scope]]:
    """Every part of a statement, outer ones first, with the SELECT that it stands in."""
    statement = tree["statements"][0]["node"]
    yield from _parts(statement, Scope({}), _cte_names(statement))


def column_of(part: Node, scope: Scope) -> str | None:
    """The name of the column that a part refers to without saying of which table; None where it says so, or is no reference."""
    if part.get("class") != "COLUMN_REF":
        return None
    names = part["column_names"]
    first = str(names[0]).lower()
    if len(names) > 1 and any(first in s.tables for s in scope.chain()):
        return None
    return None if any(first in s.bound for s in scope.chain()) else str(names[0])


def _parts(node: Any, scope: Scope, ctes: frozenset[str]) -> Iterator[tuple[Node, Scope]]:
    if isinstance(node, list):
        for item in node:
            yield from _parts(item, scope, ctes)
        return
    if not isinstance(node, dict):
        return
    if node.get("type") == "SELECT_NODE":
        scope = Scope(node, scope)
        scope.tables = dict(_tables(node.get("from_table"), ctes))
    elif node.get("class") == "LAMBDA":
        names = [str(p["column_names"][0]).lower() for p in _references(node.get("lhs"))]
        scope = Scope(scope.node, scope.outer, scope.tables, scope.bound | set(names))
    yield node, scope
    for value in node.values():
        if isinstance(value, dict | list):
            yield from _parts(value, scope, ctes)


def _references(node: Any) -> Iterator[Node]:
    if isinstance(node, list):
        for item in node:
            yield from _references(item)
    elif isinstance(node, dict):
        if node.get("class") == "COLUMN_REF":
            yield node
        for value in node.values():
            yield from _references(value)


def _tables(table: Any, ctes: frozenset[str]) -> Iterator[tuple[str, str | None]]:
    if not isinstance(table, dict):
        return
    alias = str(table.get("alias") or "").lower()
    if table.get("type") == "BASE_TABLE":
        name = str(table["table_name"]).lower()
        yield alias or name, None if name in ctes else name
    elif table.get("type") == "JOIN":
        yield from _tables(table.get("left"), ctes)
        yield from _tables(table.get("right"), ctes)
    elif table.get("type") == "SUBQUERY":
        inner = (table.get("subquery") or {}).get("node") or {}
        whole = any(item.get("class") == "STAR" for item in inner.get("select_list", []) if isinstance(item, dict))
        views = [view for _, view in _tables(inner.get("from_table"), ctes)] if whole else []
        yield alias, views[0] if len(views) == 1 else None
    elif table.get("type") != "EMPTY":
        yield alias, None


def _cte_names(node: Any) -> frozenset[str]:
    names: set[str] = set()
    if isinstance(node, list):
        for item in node:
            names |= _cte_names(item)
    elif isinstance(node, dict):
        if isinstance(node.get("cte_map"), dict):
            names |= {str(entry.get("key", "")).lower() for entry in node["cte_map"].get("map", [])}
        for value in node.values():
            names |= _cte_names(value)
    return frozenset(names)
