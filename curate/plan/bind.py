"""A column that a score reads is bound to tasks: the measurement that gives it, of the checkpoints that are meant, under its fingerprint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.errors import UsageError, did_you_mean
from curate.plan.recorded import PREFIX, recorded_runs

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.passes.contract import Measurement
    from curate.plan.directions import Directions
    from curate.plan.identity import Identity
    from curate.plan.plan import Plan
    from curate.plan.step import Task
    from curate.recipe.load import Loaded
    from curate.store import Store

Place = tuple[str, str]  # a pass, and the path of the checkpoint it runs over; for tokens the tokenizer's fingerprint


class Binder:
    """Fills `Plan.bindings` and `Plan.labels`, and collects the tasks they name: by place, then by fingerprint.

    A column that is optional is bound where its task is planned anyway, so whatever is needed is bound first.
    """

    def __init__(self, loaded: Loaded, store: Store, plan: Plan, identity: Identity, directions: Directions):
        self.loaded, self.recipe, self.store = loaded, loaded.recipe, store
        self.plan, self.identity, self.directions = plan, identity, directions
        self.tasks: dict[Place, dict[str, Task]] = {}
        self.checkpoints: dict[Place, Checkpoint] = {}
        self.planned: set[str] = set()  # fingerprints of tasks
        self._names: set[str] = set()  # of their measurements

    def bind(self, column: str, role: str, over: str | None, *, optional: bool = False) -> None:
        """Bind a column of a role, over checkpoints or of one model. UsageError where it is needed and nothing here can give it."""
        key = (role, column, over)
        if role == "row" or key in self.plan.bindings:
            return
        measurement = self._measurement(column, optional)
        if measurement is None:
            return
        if self.recipe.tokens.turns == "all" and (measurement.without_prompt or measurement.reads == "neighbours"):
            if optional:
                return
            raise UsageError(
                f"A score needs {column}, which is of one completion after its prompt, and tokens.turns: all counts every assistant turn. Leave the "
                "score out, or measure the last turn: `--set tokens.turns=last`."
            )
        optional = optional and not measurement.perturbed  # who names the function wants its perturbations measured
        if optional and measurement.name not in self._names:
            return  # never a reason to measure, nor to ask a server
        checkpoints = self._checkpoints(measurement, column, role, over, optional)
        if not checkpoints or not self._can_take_gradients(measurement, checkpoints, optional):
            return
        self._bind_margins(measurement, checkpoints)
        tasks = [self._task(measurement, checkpoint) for checkpoint in checkpoints]
        if optional and not all(task.fingerprint in self.planned for task in tasks):
            return
        for checkpoint, task in zip(checkpoints, tasks, strict=True):
            self._plan(checkpoint, task)
        self.plan.bindings[key] = [task.fingerprint for task in tasks]

    def _measurement(self, column: str, optional: bool) -> Measurement | None:
        """What gives the column; None where nothing does and it is optional."""
        from curate.measurements import MEASUREMENTS, providers

        kind = self.recipe.kind
        measurement = providers(column, kind)
        if measurement is None:
            if optional:
                return None
            known = [c for m in MEASUREMENTS.values() for c in m.columns if m.kind in (kind, "any")]
            raise UsageError(
                f"A score needs the column {column}, which nothing measures on {kind} rows"
                + did_you_mean(column, known, ".", before="; ", show=str)
            )
        measurement = self.directions.targets.in_groups(measurement)
        if measurement.perturbed and self.recipe.sampling.perturb is None:
            if optional:
                return None
            raise UsageError(
                f"A score needs {column}, which is measured on perturbations of the rows: name the function that makes them, "
                "`--set sampling.perturb=package.module:function`."
            )
        return measurement

    def _checkpoints(
        self, measurement: Measurement, column: str, role: str, over: str | None, optional: bool
    ) -> tuple[Checkpoint, ...]:
        """Whose column is meant; () where the recipe has no such model and the column is optional."""
        roles = self.plan.roles
        no_policy = optional and role == "policy" and roles.policy is None
        checkpoints = () if no_policy else roles.of(role, over)
        if measurement.direction is not None and not checkpoints and roles.primary:
            checkpoints = (roles.primary,)  # a series of one
        if checkpoints or optional:
            return checkpoints
        run = next(reversed(recorded_runs(self.store)), None) if over == "checkpoints" else None
        where = (
            "of a training run: set models.checkpoints" if over == "checkpoints" else "of a model: set models.reference"
        )
        recording = f"--set models.checkpoints={PREFIX}{run} --set models.reference=null"
        raise UsageError(
            f"A score needs {column} {where} in the recipe."
            + (f" Or take what was recorded: `{recording}`." if run else "")
        )

    def _can_take_gradients(
        self, measurement: Measurement, checkpoints: tuple[Checkpoint, ...], optional: bool
    ) -> bool:
        """Whether gradients over LoRA matrices, where the recipe asks for those, can be taken of all these checkpoints."""
        if measurement.reads not in ("backward", "direction") or self.recipe.gradients.parameters != "lora":
            return True
        whole = next((checkpoint for checkpoint in checkpoints if checkpoint.base is None), None)
        if whole is None:
            return True
        if optional:
            return False
        raise UsageError(
            f"gradients.parameters is lora, but {whole.label} is a whole model, not a LoRA adapter. Name an adapter's folder "
            "(one saved before the first step will do), or take the gradients over all parameters: `--set gradients.parameters=all`."
        )

    def _bind_margins(self, measurement: Measurement, checkpoints: tuple[Checkpoint, ...]) -> None:
        """The step of DPO weighs every pair by its margin against the reference, so it needs the reference's log-probabilities."""
        direction = measurement.direction
        if direction is None or direction.cosine or self.recipe.kind != "preference":
            return
        if any(self.directions.has_margins(checkpoint) for checkpoint in checkpoints):
            self.bind("chosen_logp", "", None)

    def _task(self, measurement: Measurement, checkpoint: Checkpoint) -> Task:
        direction = measurement.direction
        along = self.directions.identity(direction, checkpoint) if direction else None
        return self.identity.task(measurement, checkpoint, along)

    def _plan(self, checkpoint: Checkpoint, task: Task) -> None:
        """Note that the task is of this checkpoint, and plan it where it is not: for another column, or of a checkpoint with the same weights."""
        of_tokens = task.measurement.reads == "tokens"  # whoever has the same tokenizer has the same tokens
        labels = self.plan.labels.setdefault(task.fingerprint, [])
        label = (checkpoint.run, checkpoint.checkpoint, checkpoint.step)
        if not of_tokens and label not in labels:
            labels.append(label)
        if task.fingerprint in self.planned:
            return
        place = (task.measurement.reads, self.identity.tokenizer(checkpoint) if of_tokens else checkpoint.path)
        self.tasks.setdefault(place, {})[task.fingerprint] = task
        self.checkpoints.setdefault(place, checkpoint)
        self.planned.add(task.fingerprint)
        self._names.add(task.measurement.name)
