"""A plan, as what runs it and who reads it get it: the steps, and what is to be known before they run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from curate.console import span, table
from curate.plan.directions import Directions
from curate.plan.lengths import RowLengths
from curate.plan.roles import Roles
from curate.plan.step import RequestedScore, Step, Task

if TYPE_CHECKING:
    from curate.store import Place


@dataclass(repr=False)
class Plan:
    """The steps in the order they run, and for every (role, column, over) the fingerprints that scores read.

    labels: of every fingerprint the (run, checkpoint, step) of the models that it is of: several where their weights are the same, in the order of
    `bindings`. recorded: the recorded training run that they are read from, if any. pool: gives the rows that neighbours are taken from. of_lengths:
    what is said of rows that are too long, of_references: of those that cannot be graded, of_models: of the models, their chat templates above all.
    doubts: whether a server's model is the recipe's, which --quiet does not hide.
    lengths: of the recipe's rows, None where no model is run. beta: DPO's, of pairs; of_beta: what is said where scores take another one.
    """

    wanted: list[RequestedScore]
    roles: Roles
    steps: list[Step] = field(default_factory=list)
    bindings: dict[tuple[str, str, str | None], list[str]] = field(default_factory=dict)
    labels: dict[str, list[Place]] = field(default_factory=dict)
    recorded: str | None = None
    directions: Directions | None = None
    pool: Callable[[], list[str]] = list
    of_models: list[str] = field(default_factory=list)
    of_lengths: list[str] = field(default_factory=list)
    lengths: RowLengths | None = None
    of_server: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    of_references: list[str] = field(default_factory=list)
    beta: float | None = None
    of_beta: list[str] = field(default_factory=list)
    chat_only: bool = False
    unused: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return sum(step.missing for step in self.steps)

    def __repr__(self) -> str:
        return self.text()

    def text(self) -> str:
        if not self.steps:
            why = (
                f"the scores are read from the recorded run {self.recorded}"
                if self.recorded
                else "no score of this recipe needs a model"
            )
            lines = [f"Nothing to measure: {why}."]
        else:
            head = ("pass", "model", "measurements", "rows", "missing", "tokens", "time")
            lines = [table([step_line(step) for step in self.steps], head=head)]
            known = [s.seconds for s in self.steps if s.to_measure and s.seconds is not None]
            if not any(s.to_measure or s.graded for s in self.steps):
                lines.append("Everything is measured already.")
            elif not known and not any(s.to_measure for s in self.steps):
                lines.append("Everything is sampled and measured already.")
            elif known:
                partly = (
                    ""
                    if len(known) == sum(1 for s in self.steps if s.to_measure)
                    else " for the passes that could be estimated"
                )
                rough = (
                    ", a rough guess before anything ran here"
                    if any(s.rough for s in self.steps if s.to_measure)
                    else ""
                )
                lines.append(f"About {span(sum(known))} in all{partly}{rough}.")
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """What a user may not expect: which checkpoints were left out, which no score asks for, which rows a model has no positions for."""
        notes = self.left_out()
        run = [s for s in self.roles.series if s.step != 0]
        measured = {task.measured.model_fingerprint for step in self.steps for task in step.tasks}
        idle = [s for s in run if s.fingerprint not in measured]
        if idle and self.steps:
            names = ", ".join(s.checkpoint for s in idle[:3]) + (", …" if len(idle) > 3 else "")
            primary = self.roles.primary
            whose = f"what it measures is of {primary.label} alone" if primary else "what it measures is of one model"
            notes.append(
                f"{len(idle)} of {len(run)} checkpoints are not measured ({names}): no score of this recipe is over checkpoints; "
                f"{whose}. `curate scores` says which are (needs … over checkpoints)."
            )
        return [
            *self.doubts,
            *self.of_server,
            *notes,
            *self.of_models,
            *self.of_answers(),
            *self.of_references,
            *self.of_lengths,
            *self.of_beta,
            *self.unused,
        ]

    def of_answers(self) -> list[str]:
        """A line where answers that were sampled before are taken again."""
        kept, draws = sum(s.kept for s in self.steps), sum(s.draws for s in self.steps if s.kept)
        rest = f"at most {draws:,} more are sampled" if draws else "none has to be sampled"
        return [f"{kept:,} sampled answers are kept and graded anew; {rest}."] if kept else []

    def left_out(self) -> list[str]:
        """A line for every checkpoint that models.on_broken_checkpoint: skip left out."""
        return [f"Left out: {message}" for message in self.roles.skipped]

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": [
                {
                    "pass": s.reads,
                    "model": s.checkpoint.label,
                    "measurements": [t.measurement.name for t in s.tasks],
                    "fingerprints": [t.fingerprint for t in s.tasks],
                    "rows": s.rows,
                    "missing": s.to_measure,
                    "unmeasurable": s.unmeasurable,
                    "answers_kept": s.kept,
                    "graded_anew": s.graded,
                    "tokens": s.tokens,
                    "seconds": s.seconds,
                }
                for s in self.steps
            ],
            "missing": sum(s.to_measure for s in self.steps),
            "notes": self.notes(),
        }


def step_line(step: Step) -> tuple[Any, ...]:
    """A step as a line of `curate plan`: pass, model, measurements, rows, missing, tokens, time."""
    time = tokens = "-"
    if step.to_measure:
        seconds = None if step.seconds is None else span(max(step.seconds, 0.1))
        time = "?" if seconds is None else f"≈ {seconds}" if step.rough else seconds
        at_most = step.reads == "sample" and step.at_most and not any(task.measurement.perturbed for task in step.tasks)
        tokens = f"{'≤' if at_most else '≈'} {_short(step.tokens)}"
    measurements = ", ".join(_named(task) for task in step.tasks)
    return step.reads, step.checkpoint.label, measurements, step.rows, step.to_measure, tokens, time


def _named(task: Task) -> str:
    """A measurement's name, and over which parameters its gradients are where that is not all."""
    over = task.measured.params.get("parameters")
    if over is None:
        return task.measurement.name
    layers = "last layer" if over == 1 else f"last {over} layers"
    return f"{task.measurement.name} ({layers if isinstance(over, int) else over})"


def _short(n: int) -> str:
    digits = int(math.log10(n)) if n > 0 else 0
    for limit, unit, name in ((4, 1, ""), (6, 1e3, " k"), (9, 1e6, " M"), (99, 1e9, " G")):
        if digits < limit:
            return f"{n:,}" if unit == 1 else f"{n / unit:.{0 if unit == 1e3 else 1}f}{name}"
    return f"{n:,}"
