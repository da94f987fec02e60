"""What scores and selections are made of, as a hash: whoever reads them can tell whether they are of the recipe as it is now."""

from __future__ import annotations

from typing import Any, Literal

from curate.errors import UsageError
from curate.plan.plan import Plan
from curate.recipe.load import Loaded
from curate.rows import content_id
from curate.store import Store
from curate.workflow.spec import seed_of

Sources = dict[str, list[str]]  # role -> the names of the recipe's sources


def scores_hash(store: Store, plan: Plan, sources: Sources, *, missing: int) -> str:
    """What scores are computed from: the scores with their settings, the measurements that they read, the rows and what is missing of them, and
    imported held-out accuracies where they set a threshold. missing: rows that are not measured when scores are computed.
    """
    from curate.workflow.thresholds import calibrates, imported_accuracies

    bindings = sorted((*map(str, key), *fingerprints) for key, fingerprints in plan.bindings.items())
    requested: list[tuple[Any, ...]] = []
    for want in plan.wanted:
        version = [want.score.version] if want.score.version > 1 else []
        requested.append((want.name, want.score.name, want.params, *version))
    names = {name for group in sources.values() for name in group}
    rows = sorted((s["role"], s["source"], s["fingerprint"]) for s in store.sources() if s["source"] in names)
    heldout = [sorted(imported_accuracies(store).items(), key=str)] if calibrates(plan.wanted) else []
    return content_id(requested, bindings, rows, missing, *heldout)


def selection_hash(loaded: Loaded, of_scores: str) -> str:
    """What a selection is made of: the scores, by their hash, and the recipe's `select`."""
    asked = loaded.recipe.select
    assert asked is not None
    random = [seed_of(loaded)] if asked.is_random else []
    return content_id(of_scores, asked.settings(), *random)


def check_current(
    loaded: Loaded, store: Store, what: Literal["scores", "selection"], inputs_hash: str, step: str
) -> None:
    """UsageError where scores, or a selection, are there that other settings made: no basis for a selection, or for an export."""
    if store.inputs_hash(what, loaded.name) not in (None, inputs_hash):
        raise UsageError(
            f"{store.folder}: what is there as {what} of {loaded.name!r} comes from other settings, rows or measurements than the recipe has now. "
            f"`curate {step} {loaded.path}` makes that anew, `curate run {loaded.path}` does all steps."
        )
