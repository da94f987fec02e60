"""What is said of rows that are too long: for `tokens.max_length`, which leaves nothing of them to measure, or for a model's positions, which that
lets through.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from curate.models.fingerprints import FingerprintCache
from curate.plan.step import FORWARD

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.plan.plan import Plan
    from curate.recipe.load import Loaded
    from curate.store import Store


def beyond_positions(loaded: Loaded, store: Store, plan: Plan) -> list[str]:
    """A sentence for every number of positions (config: max_position_embeddings) that measured rows go past; models without a limit have none.

    Lengths are the tokens counted so far, of rows that can be measured; before any is counted, an estimate from the rows' characters.
    """
    cache = FingerprintCache(store.folder / "weights.json")
    limit = loaded.recipe.tokens.max_length
    by_length: dict[tuple[int, str], list[Checkpoint]] = {}  # (positions, fingerprint of the tokenizer) -> models
    for step in plan.steps:
        tokenizer = step.tasks[0].measured.params.get("tokenizer", "")
        if step.reads in FORWARD and Path(step.checkpoint.home).is_dir():
            positions = cache.positions(Path(step.checkpoint.base or step.checkpoint.home))
            if positions is not None and (limit is None or positions < limit):
                by_length.setdefault((positions, tokenizer), []).append(step.checkpoint)
    notes = []
    for (positions, tokenizer), models in by_length.items():
        assert plan.lengths is not None
        lengths = plan.lengths.of(tokenizer, models[0])
        if longer := int((lengths.longest[lengths.measurable] > positions).sum()):
            labels = {model.label for model in models}
            whose = models[0].label if len(labels) == 1 else f"{models[0].label} and {len(labels) - 1:,} more"
            notes.append(
                f"{lengths.about}{longer:,} of {len(lengths.row_ids):,} rows are longer than the {positions:,} positions of {whose}: their values "
                f"are beyond what it was trained on. Set `tokens.max_length: {positions}`."
            )
    return notes


def unmeasurable_rows(loaded: Loaded, plan: Plan) -> list[str]:
    """A sentence on the missing rows on which nothing can be measured: known from their tokens, or expected from their characters."""
    tokens = loaded.recipe.tokens
    known = max((step.unmeasurable for step in plan.steps), default=0)
    perhaps = max((step.perhaps_unmeasurable for step in plan.steps), default=0)
    notes = []
    if known:
        notes.append(
            f"{known:,} rows cannot be measured, and are not missing: the column token_problem of `scored` says why."
        )
    if perhaps:
        notes.append(
            f"By their characters about {perhaps:,} of the missing rows cannot be measured (max_length {tokens.max_length}, truncation "
            f"{tokens.truncation}): tokens and time are without them."
        )
    return notes
