"""Recorder: measures chosen rows while a training runs, so that nobody has to keep checkpoints.

    recorder = curate.Recorder("recipe.yaml", every=0.1)          # a recipe, data, or rows; here at ten points of the training
    trainer = SFTTrainer(..., callbacks=[recorder])               # TRL's trainers, or transformers' own
    trainer.train()
    curate.run("recipe.yaml")                                     # its scores over what was recorded

At step 0, every so many steps and at the end, the model itself is put into evaluation mode and measured; what the training does is
not changed by it (passes/loading/live.py). A recording is one shard a measurement, in the store at once: a training that dies has lost the recording
under way at most. Of several processes only the first records, and the others wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from curate.console import Progress, span
from curate.errors import CurateError, UsageError
from curate.models.checkpoints import Checkpoint
from curate.plan.identity import params_of, task_of
from curate.plan.recorded import PREFIX, VERSION, recorded_runs, weights_of
from curate.plan.step import Task
from curate.rows import Row, content_id
from curate.store import Store
from curate.workflow.read import read_sources
from curate.workflow.recorder_input import check_settings, read_given, wanted_measurements

if TYPE_CHECKING:
    from curate.data.records import Record


class Recorder(TrainerCallback):
    """A callback for transformers' and TRL's trainers.

    rows: a recipe (a YAML file or a dict): its source is measured, with what its scores over checkpoints need, its tokens, sampling and
    store; or data: a path, a hub id, a `datasets.Dataset`, a list of dicts, a data frame, or rows as `curate.load` returns them. every: steps between
    recordings, or their share of the training (a number below 1). run: the run's name (the output folder's). scores, samples: what to measure
    where rows is no recipe (likelihoods; with samples above 0 sampled accuracy too); set, store: as in `curate.run`.

    `seconds` and `share` say what it cost. Raises UsageError before the training starts; what fails later is said, and the training goes on.
    """

    def __init__(
        self,
        rows: str | Path | dict[str, Any] | Sequence[Row | dict[str, Any]],
        *,
        every: int | float = 0.1,
        run: str | None = None,
        store: str | Path | None = None,
        scores: Sequence[Any] | None = None,
        samples: int = 0,
        set: dict[str, Any] | list[str] | None = None,
        progress: Progress | None = None,
    ):
        if isinstance(every, bool) or not (
            (isinstance(every, int) and every >= 1) or (isinstance(every, float) and 0 < every < 1)
        ):
            raise UsageError(f"every is {every!r}, expected steps (1 or more) or a share of the training (0.1).")
        self.every, self.run, self.progress = every, run, progress or Progress()
        self.loaded, self._rows = read_given(rows, scores, samples, set=set, store=store)
        self.measurements = wanted_measurements(self.loaded)
        self.seconds = 0.0
        self.recorded: list[int] = []
        self.failed: list[str] = []
        self._started = self._ended = 0.0
        self._ready = False
        self.run_name = ""

    @property
    def share(self) -> float:
        """The part of the training's time that went into recordings, 0..1."""
        took = (self._ended or time.perf_counter()) - self._started
        return self.seconds / took if self._started and took > 0 else 0.0

    @property
    def recipe(self) -> dict[str, Any]:
        """A recipe about this recording, for `curate.run(recorder.recipe)`; relative paths are from where the Recorder's own recipe stands.

        UsageError before a training was recorded.
        """
        if not self.run_name:
            raise UsageError("Recorder: nothing is recorded yet; train with it first.")
        models = {"checkpoints": f"{PREFIX}{self.run_name}"}
        return self.loaded.raw | {"models": models, "store": str(self.loaded.store.resolve())}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._started, self._ended, self.seconds = time.perf_counter(), 0.0, 0.0
        self.recorded, self.failed = [], []
        self._prepare(args, state, kwargs["model"], kwargs.get("processing_class") or kwargs.get("tokenizer"))
        if state.global_step == 0:
            self._record(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._ready and (state.global_step % self._steps == 0 or state.global_step >= state.max_steps):
            self._record(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._ready:
            return
        if (
            state.global_step not in self.recorded and not args.load_best_model_at_end
        ):  # else the best is back in the model
            self._record(state.global_step)
        self._ended = time.perf_counter()
        self._finish()

    # ---- before the training ------------------------------------------------------------------------------------------------------------

    def _prepare(self, args: Any, state: Any, model: Any, tokenizer: Any) -> None:
        """Rows into the store, tokens, the model's head and layout. Everything that can be wrong is wrong here."""
        import curate
        from curate.passes.forward import Model
        from curate.passes.loading.live import untouched

        if tokenizer is None:
            raise UsageError("The trainer has no tokenizer: give it processing_class=tokenizer.")
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._steps = self.every if isinstance(self.every, int) else max(1, round(self.every * state.max_steps))
        with untouched(model) as module:
            self.model = Model(module)
        self.store = Store(self.loaded.store, create=True, on_wait=self.progress.say, on_damage=self.progress.warn)
        self._take_in()  # what an earlier training left
        runs = recorded_runs(self.store)
        self.run_name = self._name_of(args, state, runs)
        self._read_rows()
        now = {m.name: self._params(m) for m in self.measurements}
        check_settings(self.run_name, self.store.folder, runs.get(self.run_name, []), now)
        self._encode()
        self.number = self.store.begin_run(self.loaded.name, "record", curate.__version__)
        self._ready = True
        self.progress.say(
            f"Recorder: {len(self.rows):,} rows every {self._steps:,} steps into {self.store.folder}, run {self.run_name}."
        )

    def _name_of(self, args: Any, state: Any, runs: Collection[str]) -> str:
        """The run's name. runs: those that are recorded; another training of the same name gets a number, a resumed one goes on in its own."""
        name = self.run or Path(args.output_dir).resolve().name
        if name not in runs or state.global_step:
            return name
        return next(f"{name}-{i}" for i in range(2, len(runs) + 3) if f"{name}-{i}" not in runs)

    def _read_rows(self) -> None:
        """The rows to measure, and how the tokenizer renders them."""
        from curate.models.fingerprints import FingerprintCache
        from curate.passes.chat import template_of
        from curate.passes.tokenizer import tokenizer_fingerprint
        from curate.plan.rendering import Renderings

        self.tokenizer_print = tokenizer_fingerprint(self.tokenizer)
        if self._rows is None:
            by_role = read_sources(self.loaded, self.store, self.progress)
            sources = [name for group in by_role.values() for name in group]
        else:
            sources = self._add_rows(self._rows)
        self.row_ids = self.store.rows_with_text(sources, kind=self.loaded.recipe.kind)
        self.rows: list[Row] = [row for row in self.store.iter_rows(self.row_ids) if row is not None]
        styles = {row.style for row in self.rows}
        renderings = Renderings(self.loaded, FingerprintCache(None), styles, self.store)
        self.rendering = renderings.with_template(template_of(self.tokenizer), self.run_name)

    def _encode(self) -> None:
        from curate.passes.tokens import Limits, encode

        tokens = self.loaded.recipe.tokens
        limits = Limits(tokens.max_length, tokens.truncation, self.rendering.chat, tokens.turns)
        self.encoded = [encode(row, self.tokenizer, limits) for row in self.rows]
        self._write_tokens()

    def _add_rows(self, records: Sequence[Record]) -> list[str]:
        key = content_id([record.row.row_id for record in records if record.row is not None])
        name = f"rows-{key[:6]}"
        if not self.store.source_is_current(name, key):
            self.store.add_source(name, key, (replace(record, source=name) for record in records))
        return [name]

    def _write_tokens(self) -> None:
        """Token counts, under the fingerprint that a plan gives them, too: what has the same tokenizer has the same tokens."""
        from curate.measurements import MEASUREMENTS, measure_tokens
        from curate.workflow.runners.base import TEXT

        nobody = Checkpoint("", "", "", "")
        for m in MEASUREMENTS.values():
            if m.reads != "tokens" or m.kind not in (self.loaded.recipe.kind, "any"):
                continue
            own = params_of(self.loaded, m, self.tokenizer_print) | self.rendering.params(m)
            task = task_of(m, nobody, "", own)
            columns: dict[str, Any] = dict(measure_tokens(self.encoded, [m]))
            columns["token_problem"] = np.array([e.problem for e in self.encoded], TEXT)
            self.store.write_shard(task.measured, 0, self.row_ids, columns)

    # ---- while it runs ------------------------------------------------------------------------------------------------------------------

    def _record(self, step: int) -> None:
        """One recording. What goes wrong at step 0 stops the training before it starts; later it is said and the training goes on."""
        self._wait_for_device()
        started = time.perf_counter()
        try:
            self._measure(step)
            self.recorded.append(step)
        except (CurateError, OSError, RuntimeError, MemoryError) as error:
            if step == 0:
                raise
            self.failed.append(f"step {step}: {error}")
            self.progress.say(f"Recorder: nothing recorded at step {step}: {error}")
        finally:
            self._wait_for_device()
            self.seconds += time.perf_counter() - started

    def _measure(self, step: int) -> None:
        from curate.passes.forward import measure
        from curate.passes.loading.live import untouched

        forward = [m for m in self.measurements if m.reads == "forward"]
        sampled = [m for m in self.measurements if m.reads == "sample"]
        with untouched(self.model.module):
            self.model.refresh()
            columns: dict[str, Any] = {}
            samples: dict[str, Any] = {}
            if forward:
                budget = self.loaded.recipe.engine.token_budget
                columns |= measure(self.model, self.encoded, forward, token_budget=budget)
            if sampled:
                graded, drawn = self._sample(sampled)
                columns, samples = columns | graded, drawn or {}
        for m in self.measurements:
            own = {column: columns[column] for column in m.columns}
            self.store.write_shard(self._task(m, step).measured, 0, self.row_ids, own, samples.get(m.name))

    def _task(self, measurement: Any, step: int) -> Task:
        checkpoint = Checkpoint("", weights_of(self.run_name, step), self.run_name, f"step-{step}", step)
        return task_of(measurement, checkpoint, f"recorder {self.model.engine}", self._params(measurement))

    def _params(self, measurement: Any) -> dict[str, Any]:
        own = params_of(self.loaded, measurement, self.tokenizer_print) | self.rendering.params(measurement)
        return own | {"recorder": VERSION}

    def _sample(self, measurements: list[Any]) -> tuple[dict[str, Any], Any]:
        from curate.passes.sampling.hf import HfSampler
        from curate.workflow.runners.sample import SampleRunner

        runner = SampleRunner(self.loaded, self.progress)
        runner.tokenizer, runner.chat = self.tokenizer, self.rendering.chat
        runner.tags = self._params(measurements[0]).get("thinking")
        runner.sampler = HfSampler.of(self.model, self.tokenizer, max_length=self.loaded.recipe.tokens.max_length)
        columns, samples, _ = runner.run(self.rows, self.row_ids, measurements)
        return dict(columns), samples

    def _wait_for_device(self) -> None:
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.model.device)

    # ---- afterwards ---------------------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        took = self._ended - self._started
        counts = {
            "run": self.run_name,
            "rows": len(self.rows),
            "steps": self.recorded,
            "seconds": round(self.seconds, 3),
            "training_seconds": round(took, 3),
            "share": round(self.share, 4),
        }
        del self.model  # the training's memory is not ours to keep
        self._ready = False
        self._take_in()
        self.store.finish_run(self.number, "failed" if self.failed else "done", "; ".join(self.failed), counts)
        models = self.loaded.recipe.models
        sets = [f"models.checkpoints={PREFIX}{self.run_name}"]
        sets += [f"models.{role}=null" for role in ("reference", "policy") if getattr(models, role)]
        path = self.loaded.path
        by_hand = (
            f"curate score {path} {' '.join(f'--set {s}' for s in sets)}" if path else "curate.run(recorder.recipe)"
        )
        self.progress.say(
            f"Recorder: {len(self.recorded)} recordings of {len(self.rows):,} rows took {span(self.seconds)}, {self.share:.1%} of the training's "
            f"{span(took)}. Scores: {by_hand}"
        )

    def _take_in(self) -> None:
        """Finished shards into the tables, unless somebody measures into the store now, who will do it."""
        try:
            with self.store.measuring():
                pass
        except CurateError as error:
            self.progress.say(f"Recorder: what was recorded waits in {self.store.folder} ({error})")
