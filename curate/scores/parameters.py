"""Parameters of a score: what its keyword-only arguments may be, and the errors when a recipe gives something else."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from curate.errors import UsageError


@dataclass(frozen=True, slots=True)
class Range:
    """What a number may be: low..high, both included unless `above` (low itself is then out)."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        high = "" if self.high == math.inf else f"at most {self.high:g}"
        return " and ".join(part for part in (low, high) if part)


Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A keyword-only argument of a score. default is inspect.Parameter.empty where there is none; type None means anything."""

    name: str
    default: Any
    type: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def checked(value: Any, annotation: Any, where: str) -> Any:
    """value as the type wants it (a whole number as a float where a float is wanted), or UsageError."""
    if annotation is None or annotation is Any:
        return value
    if get_origin(annotation) is Annotated:
        annotation, *limits = get_args(annotation)
        value = checked(value, annotation, where)
        for limit in limits:
            if isinstance(limit, Range) and not limit.holds(value):
                raise UsageError(f"{where} is {value!r}, expected a number {limit}.")
        return value
    if get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            try:
                return checked(value, option, where)
            except UsageError as error:
                if get_origin(option) is Annotated and isinstance(value, int | float) and not isinstance(value, bool):
                    raise error from None  # the right type, out of range: say that
        raise UsageError(f"{where} is {value!r} ({type(value).__name__}), expected {_shown(annotation)}.")
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    bare_type = get_origin(annotation) or annotation
    if bare_type in (dict, Mapping) and isinstance(value, Mapping) and len(get_args(annotation)) == 2:
        _, of_values = get_args(annotation)
        return {str(key): checked(item, of_values, f"{where}.{key}") for key, item in value.items()}
    if (
        bare_type is not float
        and isinstance(bare_type, type)
        and isinstance(value, bare_type)
        and (bare_type is bool or not isinstance(value, bool))
    ):
        return value
    if bare_type is Literal and value in get_args(annotation):
        return value
    if not isinstance(bare_type, type) and bare_type is not Literal:
        return value  # a type that only its author understands
    raise UsageError(f"{where} is {value!r} ({type(value).__name__}), expected {_shown(annotation)}.")


def _shown(annotation: Any) -> str:
    names = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        dict: "a mapping",
        list: "a list",
        type(None): "nothing",
    }
    if get_origin(annotation) is Annotated:
        return _shown(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_shown(option) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    return names.get(get_origin(annotation) or annotation, getattr(annotation, "__name__", str(annotation)))
