"""Mean gradients before P, of the training set and of the recipe's targets: made once at a model, and kept in the store's folder of directions.

They are named as a Direction's `of` is, those of a target's groups target.NAME:GROUP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.console import Count, Progress
from curate.errors import ModelError, UsageError
from curate.passes.tensor_files import Known
from curate.plan.targets import split
from curate.rows import Row

if TYPE_CHECKING:
    import numpy as np

    from curate.passes.gradients.mean import Vector
    from curate.passes.loading.model import Model
    from curate.plan.directions import Directions
    from curate.plan.step import Step

CHUNK = 4096  # rows encoded at a time


class MeanGradients:
    """Those of one recipe, at the model and the step's checkpoint that `at` was told last.

    encode: of rows. reference: row ids -> (rows, 2) log-probabilities that margins are against, None where the model is the reference.
    """

    def __init__(
        self,
        directions: Directions,
        progress: Progress,
        *,
        encode: Callable[[list[Row]], list[Any]],
        reference: Callable[[Sequence[str]], np.ndarray | None],
    ):
        self.directions, self.progress = directions, progress
        self.encode, self.reference = encode, reference
        self._known = Known()

    def at(self, model: Model, step: Step) -> None:
        self.model, self.step = model, step

    def named(self, of: str) -> str:
        """What a person reads."""
        names = {
            "step": "the set's step",
            "chosen": "the mean chosen gradient",
            "head": "the head's part of the set's step",
        }
        return names.get(of) or f"target {of.removeprefix('target.').replace(':', ', ')}"

    def of(self, of: str) -> Vector:
        """One of them, made or from the store's folder."""
        from curate.passes.gradients.mean import load_vector

        return load_vector(self.files([of])[0])

    def files(self, every: list[str]) -> list[Path]:
        """Where they are; what is not there is made."""
        from curate.passes.gradients.mean import save_vector

        files = {of: self.directions.file(self.directions.gradient_id(of, self.step.checkpoint)) for of in every}
        missing = [of for of, file in files.items() if not self.is_there(file)]
        if missing:
            title = (
                f"gradient: {self.named(missing[0])}" if len(missing) == 1 else f"{len(missing)} gradients of targets"
            )
            with self.progress.bar(title, sum(self._size(of) for of in missing)) as count:
                for of in missing:
                    save_vector(self._accumulated(of, count), files[of])
        return list(files.values())

    def is_there(self, file: Path) -> bool:
        """Whether a direction is kept, and is what was written."""
        why = self._known.fault_of(file) if file.is_file() else None
        if why is not None:
            self.progress.warn(f"{file} is damaged: {why}. It is made again.")
        return why is None and file.is_file()

    def _accumulated(self, of: str, count: Count) -> Vector:
        from curate.passes import forward
        from curate.passes.gradients.mean import accumulate, accumulate_head

        total: Vector = {}
        n = tokens = 0
        started = time.perf_counter()
        for encoded, weigh in self._chunks(of):
            known = sum(row.problem is None for row in encoded)
            if known:
                budget = self.directions.recipe.engine.token_budget
                if of == "head":
                    sums = accumulate_head(self.model, encoded, weigh, token_budget=budget)
                    count(known)
                else:
                    over = self.directions.recipe.gradients.parameters
                    sums = accumulate(self.model, encoded, weigh, token_budget=budget, parameters=over, count=count)
                total = {name: total[name].add_(x) for name, x in sums.items()} if total else sums
            n += known
            count(len(encoded) - known)
            tokens += forward.tokens_to_run(encoded) * (1 if of == "head" else 3)
        if not n:
            raise UsageError(
                f"None of the rows of {self.named(of)} can be measured with {self.step.checkpoint.label}; `curate validate` says more."
            )
        self.directions.store.log_throughput(self.step.key, tokens, time.perf_counter() - started)
        if not all(bool(x.isfinite().all()) for x in total.values()):
            raise ModelError(
                f"The gradient of {self.named(of)} at {self.step.checkpoint.label} is not finite: some row's log-probability "
                "is not, here or under the reference."
                + (" Did the warm-up diverge? Lower `forecast.learning_rate`." if self.step.checkpoint.start else "")
            )
        return {name: x.div_(n) for name, x in total.items()}

    def _size(self, of: str) -> int:
        return len(self._target_rows(of)) if of.startswith("target.") else len(self.directions.rows)

    def _target_rows(self, of: str) -> list[Row]:
        name, group = split(of)
        return self.directions.targets.rows(name)[group]

    def _chunks(self, of: str) -> Iterator[tuple[list[Any], Callable[..., Any]]]:
        """Encoded rows and their weights, whose sum over the rows is so many times the mean."""
        from curate.passes.gradients.mean import dpo_weights, fixed_weights, token_mean_weights

        weights = {"chosen": (1.0, 0.0), "rejected": (0.0, 1.0), "margin": (1.0, -1.0), "completion": (1.0,)}
        if of.startswith("target."):
            weigh = fixed_weights(*weights[self.directions.targets.named(split(of)[0]).of])
            rows = self._target_rows(of)
            for i in range(0, len(rows), CHUNK):
                yield self.encode(rows[i : i + CHUNK]), weigh
            return
        ids = self.directions.rows
        for i in range(0, len(ids), CHUNK):
            chunk = zip(ids[i : i + CHUNK], self.directions.store.iter_rows(ids[i : i + CHUNK]), strict=True)
            rows_of = {row_id: row for row_id, row in chunk if row is not None}
            encoded = self.encode(list(rows_of.values()))
            if of == "chosen":
                yield encoded, fixed_weights(*weights["chosen"])
            elif self.directions.pairs:
                yield encoded, dpo_weights(self.directions.recipe.forecast.beta, 1, self.reference(list(rows_of)))
            else:
                yield encoded, token_mean_weights(encoded, 1)
