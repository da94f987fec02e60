"""Perturbations of a problem by a function of the user's own, which `sampling.perturb` names: package.module:function.

    def other_numbers(prompt, answer):            # or (prompt, answer, row)
        return ["…", ("…", "7")]                  # changed prompts; with its own answer where that changes too

It is given a problem's text (of messages the last user message) and its answer, and returns changed texts, each alone or with its answer:
one, a list, or an empty list where it knows none. It must say the same of the same row: what it says is not kept, answers to it are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import UsageError
from curate.recipe.objects import load_object, n_positional, source_version
from curate.rows import Example, Text, text_of


@dataclass(frozen=True)
class Perturbation:
    """A function that changes problems. version: of its source, so that answers to other perturbations are not taken for these."""

    name: str
    version: str
    function: Callable[..., Any]
    takes_row: bool

    @property
    def fingerprint(self) -> str:
        return f"{self.name}/{self.version}"

    def of(self, row: Example) -> list[Example]:
        """The row's perturbations, in the function's order; those that change nothing are left out. UsageError where the function fails."""
        problem, with_problem = _problem(row.prompt)
        given = (problem, row.answer, row) if self.takes_row else (problem, row.answer)
        try:
            returned = self.function(*given)
        except Exception as error:
            raise UsageError(
                f"perturb {self.name!r} failed on row {row.row_id}: {type(error).__name__}: {error}"
            ) from error
        changed = []
        for one in returned if isinstance(returned, list) else [returned]:
            text, answer = one if isinstance(one, tuple) and len(one) == 2 else (one, row.answer)
            if not isinstance(text, str) or not isinstance(answer, str | None):
                raise UsageError(
                    f"perturb {self.name!r} returned {one!r} for row {row.row_id}, expected a text, (text, answer), or a list of these."
                )
            if (text, answer) != (problem, row.answer):
                changed.append(Example(with_problem(text), None, answer, template_args=row.template_args))
        return changed


def perturbation(spec: str, *, folder: str | Path | None = None) -> Perturbation:
    """The function that a recipe names. folder: where its module is looked for too. UsageError where it is not there, or takes something else."""
    function = load_object(spec, what="perturb", folder=folder)
    try:
        takes_row = n_positional(function, 2, 3) == 3
    except TypeError:
        raise UsageError(
            f"perturb {spec!r}: expected a function of (prompt, answer) or (prompt, answer, row)."
        ) from None
    return Perturbation(spec, source_version(function), function, takes_row)


def _problem(prompt: Text) -> tuple[str, Callable[[str], Text]]:
    """A prompt's problem, and the prompt with another problem in its place."""
    if isinstance(prompt, str):
        return prompt, lambda text: text
    at = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=len(prompt) - 1)
    return text_of(prompt[at]), lambda text: (*prompt[:at], {**prompt[at], "content": text}, *prompt[at + 1 :])
