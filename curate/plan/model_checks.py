"""What is known of a plan's models before any of them runs: tokens without embeddings, quantised weights, what their chat templates leave out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from curate.errors import BrokenCheckpoint, ModelError
from curate.models.layouts import read_config
from curate.plan.embeddings import check_tokenizer
from curate.plan.rendered_rows import LOOKED_AT, look, lost_text
from curate.plan.rendering import Renderings

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.plan.plan import Plan
    from curate.plan.step import Step
    from curate.store import Store

NEEDS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
}


def check_models(plan: Plan, renderings: Renderings, store: Store, sources: Sequence[str]) -> list[str]:
    """What a user should know of the models that a plan measures, a line each. ModelError for what a pass would fail on."""
    checkpoints: dict[str, Checkpoint] = {}
    for step in plan.steps:
        checkpoints.setdefault(step.checkpoint.path, step.checkpoint)
    notes = renderings.notes(checkpoints.values())
    seen: set[tuple[str, str]] = set()
    for step in plan.steps:
        if not step.missing or step.reads == "tokens" or not Path(step.checkpoint.home).is_dir():
            continue  # counting tokens runs no model
        _check_quantised(step)
        files = (step.checkpoint.tokenizer, step.checkpoint.base or step.checkpoint.home)
        if files not in seen:
            seen.add(files)
            notes += check_tokenizer(step.checkpoint, renderings.cache, store, sources)
    missing: dict[
        str, Checkpoint
    ] = {}  # of every tokenizer one model that has it: checkpoints have the same one, most often
    for step in plan.steps:
        if step.missing and Path(step.checkpoint.home).is_dir():
            missing.setdefault(str(step.tasks[0].measured.params.get("tokenizer")), step.checkpoint)
    for checkpoint in missing.values():
        notes += _left_out(checkpoint, renderings, store, sources)
    return list(dict.fromkeys(notes))


def _left_out(checkpoint: Checkpoint, renderings: Renderings, store: Store, sources: Sequence[str]) -> list[str]:
    """What the checkpoint's template leaves out of up to LOOKED_AT rows, evenly from all."""
    from curate.passes.tokenizer import load_tokenizer

    rendering = renderings.of(checkpoint)
    if rendering.template is None or not (rendering.chat or rendering.messages):
        return []
    rows = store.sql(
        "SELECT row_id, style FROM rows WHERE prompt IS NOT NULL AND kind = ? ORDER BY position",
        [renderings.loaded.recipe.kind],
        source=list(sources) or None,
    )
    ids = [r for r, style in rows.iter_rows() if rendering.chat or style == "conversational"]
    shown = ids[:: max(1, -(-len(ids) // LOOKED_AT))]
    known = [(row_id, row) for row_id, row in zip(shown, store.iter_rows(shown), strict=True) if row is not None]
    examples = [row for _, row in known]
    first: dict[str, int] = {}
    counts = look(examples, load_tokenizer(checkpoint.tokenizer), chat=rendering.chat, first=first)
    names = {what: _row_name(store, known[i][0], sources) for what, i in first.items()}
    return lost_text(counts, len(examples), len(ids), Path(checkpoint.tokenizer).name, names)


def _row_name(store: Store, row_id: str, sources: Sequence[str]) -> str:
    """Where a row occurs first: its source, and its number from 1."""
    at = store.sql(
        "SELECT source, index FROM occurrences WHERE row_id = ? ORDER BY source, index LIMIT 1",
        [row_id],
        source=list(sources) or None,
    )
    return f"{at['source'][0]}, row {at['index'][0] + 1}" if len(at) else row_id


def _check_quantised(step: Step) -> None:
    """ModelError for a gradient of quantised weights, and for a kind of them that nothing here can load. Sampling engines know their own."""
    home = Path(step.checkpoint.base or step.checkpoint.home)
    try:
        config = read_config(home / "config.json").get("quantization_config")
    except (OSError, BrokenCheckpoint):
        return
    if not isinstance(config, dict) or step.reads in ("tokens", "sample"):
        return
    method = str(config.get("quant_method") or "quantised")
    if step.reads in ("backward", "direction"):
        raise ModelError(
            f"{step.checkpoint.label}: its weights are quantised ({method}), and gradients over them are not those of the model. Name the model that "
            "it was quantised from (of a QLoRA adapter: models.base)."
        )
    package = NEEDS.get(method)
    if package and importlib.util.find_spec(package) is None:
        raise ModelError(
            f"{step.checkpoint.label}: its weights are quantised ({method}), and {package}, which loads them, is not installed here. Name the model "
            f"that it was quantised from, or install {package}."
        )
