"""A grader of the user's own: package.module:function, which says True or False, or a number with a threshold."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curate.errors import UsageError
from curate.measurements.grading_contract import Grader, NoVerdict
from curate.recipe.objects import load_object, n_positional, source_version
from curate.rows import Row


def grader_of_your_own(spec: str, settings: Any, folder: str | Path | None) -> Grader:
    settings = settings if isinstance(settings, Mapping) else {"threshold": settings}
    unknown = sorted(map(str, set(settings) - {"threshold"}))
    if unknown:
        raise UsageError(f"grader {spec!r}: there is no setting {unknown[0]!r}; a grader of your own takes threshold.")
    threshold = settings.get("threshold")
    if settings and (
        isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold)
    ):
        raise UsageError(f"grader {spec!r}: threshold is {threshold!r}, expected a number.")
    function = load_object(spec, what="grader", folder=folder)
    try:
        takes_row = n_positional(function, 2, 3) == 3
    except TypeError:
        raise UsageError(f"grader {spec!r}: expected a function of (text, answer) or (text, answer, row).") from None

    def same(text: str, answer: str, row: Row | None) -> bool:
        try:
            verdict = function(text, answer, row) if takes_row else function(text, answer)
        except Exception as error:
            raise NoVerdict("failed", f": {type(error).__name__}: {error}") from error
        return _verdict(verdict, spec, threshold)

    return Grader(spec, source_version(function), dict(settings), lambda text: text, same, needs_answer=False)


def _verdict(verdict: Any, spec: str, threshold: float | None) -> bool:
    """What a grader of the user's own says, as right or wrong."""
    kind = type(verdict).__name__
    is_bool = kind in ("bool", "bool_")  # numpy's too
    is_number = not is_bool and isinstance(verdict, numbers.Real) and math.isfinite(verdict)
    if is_bool and threshold is None:
        return bool(verdict)
    if is_number and threshold is not None:
        return bool(verdict >= threshold)
    complaint = f"returned {verdict!r} ({kind})"
    if threshold is not None:
        raise NoVerdict(complaint, f", expected a number to compare with its threshold {threshold:g}.")
    hint = f" For a number say what is right: `grader: {{{spec}: {{threshold: 0.5}}}}`." if is_number else ""
    raise NoVerdict(complaint, f", expected True or False.{hint}")
