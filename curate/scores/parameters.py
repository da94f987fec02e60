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


def checked(value: Any, wanted: Any, where: str) -> Any:
    """value as the type wants it (a whole number as a float where a float is wanted), or UsageError."""
    if wanted is None or wanted is Any:
        return value
    if get_origin(wanted) is Annotated:
        wanted, *limits = get_args(wanted)
        value = checked(value, wanted, where)
        for limit in limits:
            if isinstance(limit, Range) and not limit.holds(value):
                raise UsageError(f"{where} is {value!r}, expected a number {limit}.")
        return value
    if get_origin(wanted) in (Union, types.UnionType):
        for option in get_args(wanted):
            try:
                return checked(value, option, where)
            except UsageError as error:
                if get_origin(option) is Annotated and isinstance(value, int | float) and not isinstance(value, bool):
                    raise error from None  # the right type, out of range: say that
        raise UsageError(f"{where} is {value!r} ({type(value).__name__}), expected {_shown(wanted)}.")
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    plain = get_origin(wanted) or wanted
    if plain in (dict, Mapping) and isinstance(value, Mapping) and len(get_args(wanted)) == 2:
        _, of_values = get_args(wanted)
        return {str(key): checked(item, of_values, f"{where}.{key}") for key, item in value.items()}
    if (
        plain is not float
        and isinstance(plain, type)
        and isinstance(value, plain)
        and (plain is bool or not isinstance(value, bool))
    ):
        return value
    if plain is Literal and value in get_args(wanted):
        return value
    if not isinstance(plain, type) and plain is not Literal:
        return value  # a type that only its author understands
    raise UsageError(f"{where} is {value!r} ({type(value).__name__}), expected {_shown(wanted)}.")


def _shown(wanted: Any) -> str:
    names = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        dict: "a mapping",
        list: "a list",
        type(None): "nothing",
    }
    if get_origin(wanted) is Annotated:
        return _shown(get_args(wanted)[0])
    if get_origin(wanted) in (Union, types.UnionType):
        return " or ".join(_shown(option) for option in get_args(wanted))
    if get_origin(wanted) is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    return names.get(get_origin(wanted) or wanted, getattr(wanted, "__name__", str(wanted)))
