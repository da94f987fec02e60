"""Graders: is a sampled answer right?

    gsm8k    the final answer after the last "The answer is", else after the last "####", or the whole text where that is nothing but a value
    number   the last number in the text (a fraction, a time, a tuple is one)
    math     the last \\boxed{…}, else the final answer; equality is mathematical (math-verify): \\frac{1}{2} = 0.5
    choice   the letter that is declared: A, (A), "Answer: B", \\boxed{C}, or the option's own text (grading_choice.py)
    exact    the whole text; runs of whitespace count as one space
    {regex: …}                   the last match's group `answer`, else its group 1
    package.module:function      your own: (text, answer) or (text, answer, row) -> bool
    {package.module:function: {threshold: 0.7}}                  the same -> a number; right is what reaches the threshold

Each is a name, or a name with its settings: {choice: {letters: ABCDE}}, {exact: {ignore_case: true}}, {regex: {pattern: …}}. Text and reference
are read by the same rules (grading_values.py). An answer that a text does not give is wrong, not unknown; a reference that cannot be read makes
it unknown (`readable`). docs/grading.md says more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from curate.errors import UsageError, did_you_mean
from curate.measurements.grading_contract import Grader
from curate.measurements.grading_own import grader_of_your_own
from curate.measurements.grading_rules import RULES
from curate.rows import Row


def grader(
    spec: str | Mapping[str, Any],
    *,
    folder: str | Path | None = None,
    named: Callable[[Row], str] | None = None,
) -> Grader:
    """The grader that a recipe names. folder: where a module of the user's own is looked for too, usually the recipe's. named: how its errors
    name a row, by its id if not given.

    Raises UsageError: an unknown grader (the nearest is offered), unknown settings, a pattern that does not compile or has no group.
    """
    made = _made(spec, folder)
    return made if named is None else replace(made, named=named)


def _made(spec: str | Mapping[str, Any], folder: str | Path | None) -> Grader:
    if isinstance(spec, str):
        name: str = spec
        settings: Any = {}
    elif isinstance(spec, Mapping) and len(spec) == 1:
        name, settings = next(iter(spec.items()))
    else:
        raise UsageError(
            f"grader: expected a name or one name with its settings, such as {{regex: '…'}}; found {spec!r}."
        )
    if ":" in name:
        return grader_of_your_own(name, settings, folder)
    if name not in RULES:
        hint = did_you_mean(name, RULES, cutoff=0.5, after=" ")
        raise UsageError(
            f"there is no grader {name!r}; {hint}there are {', '.join(RULES)}, and package.module:function."
        )
    maker, only = RULES[name]
    if not isinstance(settings, Mapping):
        if only is None:
            raise UsageError(f"grader {name}: it takes no settings; found {settings!r}. Write `grader: {name}`.")
        settings = {only: settings}
    allowed = inspect.signature(maker).parameters
    for key in settings:
        if key not in allowed:
            hint = did_you_mean(str(key), allowed, f"it takes {', '.join(allowed) or 'none'}.", cutoff=0.5)
            raise UsageError(f"grader {name}: there is no setting {key!r}; {hint}")
        if isinstance(allowed[key].default, bool) and not isinstance(settings[key], bool):
            raise UsageError(f"grader {name}: {key} is {settings[key]!r}, expected true or false.")
    missing = [k for k, p in allowed.items() if p.default is p.empty and k not in settings]
    if missing:
        raise UsageError(f"grader {name}: {missing[0]!r} is missing; write `grader: {{{name}: …}}`.")
    return maker(**settings)
