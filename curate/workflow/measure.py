"""Running a plan's passes: rows in, shards out. One engine serves a whole series of checkpoints; each shard is kept as soon as it is done.

Killed at any moment, the same command goes on: at most the shard under way is measured again, with the same rows and the same seeds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.console import Progress
from curate.errors import CurateError
from curate.plan.plan import Plan
from curate.plan.step import Step
from curate.rows import Row
from curate.workflow.encodings import Encodings
from curate.workflow.runners.base import Runner
from curate.workflow.runners.forward import BackwardRunner, ForwardRunner, NeighboursRunner
from curate.workflow.runners.sample import SampleRunner
from curate.workflow.runners.tokens import TokensRunner

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.recipe.load import Loaded
    from curate.store import Store

INGEST_EVERY = 5.0  # seconds: how long finished shards may wait until readers see them


def measure(loaded: Loaded, store: Store, plan: Plan, progress: Progress) -> dict[str, int]:
    """Run every step that misses rows, inside `store.measuring()`. Returns how many rows each pass measured, and what truncation touched."""
    counts: dict[str, int] = {}
    encodings = Encodings()
    with ExitStack() as engines:
        runner: Runner | None = None
        to_do = [step for step in plan.steps if step.missing]
        for step, following in zip(to_do, [*to_do[1:], None], strict=True):
            if runner is None or runner.reads != step.reads:
                engines.close()  # one engine at a time: its memory is free before the next one starts
                checkpoints = [s.checkpoint for s in to_do if s.reads == step.reads]
                runner = engines.enter_context(_runner(step.reads, loaded, progress, checkpoints, store, plan))
                runner.encodings = encodings
            _run_step(step, runner, store, progress, following)
            for name, n in ((step.reads, step.missing - step.graded), ("kept answers graded anew", step.graded)):
                if n:
                    counts[name] = counts.get(name, 0) + n
    return counts


def trial(loaded: Loaded, step: Step, rows: Sequence[Row]) -> list[Any]:
    """Turn rows into tokens as the step will, and raise what it would raise. Returns the prompts that would be sampled, for a step that samples."""
    quiet = Progress(quiet=True)
    if step.reads != "sample":
        runner = Runner(loaded, quiet)
        runner.use(step)
        runner._encode(list(rows))
        return []
    sampler = SampleRunner(loaded, quiet)
    Runner.use(sampler, step)
    prompts = [sampler._prompt(row, row.row_id) for row in rows]
    return [prompt for prompt in prompts if prompt is not None]


def _run_step(step: Step, runner: Runner, store: Store, progress: Progress, following: Step | None) -> None:
    runner.use(step)
    if (
        following is not None
        and following.checkpoint.path != step.checkpoint.path
        and following.to_measure
        and following.reads != "tokens"
    ):
        _read_ahead(Path(following.checkpoint.path))
    title = f"{step.reads} {step.checkpoint.label}" if step.reads != "tokens" else "tokens"
    waiting = time.monotonic()
    throughput: list[tuple[str, int, float]] = []
    with progress.bar(title, step.rows, done=step.rows - step.missing) as count, _noted(store, throughput):
        for number, row_ids, tasks in step.blocks:
            rows = [row for row in store.iter_rows(row_ids) if row is not None]
            started = time.perf_counter()
            runner.tasks, runner.starting = tasks, 0.0
            columns, samples, tokens = runner.run(rows, row_ids, [task.measurement for task in tasks])
            seconds = time.perf_counter() - started - runner.starting
            for task in tasks:
                names = [*task.measurement.columns, *runner.extra_columns]
                mine = {name: columns[name] for name in names if name in columns}
                store.write_shard(task.measured, number, row_ids, mine, (samples or {}).get(task.measurement.name))
            if tokens:
                throughput.append((step.key, tokens, seconds))
            count(len(row_ids))
            if time.monotonic() - waiting > INGEST_EVERY:
                store.ingest(throughput)
                throughput.clear()
                waiting = time.monotonic()
    store.ingest(throughput)
    for note in runner.notes():
        progress.say(note)


@contextmanager
def _noted(store: Store, throughput: Sequence[tuple[str, int, float]]) -> Iterator[None]:
    """Where the pass is stopped, how fast it was up to there is noted all the same."""
    try:
        yield
    except BaseException:
        with suppress(CurateError):
            for line in throughput:
                store.log_throughput(*line)
        raise


def _read_ahead(folder: Path) -> None:
    """Bring the next checkpoint's weights from the disk into the system's file cache while this one computes."""

    def read() -> None:
        for file in sorted(folder.glob("*.safetensors")):
            with (
                suppress(OSError),
                file.open("rb", buffering=0) as opened,
            ):  # who loads them says what is wrong with them
                while opened.read(1 << 24):
                    pass

    threading.Thread(target=read, daemon=True, name="read-ahead").start()


@contextmanager
def _runner(
    reads: str, loaded: Loaded, progress: Progress, checkpoints: list[Checkpoint], store: Store, plan: Plan
) -> Iterator[Runner]:
    kinds: dict[str, type[Runner]] = {"tokens": TokensRunner}
    kinds |= {"forward": ForwardRunner, "backward": BackwardRunner}
    if reads == "direction":
        from curate.workflow.runners.directions import DirectionRunner

        runner: Runner = DirectionRunner(loaded, progress, store, plan)
    elif reads == "sample":
        runner = SampleRunner(loaded, progress, store)
    elif reads == "neighbours":
        runner = NeighboursRunner(loaded, progress, store, plan)
    else:
        runner = kinds[reads](loaded, progress)
    runner.checkpoints = checkpoints
    try:
        yield runner
    finally:
        runner.close()
