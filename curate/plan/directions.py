"""What a recipe's directions in weight space are made of (rows, models, β, Adam's state, targets), their identity, and where they are kept.

    STORE/directions/<id>.safetensors   a gradient, or what P makes of it: 4 bytes a parameter each
    STORE/directions/<id>.json          how far the weights are moved along it, and how exact that is
    STORE/directions/warmup-<id>/       the reference after a warm-up, with Adam's second moments

The folder may be deleted at any time: what is measured stays, what is still to be measured makes them anew. What no recipe of the store uses any
more, since rows or settings have changed, is deleted before the next one is made. G is over every distinct training row once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import ModelError, UsageError
from curate.models.checkpoints import Checkpoint
from curate.plan.targets import Targets, split
from curate.rows import content_id

if TYPE_CHECKING:
    from curate.passes.contract import Direction
    from curate.plan.identity import Identity
    from curate.plan.roles import Roles
    from curate.plan.step import Step, Task
    from curate.recipe.load import Loaded
    from curate.store import Store

OPTIMIZER = "optimizer.pt"
MOMENTS = "second_moments.safetensors"


class Directions:
    """The directions of one recipe. `train`: the names of its training sources, already read into the store."""

    def __init__(self, loaded: Loaded, store: Store, roles: Roles, identity: Identity, train: list[str]):
        self.loaded, self.recipe, self.store = loaded, loaded.recipe, store
        self.roles, self.ids, self.train = roles, identity, train
        self.folder = store.folder / "directions"
        self.pairs = loaded.recipe.kind == "preference"
        self.targets = Targets(loaded, identity.kept, identity.cache.target)

    @cached_property
    def rows(self) -> list[str]:
        """Ids of the training rows, in a fixed order."""
        return self.store.row_ids_of(self.train, kind=self.recipe.kind, role="train")

    @cached_property
    def rows_id(self) -> str:
        return content_id(*sorted(self.rows))

    @property
    def start(self) -> Checkpoint:
        """The model that training begins from: the reference, else the model whose plain columns are shown."""
        model = self.roles.reference or self.roles.primary
        assert model is not None
        return model

    def has_margins(self, checkpoint: Checkpoint) -> bool:
        """Whether a pair's DPO margin is not 0 by definition: the model is not the reference. UsageError where no reference is named."""
        if not self.pairs or checkpoint.fingerprint == self.start.fingerprint:
            return False
        if self.roles.reference is None:
            raise UsageError(
                f"DPO's margins at {checkpoint.label} are against a reference: set models.reference in the recipe."
            )
        return True

    def identity(self, direction: Direction, checkpoint: Checkpoint) -> dict[str, Any]:
        """What a value along a direction depends on, beyond the measured model and how rows become tokens."""
        identity: dict[str, Any] = {"gradient": self.gradient_id(direction.of, checkpoint), "step": direction.step}
        if direction.cosine:
            per = self.targets.named(split(direction.of)[0]).per
            identity |= {"per": per} if per else {}
        elif self.pairs:
            identity["beta"] = str(self.recipe.forecast.beta)
        if not direction.cosine and (margins := self._margins(checkpoint)) is not None:
            identity["reference"] = margins
        if direction.step == "sign" and direction.of != "head":
            identity["taken_at"] = self.gradient_id("step", checkpoint)
        if direction.step == "adam":
            identity["optimizer"] = self.optimizer_id(checkpoint)
        return identity

    def _margins(self, checkpoint: Checkpoint) -> str | None:
        """What DPO's margins are against: the fingerprint of the reference's log-probabilities; None where margins are 0."""
        from curate.measurements import MEASUREMENTS

        if not self.has_margins(checkpoint):
            return None
        return self.ids.task(MEASUREMENTS["likelihood"], self.start).fingerprint

    def gradient_id(self, source: str, checkpoint: Checkpoint) -> str:
        """The identity of a gradient before P. source: a Direction's `of`, or "target.NAME:GROUP"."""
        from curate.measurements.directions import VERSION

        if source.startswith("target."):
            name, group = split(source)
            if group:  # kept as long as its target's
                own = content_id(self.targets.named(name).per, group)
                return f"{self.gradient_id(f'target.{name}', checkpoint)}.{own}"
            about: tuple[Any, ...] = (self.targets.identity(name),)
        elif source == "chosen":
            about = (self.rows_id,)
        else:
            beta = self.recipe.forecast.beta if self.pairs else None
            about = (self.rows_id, beta, self._margins(checkpoint))
        return content_id("gradient", VERSION, source, checkpoint.fingerprint, self._encoding(checkpoint), *about)

    def _encoding(self, checkpoint: Checkpoint) -> list[Any]:
        tokens = self.recipe.tokens
        engine = self.ids.engine("direction", checkpoint)
        encoding = [engine, self.ids.tokenizer(checkpoint), tokens.max_length, tokens.truncation]
        turns = [f"turns {tokens.turns}"] if tokens.turns != "last" else []
        return [*encoding, *turns, self.recipe.gradients.parameters]

    # ---- Adam's state -------------------------------------------------------------------------------------------------------------------

    def warmup(self) -> Checkpoint:
        """The model after the warm-up that curate runs, whether it was run yet or not."""
        forecast, start = self.recipe.forecast, self.start
        if start.base is not None:
            raise UsageError(
                f"{start.label} is a LoRA adapter, and a warm-up trains whole models. Merge it first (peft's merge_and_unload), or take "
                "`at: reference` and a step other than adam."
            )
        settings = forecast.model_dump(exclude={"optimizer"} if self.pairs else {"optimizer", "beta"})
        fingerprint = content_id(
            "warmup", start.fingerprint, self._encoding(start), self.rows_id, self.recipe.engine.seed, settings
        )
        path = self.folder / f"warmup-{fingerprint}"
        return Checkpoint(
            str(path), fingerprint, "", f"{start.label} after {forecast.warmup_steps} steps", start=start.path
        )

    def optimizer(self, checkpoint: Checkpoint) -> Path | Checkpoint:
        """Where Adam's second moments come from: a file, or the warm-up. UsageError where there is neither."""
        given = self.recipe.forecast.optimizer
        if given is not None:
            path = self.loaded.resolve(given)
            if not path.is_file():
                raise UsageError(
                    f"forecast.optimizer: {given} is not a file; give a trainer's saved {OPTIMIZER} (in its checkpoint's folder)."
                )
            return path
        own = Path(checkpoint.path) / OPTIMIZER
        if own.is_file() and not (
            self.pairs and checkpoint.fingerprint == self.start.fingerprint
        ):  # DPO starts a new Adam
            return own
        warmed = self.warmup()
        if checkpoint.fingerprint in (self.start.fingerprint, warmed.fingerprint):
            return warmed
        raise UsageError(
            f"step: adam needs Adam's state at {checkpoint.label}, and there is no {OPTIMIZER} in its folder. Keep it there (the trainer's "
            "save_only_model: false), name one with forecast.optimizer, or take step: sgd."
        )

    def optimizer_id(self, checkpoint: Checkpoint) -> str:
        given = self.recipe.forecast.optimizer
        return self.ids.kept.of_model(f"optimizer {given or ''}", checkpoint, lambda: self._optimizer_id(checkpoint))

    def _optimizer_id(self, checkpoint: Checkpoint) -> str:
        source = self.optimizer(checkpoint)
        if isinstance(source, Checkpoint):
            return source.fingerprint
        try:
            return self.ids.cache.of(source)
        except OSError as problem:
            raise ModelError(f"{source}: the saved optimizer cannot be read ({problem.strerror}).") from None

    def check_optimizers(self, step: Step) -> None:
        """A saved optimizer that is not Adam's of the step's model is an error before anything is loaded. ModelError."""
        missing = {task.fingerprint: task for _, _, tasks in step.blocks for task in tasks}.values()
        if any(task.measurement.direction.step == "adam" for task in missing if task.measurement.direction):
            source = self.optimizer(step.checkpoint)
            if isinstance(source, Path):
                from curate.passes.gradients.adam import check_moments

                parameters = self.recipe.gradients.parameters
                check_moments(source, step.checkpoint.home, base=step.checkpoint.base, parameters=parameters)

    # ---- what is kept -------------------------------------------------------------------------------------------------------------------

    def file(self, name: str, ending: str = "safetensors") -> Path:
        return self.folder / f"{name}.{ending}"

    def sweep(self, tasks: Iterable[Task]) -> None:
        """Delete what neither these tasks nor the last plan of another recipe use, and what a killed process left."""
        mine = {task.fingerprint: task.measured for task in tasks}
        known = {m.fingerprint: m for m in self.store.measured(reads="direction")} | mine
        others = [recipe for recipe in self.store.recipes() if recipe["name"] != self.loaded.name]
        kept = {fingerprint for recipe in others for fingerprint in recipe["uses"]} | mine.keys()
        for m in [known[fingerprint] for fingerprint in kept & known.keys()]:
            kept |= {m.params.get("gradient"), m.params.get("taken_at")}
            kept |= {f"warmup-{m.params.get('optimizer')}", f"warmup-{m.model_fingerprint}"}
        for path in self.folder.glob("*"):
            if path.name.partition(".")[0] not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def ahead(self, step: Step) -> int:
        """What comes before a step's rows, in rows run forward: a gradient counts each of its rows three times."""
        rows, checkpoint, needed = 0, step.checkpoint, set()
        for task in {task.fingerprint: task for _, _, tasks in step.blocks for task in tasks}.values():
            direction = task.measurement.direction
            if direction is None:
                continue
            needed.add(direction.of)
            if direction.step == "sign" and direction.of != "head":
                needed.add("step")
            if direction.step == "adam" or checkpoint.start:
                source = checkpoint if checkpoint.start else self.optimizer(checkpoint)
                if isinstance(source, Checkpoint) and not Path(source.path).is_dir():
                    needed.add("warmup")
        forecast = self.recipe.forecast
        for name in needed:
            if name == "warmup":
                rows += 3 * forecast.warmup_steps * forecast.warmup_rows
            elif not name.startswith("target.") and not self.file(self.gradient_id(name, checkpoint)).is_file():
                rows += (1 if name == "head" else 3) * len(self.rows)
        return rows
