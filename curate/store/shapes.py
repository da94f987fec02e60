"""What a user's column holds, learnt value by value: a SQL type, or a shape of lists and mappings, so that SQL can look into it.

    "VARCHAR" · ["VARCHAR"], a list of text · {"lang": "VARCHAR", "turns": ["BIGINT"]}, a mapping with these keys

Shapes are kept as JSON, in the form that DuckDB's `json_transform` takes. "NULL": nothing known yet. "JSON": too mixed for a shape.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from functools import reduce
from typing import Any

Shape = str | list[Any] | dict[str, Any]
MOST_DEEP = 48  # lists and mappings inside each other; Arrow's schemas end at 64
MOST_KEYS = 64  # a mapping with more keys is a table of its own, not a shape


def shape_of(value: Any, *, inside: bool = False, depth: int = 0) -> Shape:
    """The shape of one value. inside a list or mapping, where times are kept as text; depth: in how many."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "BOOLEAN"
    if isinstance(value, int):
        return "BIGINT" if -(2**63) <= value < 2**63 else "VARCHAR"
    if isinstance(value, float):
        return "DOUBLE"
    if isinstance(value, datetime.datetime) and not inside:
        return "TIMESTAMP"
    if isinstance(value, list | tuple | dict) and depth == MOST_DEEP:
        return "JSON"
    if isinstance(value, list | tuple):
        return [merged_all(shape_of(v, inside=True, depth=depth + 1) for v in value)]
    if isinstance(value, dict):
        return _checked({str(k): shape_of(v, inside=True, depth=depth + 1) for k, v in value.items()})
    return "VARCHAR"


def merged(a: Shape, b: Shape) -> Shape:
    """The narrowest shape that has room for both."""
    if a == b or b == "NULL":
        return a
    if a == "NULL":
        return b
    if "JSON" in (a, b):
        return "JSON"
    if isinstance(a, str) and isinstance(b, str):
        return "DOUBLE" if {a, b} == {"BIGINT", "DOUBLE"} else "VARCHAR"
    if isinstance(a, list) and isinstance(b, list):
        return [merged(a[0], b[0])]
    if isinstance(a, dict) and isinstance(b, dict):
        return _checked({k: merged(a.get(k, "NULL"), b.get(k, "NULL")) for k in (*a, *(k for k in b if k not in a))})
    return "VARCHAR" if isinstance(a, str) or isinstance(b, str) else "JSON"


def merged_all(shapes: Iterable[Shape]) -> Shape:
    nothing: Shape = "NULL"
    return reduce(merged, shapes, nothing)


def _checked(shape: dict[str, Any]) -> Shape:
    """SQL does not see case in a mapping's keys, and knows none without a name."""
    distinct = {key.lower() for key in shape}
    return shape if len(distinct) == len(shape) <= MOST_KEYS and "" not in distinct else "JSON"


def written(shape: Shape) -> str:
    """How a shape is kept."""
    return shape if isinstance(shape, str) else json.dumps(shape, ensure_ascii=False)


def read(text: str) -> Shape:
    """The inverse of `written`."""
    shape: Shape = json.loads(text) if text.startswith(("[", "{")) else text
    return shape


def transform(shape: Shape) -> Shape:
    """The shape for `json_transform`: what is unknown inside stays JSON."""
    if isinstance(shape, list):
        return [transform(shape[0])]
    if isinstance(shape, dict):
        return {key: transform(inner) for key, inner in shape.items()} if shape else "JSON"
    return "JSON" if shape == "NULL" else shape
