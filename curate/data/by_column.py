"""Tables that are stored by columns, turned into rows: how pandas and `datasets` write JSON when nobody says otherwise.

    {prompt: {0: …, 1: …}, chosen: {0: …, 1: …}}      pandas.DataFrame.to_json(), orient="columns"
    {prompt: [a, b], chosen: [c, d]}                  Dataset.to_dict(), DataFrame.to_dict("list")
    {0: {prompt: …, chosen: …}, 1: {…}}               orient="index"
    {columns: [prompt, chosen], index: …, data: [[a, c], [b, d]]}     orient="split" ("tight" has more keys)
    {schema: …, data: [{…}, {…}]}                     orient="table"
    {role: [user, assistant], content: [a, b]}        messages, as `datasets` stores a Sequence of dicts

Such a file is one JSON value, so it is held in memory whole.
"""

from __future__ import annotations

from typing import Any

TEXTS = frozenset(
    ("prompt", "question", "instruction", "messages", "conversations", "chosen", "rejected", "completion")
)
NESTED = frozenset((dict, list, tuple))
ROLES, CONTENTS = ("role", "from"), ("content", "value")


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in ROLES)


def turned_messages(value: Any) -> list[dict[str, Any]] | None:
    """Messages of {role: […], content: […]}; None for anything else."""
    if not isinstance(value, dict) or not all(any(key in value for key in keys) for keys in (ROLES, CONTENTS)):
        return None
    return turned_lists(value)


def turned_lists(table: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of {name: list}, where all lists are of one length; None for anything else."""
    columns = list(table.values())
    if not columns or not all(isinstance(column, (list, tuple)) for column in columns):
        return None
    if len({len(column) for column in columns}) > 1:
        return None
    return [dict(zip(table, cells, strict=True)) for cells in zip(*columns, strict=True)]


def turned(table: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table by columns; None where the value is a row itself."""
    if NESTED.isdisjoint(map(type, table.values())):
        return None
    columns, data = table.get("columns"), table.get("data")
    if isinstance(columns, list) and isinstance(data, list) and all(isinstance(cells, list) for cells in data):
        names = [str(name) for name in columns]
        whole = all(len(cells) == len(names) for cells in data)
        return [dict(zip(names, cells, strict=True)) for cells in data] if whole else None
    if "schema" in table and isinstance(data, list) and all(isinstance(row, dict) for row in data):
        return [{name: cell for name, cell in row.items() if name != "index"} for row in data]
    values = list(table.values())
    if all(isinstance(value, dict) for value in values):
        return _turned_dicts(table)
    if any(is_message(cell) for value in values if isinstance(value, list) for cell in value):
        return None  # a row of messages
    lists = turned_lists(table)
    if len(table) == 1 and lists and (len(lists) == 1 or is_wrapped(table)):
        return None
    return lists


def is_wrapped(value: dict[str, Any]) -> bool:
    """Whether the rows lie inside an object under one name: {data: [{…}, {…}]}."""
    inside = list(value.values())
    rows = inside[0] if len(inside) == 1 and isinstance(inside[0], list) else []
    return bool(rows) and all(isinstance(row, dict) and not is_message(row) for row in rows)


def _turned_dicts(table: dict[str, dict[str, Any]]) -> list[dict[str, Any]] | None:
    keys = list(dict.fromkeys(key for value in table.values() for key in value))
    outer, inner = _are_labels(table), _are_labels(keys)
    if outer and not inner:
        return list(table.values())
    if outer or any(set(value) != set(keys) for value in table.values()) or any(map(is_message, table.values())):
        return None
    if inner or TEXTS & set(table):
        return [{name: column[key] for name, column in table.items()} for key in keys]
    return list(table.values()) if TEXTS & set(keys) else None


def _are_labels(names: Any) -> bool:
    """Whether these are row numbers, as pandas has them by default."""
    return bool(names) and all(str(name).isdigit() for name in names)
