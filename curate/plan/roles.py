"""Whom a recipe measures: its reference, its policy, the checkpoints of its run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from curate.errors import UsageError
from curate.models.checkpoints import Checkpoint, find_checkpoints, single_model
from curate.models.fingerprints import FingerprintCache
from curate.models.layouts import check_pickles
from curate.plan.kept import Kept
from curate.plan.recorded import PREFIX
from curate.plan.servers import Servers
from curate.rows import content_id

if TYPE_CHECKING:
    from curate.recipe.load import Loaded


@dataclass(frozen=True)
class Roles:
    """Whom the recipe measures. series: in step order, the reference as step 0 of a training run if both are given (kind sft).

    primary: whose values columns without a role are: the last of the series for kind sft, the reference for preference pairs. skipped: what was
    wrong with
    checkpoints that were left out. warmup: the primary one after the warm-up that curate runs.
    """

    reference: Checkpoint | None
    policy: Checkpoint | None
    series: tuple[Checkpoint, ...]
    primary: Checkpoint | None
    skipped: tuple[str, ...] = ()
    warmup: Checkpoint | None = None

    @property
    def folders(self) -> list[str]:
        """Where the whole models are, of an adapter its base."""
        return [one.base or one.path for one in (self.reference, self.policy, *self.series) if one is not None]

    def of(self, role: str, over: str | None) -> tuple[Checkpoint, ...]:
        """The checkpoints whose column a need means."""
        if role == "policy":
            if self.policy is None:
                raise UsageError("A score needs a second model: set models.policy in the recipe.")
            return (self.policy,)
        if role == "warmup" and self.warmup is not None:
            return (self.warmup,)
        if role:
            raise UsageError(
                f"{role!r} is not a model of a recipe; a need is a column, `policy.column` or `row.column`."
            )
        if over == "checkpoints":
            return self.series
        return (self.primary,) if self.primary else ()


def find_roles(
    loaded: Loaded, cache: FingerprintCache, servers: Servers | None = None, kept: Kept | None = None
) -> Roles:
    """The recipe's models. Raises ModelError for what cannot be read. servers: who asks the recipe's server (None: it is not asked). kept: what is
    known of models that are not there.
    """
    models, folder = loaded.recipe.models, loaded.folder
    kept = kept or Kept()
    if isinstance(models.checkpoints, str) and models.checkpoints.startswith(PREFIX):  # nobody kept them
        return Roles(None, None, (), None)
    server = loaded.recipe.engine.sampler == "openai"
    if server and not models.reference and not models.checkpoints:

        def ask() -> list[str]:
            served = (servers or Servers(loaded, loaded.store)).of()
            return [served.id, served.model]

        about = loaded.recipe.server
        id, name = kept.ask(f"served by {about.url} {about.model or ''}", ask, before=True)
        # no path: a server often names a model by a folder, which may be here too
        lone = Checkpoint(f"served:{name}", content_id("served", id), "", name)
        return Roles(lone, None, (), lone)
    skipped: list[str] = []
    skip = skipped.append if models.on_broken_checkpoint == "skip" else None
    listed = models.checkpoints
    if listed is not None and not isinstance(listed, str | list):
        listed = [f"{listed.repo}@{revision}" for revision in listed.revisions]

    def checkpoints(asked: str | list[str]) -> list[Checkpoint]:
        return find_checkpoints(asked, folder, cache, base=models.base, skip=skip)

    def single(role: str, name: str | None) -> Checkpoint | None:
        if not name:
            return None
        return kept.model(role, name, models.base, folder, lambda: single_model(name, folder, cache, base=models.base))

    series = tuple(kept.series(listed, models.base, folder, checkpoints)) if listed else ()
    reference, policy = single("reference", models.reference), single("policy", models.policy)
    of_run = {s.fingerprint: s for s in series}  # a checkpoint keeps its run's name whatever else it is used as
    policy = policy and of_run.get(policy.fingerprint, policy)
    if reference and loaded.recipe.kind == "preference":
        reference = of_run.get(reference.fingerprint, reference)
    if reference and series and loaded.recipe.kind == "sft":
        first = next((s for s in series if s.step == 0), None)
        if first is not None and first.fingerprint != reference.fingerprint:
            raise UsageError(
                f"models.reference would be step 0 of the run, but {first.label} is, with other weights. Leave models.reference out."
            )
        series = series if first else (replace(reference, run=series[0].run, step=0, rate=series[0].rate), *series)
    elif reference and loaded.recipe.kind == "sft":
        series = (replace(reference, step=0),)
    if server and len(series) > 1:
        raise UsageError(
            "engine.sampler is openai and there are several checkpoints, but a server serves one model. Use sampler vllm, or one model."
        )
    met = [one for one in (reference, policy, *series) if one is not None]
    check_pickles([folder for one in met for folder in (one.path, one.base)], allowed=models.allow_pickle)
    last = series[-1] if series else None
    primary = reference or last if loaded.recipe.kind == "preference" else last
    return Roles(reference, policy, series, primary, tuple(skipped))
