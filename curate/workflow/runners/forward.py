"""The passes over whole rows: forward, after the nearest other rows, backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.console import Progress
from curate.errors import ModelError
from curate.plan.plan import Plan
from curate.plan.step import Step
from curate.rows import Example, Row
from curate.workflow.runners.base import Runner

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store import Store


class ForwardRunner(Runner):
    """One torch model for all checkpoints, weights swapped in place; every measurement is read off the same forward pass."""

    reads = "forward"
    dtype: str | None = None  # None: the engine's

    def __init__(self, loaded: Loaded, progress: Progress):
        super().__init__(loaded, progress)
        self.model: Any = None
        self.step: Step
        # rows of this step that can be measured, and those of them without a finite value
        self.measured = self.without_value = 0

    def use(self, step: Step) -> None:
        from curate.passes.forward import load_model

        super().use(step)
        self.step = step
        if self.model is not None:
            try:
                self.model.use(step.checkpoint.path, base=step.checkpoint.base)
                return
            except ModelError:  # another architecture: its own model
                self.close()
        engine, checkpoint = self.recipe.engine, step.checkpoint
        dtype = self.dtype or engine.dtype
        self.model = load_model(checkpoint.path, base=checkpoint.base, dtype=dtype, device=engine.device)

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.passes import forward

        encoded = self._encode(rows)
        columns = forward.measure(self.model, encoded, measurements, token_budget=self.recipe.engine.token_budget)
        self._count_without_value(encoded, columns, measurements)
        return columns, None, forward.tokens_to_run(encoded, without_prompt=any(m.without_prompt for m in measurements))

    def _count_without_value(
        self, encoded: Sequence[Any], columns: Mapping[str, Any], measurements: Sequence[Any]
    ) -> None:
        """Count the rows that tokens were run of and nothing finite came back. ModelError where no row of the checkpoint has a value: nothing of it
        is to be kept. Of prompts alone, and by measurements of the user's own, NULL can be what was measured.
        """
        ours = [m for m in measurements if not m.prompt_only and m.function.__module__.startswith("curate.")]
        numbers = [column for m in ours for column in m.columns]
        if not numbers:
            return
        measurable = np.array([row.problem is None for row in encoded], bool)
        finite = np.zeros(len(encoded), bool)
        for column in numbers:
            finite |= np.isfinite(columns[column])
        self.without_value += int((measurable & ~finite).sum())
        self.measured += int(measurable.sum())
        if self.measured and self.without_value == self.measured and self.step.missing == self.step.rows:
            raise ModelError(
                f"{self.step.checkpoint.label}: the model gives no finite number for any of {self.measured:,} rows. Its weights are damaged, or its "
                "activations are larger than its numbers can be: try another engine.dtype. Nothing of this is kept."
            )

    def notes(self) -> list[str]:
        lost, measured = self.without_value, self.measured
        self.without_value = self.measured = 0
        if not lost:
            return super().notes()
        note = f"{lost:,} of {measured:,} rows: the model ({self.step.checkpoint.label}) gives no finite number; what is measured of them is NULL."
        return [*super().notes(), note]

    def close(self) -> None:
        if self.model is not None:
            self.model.close()
            self.model = None


class NeighboursRunner(ForwardRunner):
    """The forward pass over rows with their nearest other training examples before the prompt: as many as fit into max_length."""

    reads = "neighbours"

    def __init__(self, loaded: Loaded, progress: Progress, store: Store, plan: Plan):
        from curate.passes.nearest import Neighbours

        super().__init__(loaded, progress)
        self.neighbours = Neighbours(plan.pool(), list(store.iter_rows(plan.pool())))
        self.lonely = self.seen = 0

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.passes import forward

        how = ("after its neighbours", self._tokenizer_id, self.chat)
        found = [
            self.encodings.of(how, row_id, partial(self._after, row, row_id))
            for row, row_id in zip(rows, row_ids, strict=True)
        ]
        at = [i for i, encoded in enumerate(found) if encoded is not None]
        encoded = [found[i] for i in at]
        measured = forward.measure(self.model, encoded, measurements, token_budget=self.recipe.engine.token_budget)
        columns = {name: np.full(len(rows), np.nan) for name in measured}
        for name, values in measured.items():
            columns[name][at] = values
        self.seen += len(rows)
        self.lonely += len(rows) - len(at)
        return columns, None, forward.tokens_to_run(encoded)

    def _after(self, row: Row, row_id: str) -> Any:
        """The row encoded after its neighbours, the nearest last; None where not even one fits, or there is none."""
        from curate.passes.tokens import Limits, after_examples, as_chat, encode

        near = self.neighbours.nearest(row_id, row) if isinstance(row, Example) and row.completion else []
        limits = Limits(self.recipe.tokens.max_length, "drop")
        if self.chat:
            row, near = as_chat(row), [as_chat(other) for other in near]  # type: ignore[misc]
        for count in range(len(near), 0, -1):
            encoded = encode(after_examples(row, near[:count][::-1]), self.tokenizer, limits)  # type: ignore[arg-type]
            if encoded.problem is None:
                return encoded
        return None

    def notes(self) -> list[str]:
        if not self.lonely:
            return []
        note = f"{self.lonely:,} of {self.seen:,} rows: no neighbour, or none that fits into max_length; neighbour_nll is NULL there."
        self.lonely = self.seen = 0
        return [note]


class BackwardRunner(ForwardRunner):
    """The same model; what reads the forward pass is read off the backward's own, and alone where nothing else is missing."""

    reads = "backward"

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.passes import forward
        from curate.passes.gradients import backward

        if all(m.reads == "forward" for m in measurements):
            return super().run(rows, row_ids, measurements)
        encoded = self._encode(rows)
        columns = backward.measure(
            self.model,
            encoded,
            measurements,
            token_budget=self.recipe.engine.token_budget,
            parameters=self.recipe.gradients.parameters,
        )
        self._count_without_value(encoded, columns, measurements)
        return columns, None, forward.tokens_to_run(encoded)
