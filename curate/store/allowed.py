"""What SQL that a user writes may do: read the store, and nothing else.

A statement is parsed by DuckDB before it runs, and everything in it has to be on a list: queries of tables and views, and the table functions that
read what they are given. What this could miss the engine refuses (`engines.py`). A rule of a recipe has to repeat, too: nothing in it may
depend on chance, the clock or the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import duckdb

from curate.errors import UsageError
from curate.store import syntax
from curate.store.sql import Connection
from curate.store.syntax import Node

READ_ONLY = "a store is only read through SQL: use SELECT. What a store keeps is written by curate's own commands."
PIVOT = "PIVOT needs its values here: `ON topic IN ('maths', 'code')`."
STORE_ALONE = "SQL here reads the store alone: no files, no addresses, no settings."
ONE = "expected one SQL expression, whose brackets and quotes end inside it."
QUERIES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
TABLE_FUNCTIONS = {  # that read what they are given, or the catalog
    *("range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree", "summary"),
    *("histogram", "histogram_values", "pragma_table_info", "pragma_show", "pg_timezone_names", "icu_calendar_names"),
    *("duckdb_columns", "duckdb_tables", "duckdb_views", "duckdb_schemas", "duckdb_functions", "duckdb_types"),
    *("duckdb_keywords", "duckdb_constraints", "duckdb_indexes"),
}
NEVER = {"write_log", "sleep_ms", "pg_sleep", "setval", "nextval"}  # functions that do something, or nothing for long
PATH = re.compile(r"[/\\:*?]|\.\w+$")  # no table or view of a store is called so

RANDOM = {"random", "setseed", "uuid", "gen_random_uuid", "uuidv4", "uuidv7", "nextval"}
CLOCK = {
    *("now", "today", "ago", "get_current_time", "get_current_timestamp", "transaction_timestamp"),
    *("current_localtime", "current_localtimestamp", "pg_postmaster_start_time", "pg_conf_load_time"),
}
CLOCK_WORDS = {  # SQL's words, read as columns
    "current_date",
    "current_time",
    "current_timestamp",
    "localtime",
    "localtimestamp",
}
MACHINE = {
    *("current_setting", "current_query", "current_query_id", "current_transaction_id", "current_connection_id"),
    *("txid_current", "getvariable", "getenv", "version", "stats"),
}


def check_query(con: Connection, text: str) -> None:
    """Refuse what is no query of the store. Raises UsageError, and duckdb.Error for what does not parse."""
    for statement in con.extract_statements(text):
        query = statement.query
        if statement.type == duckdb.StatementType.EXPLAIN:
            query = re.sub(r"(?is)^\s*explain\s+(analyze\s+)?(\([^()]*\)\s*)?", "", query)
        elif statement.type != duckdb.StatementType.SELECT:
            raise UsageError(PIVOT if re.search(r"(?i)\bpivot\b", query) else READ_ONLY)
        tree = syntax.parse(con, query)
        if tree is None:
            raise UsageError(PIVOT if re.search(r"(?i)\bpivot\b", query) else READ_ONLY)
        for problem in _problems(tree):
            raise UsageError(problem)


def check_rule(con: Connection, tree: Node, key: str, columns: list[str]) -> None:
    """Refuse a recipe's expression, parsed as `SELECT (…) FROM scored`, that is more than one expression, or would not repeat."""
    top = tree["statements"][0]["node"]
    alone = (
        top.get("type") == "SELECT_NODE"
        and len(top["select_list"]) == 1
        and (top.get("from_table") or {}).get("table_name") == "scored"
        and not any(top.get(part) for part in ("where_clause", "group_expressions", "having", "qualify", "modifiers"))
    )
    if not alone or top["select_list"][0].get("function_name") == "row":  # "a, b" in brackets is a row
        raise UsageError(f"{key}: {ONE}")
    for problem in _problems(tree):
        raise UsageError(f"{key}: {problem}")
    for problem in _unrepeated(tree, {name.lower() for name in columns}):
        raise UsageError(f"{key}: {problem}")


def check_brackets(con: Connection, text: str, key: str) -> None:
    """Refuse a recipe's expression that ends our SELECT and begins another."""
    if syntax.parse(con, f"SELECT (\n{text}\n)") is not None:
        raise UsageError(f"{key}: {ONE}")


def refused(error: duckdb.Error) -> UsageError | None:
    """What the engine refused, in the user's words; None for any other error."""
    if isinstance(error, duckdb.PermissionException) or "configuration has been locked" in str(error):
        return UsageError(STORE_ALONE)
    called = re.search(r'Function "(\w+)" is a table function', str(error))
    if called and called[1].lower() not in TABLE_FUNCTIONS:
        return UsageError(f"{called[1]}() is no function of a store. {STORE_ALONE}")
    return UsageError(READ_ONLY) if "read-only mode" in str(error) else None


def _problems(tree: Any) -> Iterator[str]:
    """A sentence for everything in a statement that is not on the lists."""
    names = _cte_names(tree)
    for node in _nodes(tree):
        kind = str(node.get("type", ""))
        if kind.endswith("_NODE") and kind not in QUERIES:
            yield READ_ONLY
        elif kind == "TABLE_FUNCTION":
            called = str((node.get("function") or {}).get("function_name", "")).lower()
            if called not in TABLE_FUNCTIONS:
                yield f"{called}() is no table of a store. {STORE_ALONE}"
        elif kind in ("BASE_TABLE", "SHOW_REF"):
            table = str(node.get("table_name") or "")
            if PATH.search(table) and table.lower() not in names:
                yield f"{table!r} is no table of a store. {STORE_ALONE}"
        elif node.get("class") == "FUNCTION" and str(node.get("function_name", "")).lower() in NEVER:
            yield f"{node['function_name']}() reads nothing. {STORE_ALONE}"


def _unrepeated(tree: Any, columns: set[str]) -> Iterator[str]:
    """A sentence for everything in a rule that makes another selection another time, or elsewhere."""
    for node in _nodes(tree):
        name = str(node.get("function_name", "")).lower() if node.get("class") == "FUNCTION" else ""
        if node.get("class") == "COLUMN_REF" and len(node["column_names"]) == 1:
            word = str(node["column_names"][0]).lower()
            name = word if word in CLOCK_WORDS - columns else ""
        sample = node.get("sample")
        if name in RANDOM:
            yield (
                f"{name}() gives another selection every time. For an order that is random and can be repeated: "
                "`order_by: random`, with `seed`."
            )
        elif isinstance(sample, dict) and not sample.get("repeatable"):
            yield "a sample is another one every time. Rows drawn at random that can be repeated: `order_by: random`, with `seed`, and `keep`."
        elif name in CLOCK | CLOCK_WORDS or (name == "age" and len(node.get("arguments", ())) == 1):
            yield f"{name} is another time in every run. Write the date that is meant: `DATE '2026-01-31'`."
        elif name in MACHINE:
            yield f"{name}() depends on the machine and the moment, so the selection would not repeat. Write the value that is meant."


def _cte_names(tree: Any) -> set[str]:
    names: set[str] = set()
    for node in _nodes(tree):
        if isinstance(node.get("cte_map"), dict):
            names |= {str(entry.get("key", "")).lower() for entry in node["cte_map"].get("map", [])}
    return names


def _nodes(tree: Any) -> Iterator[Node]:
    """Every mapping of a tree, without recursion: an expression may be deep."""
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield here
            waiting.extend(reversed([value for value in here.values() if isinstance(value, dict | list)]))
        elif isinstance(here, list):
            waiting.extend(reversed(here))
