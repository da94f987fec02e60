"""Running the direction steps of a plan: directions made once and kept in the store, then two forward passes a shard along each of them, and one
backward for all cosines with them.

A direction is over the whole training set; killed while one is made, it is made again, and what was done before it is kept. Weights are
float32 whatever engine.dtype says: the difference of two bfloat16 log-probabilities is noise.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.console import Progress
from curate.errors import ModelError
from curate.models.checkpoints import Checkpoint
from curate.passes.files import write_atomically
from curate.rows import Row
from curate.workflow.runners.forward import ForwardRunner
from curate.workflow.runners.mean_gradients import MeanGradients

if TYPE_CHECKING:
    from curate.passes.contract import Direction, Measurement
    from curate.passes.gradients.cosines import Cosines
    from curate.passes.gradients.derivatives import Epsilon
    from curate.passes.gradients.mean import Vector
    from curate.plan.plan import Plan
    from curate.plan.step import Step, Task
    from curate.recipe.load import Loaded
    from curate.store import Store

ROUGH = 0.02  # error over the spread from which on it is said
CHECKED = 64  # rows among which those are that ε is checked on


class DirectionRunner(ForwardRunner):
    """One float32 model for all checkpoints, moved along each direction and put back."""

    reads = "direction"
    dtype = "float32"

    def __init__(self, loaded: Loaded, progress: Progress, store: Store, plan: Plan):
        super().__init__(loaded, progress)
        assert plan.directions is not None
        self.store, self.plan, self.directions = store, plan, plan.directions
        self.new_notes: list[str] = []
        self.gradients = MeanGradients(self.directions, progress, encode=self._encode, reference=self._reference)
        self.cosines: dict[str, tuple[list[Measurement], Cosines]] = {}  # by P's step
        # the store is ours alone while we measure
        self.directions.sweep(task for step in plan.steps for task in step.tasks)

    def use(self, step: Step) -> None:
        self.step = step
        missing = {task.fingerprint: task for _, _, tasks in step.blocks for task in tasks}
        checkpoint = step.checkpoint
        if checkpoint.start and not Path(checkpoint.path).is_dir():
            self._warm_up(step, checkpoint)
        adam = any(_about(task).step == "adam" for task in missing.values())
        for optimizer in [self.directions.optimizer(checkpoint)] if adam else []:
            if isinstance(optimizer, Checkpoint) and not Path(optimizer.path).is_dir():
                self._warm_up(step, optimizer)
        self.cosines.clear()  # before another model comes into memory
        super().use(step)
        self.gradients.at(self.model, step)
        cosines = [task.measurement for task in missing.values() if _about(task).cosine]
        self.ready = {
            task.measurement.name: self._direction(task) for task in missing.values() if not _about(task).cosine
        }
        for kind in dict.fromkeys(m.direction.step for m in cosines if m.direction):
            alike = [m for m in cosines if m.direction and m.direction.step == kind]
            self.cosines[kind] = alike, self._with_targets(alike, kind)
        self._say_once()

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.passes import forward
        from curate.passes.gradients.derivatives import Line, derivatives, head_derivatives

        encoded = self._encode(rows)
        budget = self.recipe.engine.token_budget
        columns: dict[str, Any] = {}
        runs = 0
        names = {m.name for m in measurements}
        for alike, cosines in self.cosines.values():
            if names & {m.name for m in alike}:
                runs += 3  # a backward
                values = cosines.of(encoded, token_budget=budget)  # (rows, all groups of all of them)
                ends = np.cumsum([len(m.columns) for m in alike])[:-1]
                for m, own in zip(alike, np.split(values, ends, axis=1)):
                    columns |= dict(zip(m.columns, m.function(own)))
        for m in measurements:
            if m.name not in self.ready:
                continue
            v, epsilon = self.ready[m.name]
            if epsilon is None:
                runs += 1
                derivative = head_derivatives(self.model, encoded, v, token_budget=budget)
                columns |= m.function(derivative, np.ones(len(rows)))
                continue
            runs += 2
            with Line(self.model, v) as line:
                along = derivatives(line, encoded, epsilon, token_budget=budget)
            columns |= m.function(along.derivative, self._own_step(encoded, row_ids, along.logp))
        return columns, None, runs * forward.tokens_to_run(encoded)

    def notes(self) -> list[str]:
        notes, self.new_notes = self.new_notes, []
        return list(dict.fromkeys(notes))

    def _say_once(self) -> None:
        """What somebody who reads the numbers has to know: another precision than elsewhere, checkpoints that all weigh the same."""
        from curate.passes.loading.engine import engine_identity

        engine = self.recipe.engine
        asked = engine_identity(dtype=engine.dtype, device=engine.device).split()[3]  # torch, version, device, dtype
        if asked != self.dtype:
            self.new_notes.append(
                f"Along directions the model runs in {self.dtype}, not {asked}: a difference of two {asked} numbers is noise."
            )
        series = self.plan.roles.series
        targets = any(
            "target." in task.measurement.direction.of for task in self.step.tasks if task.measurement.direction
        )
        if targets and len(series) > 1 and any(s.rate is None for s in series):
            unknown = next(s for s in series if s.rate is None)
            self.new_notes.append(
                f"influence adds up {len(series)} checkpoints with equal weights: {unknown.label} has no learning rate in a trainer_state.json."
            )

    def _own_step(self, encoded: list[Any], row_ids: Sequence[str], logp: np.ndarray) -> np.ndarray:
        """(rows,): s_i of pairs, 1/T_i of SFT rows."""
        if not self.directions.pairs:
            return np.array([1 / row.n_response if row.problem is None else np.nan for row in encoded])
        beta, reference = self.recipe.forecast.beta, self._reference(row_ids)
        margin = 0.0 if reference is None else (logp - reference) @ [1.0, -1.0]
        return np.broadcast_to(beta / (1 + np.exp(beta * margin)), len(encoded))

    def _reference(self, row_ids: Sequence[str]) -> np.ndarray | None:
        """(rows, 2) the reference's log-probabilities of both responses, None where the model is the reference."""
        if not self.directions.has_margins(self.step.checkpoint):
            return None
        names = ["chosen_logp", "rejected_logp"]
        columns = self.store.columns(self.plan.bindings["", "chosen_logp", None][0], names, row_ids)
        return np.stack([columns[name] for name in names], 1)

    # ---- making directions --------------------------------------------------------------------------------------------------------------

    def _direction(self, task: Task) -> tuple[Vector, float | None]:
        """v, and how far to go along it; None of the head's part, which is exact."""
        from curate.passes.gradients.derivatives import Line, choose_epsilon
        from curate.passes.gradients.mean import load_vector, precondition, save_vector

        direction, files = _about(task), self.directions
        kept, note = files.file(task.fingerprint), files.file(task.fingerprint, "json")
        noted = _noted(note)
        if noted is not None and (direction.step == "sgd" or self.gradients.is_there(kept)):
            v = self.gradients.of(direction.of) if direction.step == "sgd" else load_vector(kept)
            return v, noted["epsilon"]
        x = self.gradients.of(direction.of)
        at = x if direction.step != "sign" or direction.of == "head" else self.gradients.of("step")
        v = precondition(x, direction.step, at, self._moments() if direction.step == "adam" else None)
        epsilon: Epsilon | None = None
        if direction.of != "head":
            with Line(self.model, v) as line:
                epsilon = choose_epsilon(line, self._sample(), token_budget=self.recipe.engine.token_budget)
            self.new_notes.append(f"{task.measurement.name} along {self.gradients.named(direction.of)}: {epsilon}")
            if not epsilon.error <= ROUGH:
                self.new_notes.append(
                    f"{task.measurement.name}: float32 is not exact enough along it; take its ranks with care."
                )
        if direction.step != "sgd":
            save_vector(v, kept)
            v = load_vector(kept)  # from the disk as it is used: several directions need not fit into memory together
        written = {"name": task.measurement.name, "model": self.step.checkpoint.label} | (
            {"epsilon": None}
            if epsilon is None
            else {"epsilon": epsilon.value, "error": epsilon.error, "spearman": epsilon.rank, "rows": epsilon.rows}
        )
        with write_atomically(note) as new:
            new.write_text(json.dumps(written))
        return v, epsilon.value if epsilon else None

    def _sample(self) -> list[Any]:
        """Encoded training rows that ε is checked on: CHECKED of them, or all where none of those can be measured."""
        ids = self.directions.rows
        encoded: list[Any] = []
        for every in (max(len(ids) // CHECKED, 1), 1):
            encoded = self._encode([row for row in self.store.iter_rows(ids[::every]) if row is not None])
            if any(row.problem is None for row in encoded):
                break
        return encoded

    def _moments(self) -> Vector:
        from curate.passes.gradients.adam import second_moments
        from curate.passes.gradients.mean import load_vector
        from curate.plan.directions import MOMENTS

        moments = self.directions.optimizer(self.step.checkpoint)
        if isinstance(moments, Path):
            return second_moments(moments, self.model.module)
        return load_vector(Path(moments.path) / MOMENTS)

    def _with_targets(self, measurements: list[Measurement], kind: str) -> Cosines:
        """What takes rows' cosines with the mean gradient of every group of these measurements' targets, P of one kind."""
        from curate.passes.gradients.cosines import Cosines
        from curate.passes.gradients.mean import load_vector, precondition

        targets = self.directions.targets
        every = [of for m in measurements if m.direction for of in targets.gradients(m.direction.of)]
        files = self.gradients.files(every)
        scale = None
        if kind == "adam":
            ones = {name: x.new_ones(()).expand(x.shape) for name, x in load_vector(files[0]).items()}
            scale = precondition(ones, "adam", {}, self._moments())
        vectors = [partial(load_vector, file) for file in files]
        cosines = Cosines(self.model, vectors, scale=scale, parameters=self.recipe.gradients.parameters)
        times = math.ceil(len(files) / cosines.together)
        if times > 1:
            self.progress.say(
                f"{cosines.together} of the {len(files)} targets' gradients fit into memory at a time: the rows are run {times} times."
            )
        return cosines

    def _warm_up(self, step: Step, checkpoint: Checkpoint) -> None:
        """Train the reference for a few steps; its weights and Adam's second moments into the checkpoint's folder, whole or not at all."""
        from curate.passes.gradients.mean import save_vector
        from curate.passes.gradients.warmup import WarmUp, warm_up
        from curate.passes.loading.weights import quiet
        from curate.plan.directions import MOMENTS

        forecast, start = self.recipe.forecast, self.directions.start
        super().use(replace(step, checkpoint=start))
        settings = WarmUp(
            forecast.warmup_steps, forecast.warmup_rows, forecast.learning_rate, forecast.beta, self.recipe.engine.seed
        )
        ids = self.directions.rows
        order = np.random.default_rng(settings.seed).permutation(len(ids))[: 2 * settings.steps * settings.rows]
        rows = [row for row in self.store.iter_rows([ids[i] for i in np.sort(order)]) if row is not None]
        with self.progress.bar(f"warm-up of {start.label}", settings.steps * min(settings.rows, len(rows))) as count:
            moments = warm_up(
                self.model, self._encode(rows), settings, token_budget=self.recipe.engine.token_budget, count=count
            )
        folder = Path(checkpoint.path)
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with quiet():
                self.model.module.save_pretrained(unfinished)
            save_vector(moments, unfinished / MOMENTS)
            unfinished.replace(folder)
        except OSError as problem:
            raise ModelError(f"{folder}: the warmed-up model cannot be kept there ({problem.strerror}).") from None


def _about(task: Task) -> Direction:
    assert task.measurement.direction is not None
    return task.measurement.direction


def _noted(file: Path) -> dict[str, Any] | None:
    """What was noted of a direction when it was made; None where that is not there, or damaged: it is made again."""
    try:
        noted: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return noted if noted["epsilon"] is None or noted["epsilon"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
