"""What a run gives to the store when it is whole: which values are the recipe's, its scores, its selection.

Until then the views show what the last whole run left. A step that has to see what this run made before that stages it under a name of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curate.plan.plan import Plan
from curate.plan.recorded import recorded_runs
from curate.recipe.load import Loaded
from curate.store import DatasetValue, Store
from curate.store.sharing import placed
from curate.workflow.inputs import Sources

if TYPE_CHECKING:
    from curate.store import Measured, Selection
    from curate.workflow.select import Decisions


@dataclass(frozen=True)
class Scored:
    """What a recipe's scores are, before the store has them."""

    row_ids: list[str]
    scores: dict[str, Any]
    trajectories: list[Any]
    values: list[DatasetValue]
    inputs_hash: str
    warnings: list[str]

    def write(self, store: Store, recipe: str, *, staged: bool = False) -> None:
        inputs_hash = None if staged else self.inputs_hash
        store.write_scores(recipe, self.row_ids, self.scores, trajectories=self.trajectories, inputs_hash=inputs_hash)
        store.write_dataset_values(recipe, self.values)


@dataclass(frozen=True)
class Decided:
    """What a selection is, before the store has it."""

    decisions: Decisions
    control: Any
    spec: dict[str, Any]
    inputs_hash: str

    def write(self, store: Store, recipe: str) -> Selection:
        made = {"recipe": recipe, "spec": self.spec, "inputs_hash": self.inputs_hash, "control": self.control}
        return store.write_selection(recipe, self.decisions, **made)


def register(loaded: Loaded, store: Store, plan: Plan, sources: Sources) -> None:
    """Say which values are the recipe's, inside a transaction: from its end on the views show them."""
    names = [name for group in sources.values() for name in group]
    store.take_sources(names)
    renamed = _renamed(store, plan)
    if renamed:
        store.remember(renamed)
    store.register_recipe(loaded.name, placed(loaded, store), sources=names, **_views(store, plan), roles=sources)


def stage(loaded: Loaded, store: Store, plan: Plan, sources: Sources) -> str:
    """The recipe's views as they will be, under the name that is returned, until `Store.unstage_recipe`; inside a transaction."""
    return store.stage_recipe(loaded.name, **_views(store, plan), roles=sources)


def _renamed(store: Store, plan: Plan) -> list[Measured]:
    """What was measured of a model of its own before, or in another run, and is now of a checkpoint of this one."""
    kept = {m.fingerprint: (m.run, m.checkpoint, m.step) for m in store.measured()}
    renamed = []
    for step in plan.steps:
        for task in step.tasks:
            own = task.measured
            if own.run and kept.get(own.fingerprint) not in (None, (own.run, own.checkpoint, own.step)):
                renamed.append(own)
    return renamed


def _views(store: Store, plan: Plan) -> dict[str, Any]:
    """What a recipe's views may show: as `Store.register_recipe` takes it."""
    used: dict[str, None] = {}  # in their order, each once
    primary: dict[str, None] = {}
    for (role, _, over), fingerprints in plan.bindings.items():
        used.update(dict.fromkeys(fingerprints))
        if not role and over is None:
            primary[fingerprints[-1]] = None
    if plan.recorded:
        used.update(dict.fromkeys(m.fingerprint for m in recorded_runs(store)[plan.recorded]))
    has_primary = plan.steps or plan.recorded
    return {"uses": list(used), "plain": list(primary) if has_primary else [], "places": plan.labels}
