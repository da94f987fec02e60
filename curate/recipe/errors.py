"""What is wrong with a recipe, in words: pydantic's complaints with the file, the line, the key and the nearest right one."""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from curate.errors import did_you_mean, listed

LONGEST_SHOWN = 120  # characters of a value


def lines_of(node: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """(key, key, …) -> line in the file, from the composed YAML."""
    found: dict[tuple[Any, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            found[here] = key.start_mark.line + 1
            found.update(lines_of(value, here))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found[(*path, i)] = value.start_mark.line + 1
            found.update(lines_of(value, (*path, i)))
    return found


def shown_value(value: Any) -> str:
    """A value as a message shows it: its beginning, and its type."""
    if value is None:
        return "nothing"
    shown = (
        repr(value)
        if not isinstance(value, int) or abs(value) < 10**40
        else f"a number of {len(str(abs(value)))} digits"
    )
    return f"{shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN] + '…'} ({type(value).__name__})"


def explained(error: ValidationError, recipe: type[BaseModel], lines: dict[tuple[Any, ...], int], file: str) -> str:
    """One line a key that is wrong. Of a value that may be one of several types, what each of them wanted."""
    wrong: dict[tuple[Any, ...], list[Any]] = {}
    for item in error.errors():
        path = tuple(item["loc"])
        while (
            path
            and path not in lines
            and path[-1] not in _fields(recipe, path[:-1])  # of a key that --set gave, which has no line
            and len(path) > 1
            and not (isinstance(path[-1], int) or item["type"] in ("extra_forbidden", "missing"))
        ):
            path = path[:-1]  # pydantic adds the names of union members
        wrong.setdefault(path, []).append(item)
    return "\n".join(_line(path, items, recipe, lines, file) for path, items in wrong.items())


def _line(
    path: tuple[Any, ...], items: list[Any], recipe: type[BaseModel], lines: dict[tuple[Any, ...], int], file: str
) -> str:
    first, key = items[0], listed([".".join(map(str, path))], longest=LONGEST_SHOWN)
    alone = not any(at[: len(path) - 1] == path[:-1] and len(at) == len(path) for at in lines)  # source: rows.jsonl
    line = lines.get(path) or (lines.get(path[:-1]) if first["type"] == "missing" or alone else None)
    where = f"{file}, line {line}" if line else file
    if first["type"] == "extra_forbidden":
        allowed = _fields(recipe, path[:-1])
        under = f" under {listed(['.'.join(map(str, path[:-1]))], longest=LONGEST_SHOWN)!r}" if path[:-1] else ""
        hint = did_you_mean(str(path[-1]), allowed, f"allowed{under}: {', '.join(allowed)}.", cutoff=0.5)
        return f"{where}: {key!r} is not a key of a recipe; {hint}"
    if first["type"] == "missing":
        return f"{where}: {key!r} is missing."
    texts = list(dict.fromkeys(_sentence(item) for item in items))
    text = " or ".join([texts[0], *(t.removeprefix("input should be ") for t in texts[1:])])
    hidden = isinstance(first["input"], dict | list) or path == ("server", "url")  # an address may hold a password
    value = None if hidden else first["input"]
    shown = f"; found {shown_value(value)}" if value is not None else ""
    return f"{where}: {key + ': ' if key else ''}{text}{shown}."


def _sentence(item: Any) -> str:
    """Pydantic's message without the names of our classes."""
    text = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", item["msg"].removeprefix("Value error, "))
    return text[:1].lower() + text[1:]


def _fields(model: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed at a path of the recipe."""
    inside: Any = model
    for key in path:
        if get_origin(inside) is dict:  # of names that the user gives, such as `targets`
            inside = get_args(inside)[1]
            continue
        if not (isinstance(inside, type) and issubclass(inside, BaseModel) and key in inside.model_fields):
            return []
        annotation = inside.model_fields[key].annotation
        options = [annotation, *get_args(annotation)]
        inside = next(
            (o for o in options if get_origin(o) is dict or (isinstance(o, type) and issubclass(o, BaseModel))), None
        )
    return list(inside.model_fields) if isinstance(inside, type) and issubclass(inside, BaseModel) else []
