"""The tokens pass: lengths, truncation, what a template leaves out. No model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.console import Progress
from curate.plan.rendered_rows import LOOKED_AT, lost_text
from curate.plan.step import Step
from curate.rows import Row
from curate.workflow.runners.base import TEXT, Runner

if TYPE_CHECKING:
    from curate.recipe.load import Loaded


class TokensRunner(Runner):
    """Token counts, edit distance, and what truncation does: no model is run."""

    reads = "tokens"
    extra_columns = ("token_problem",)

    def __init__(self, loaded: Loaded, progress: Progress):
        super().__init__(loaded, progress)
        self.left_out: Counter[str] = Counter()
        self.name = ""
        self.truncated = self.problems = self.prompts = self.seen = self.alike = 0

    def use(self, step: Step) -> None:
        super().use(step)
        self.name = step.checkpoint.label

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.measurements import measure_tokens
        from curate.passes.tokens import NO_COMPLETION

        encoded = self._encode(rows)
        columns: dict[str, Any] = dict(measure_tokens(encoded, measurements))
        columns["token_problem"] = np.array([e.problem for e in encoded], TEXT)
        self.seen += len(encoded)
        self.truncated += sum(e.truncated for e in encoded)
        self.problems += sum(e.problem not in (None, NO_COMPLETION) for e in encoded)
        self.prompts += sum(e.problem == NO_COMPLETION for e in encoded)
        self.alike += sum(getattr(e, "cut_alike", False) for e in encoded)
        self.left_out.update(who for e in encoded for who in e.left_out)
        return columns, None, int(np.nansum([np.nansum(v) for k, v in columns.items() if k.endswith("_tokens")]))

    def notes(self) -> list[str]:
        limit, policy = self.recipe.tokens.max_length, self.recipe.tokens.truncation
        notes = []
        if self.truncated:
            notes.append(
                f"{self.truncated:,} of {self.seen:,} rows ({self.truncated / self.seen:.0%}) are longer than max_length {limit}; "
                f"truncation {policy} {'leaves them unmeasured' if policy == 'drop' else 'cuts them'}."
            )
        if self.prompts:
            notes.append(
                f"{self.prompts:,} rows are prompts without a completion: answers to them are sampled and graded, what is measured on a "
                "completion is NULL."
            )
        if self.problems:
            # prompts have no tokens of a completion either, and say so in the same column
            clean = "token_problem IS NULL" + (" OR completion IS NULL" if self.prompts else "")
            notes.append(
                f"{self.problems:,} rows cannot be measured; the column token_problem of `scored` says why. A rule of `select` that uses their "
                f"scores treats them by select.unknown; `where: {clean}` leaves them out whatever the rules use."
            )
        if self.alike:
            notes.append(
                f"{self.alike:,} pairs are cut where their responses are still the same: their gap of 0 says nothing. Raise tokens.max_length, or "
                "leave them out."
            )
        if self.seen > LOOKED_AT:  # else the plan has said it
            notes += lost_text(self.left_out, self.seen, self.seen, self.name)
        self.truncated = self.problems = self.prompts = self.seen = self.alike = 0
        self.left_out.clear()
        return notes
