"""Rows that are longer than the positions that a model was trained on, which `tokens.max_length` lets through."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.cost import CHARACTERS_PER_TOKEN
from curate.fingerprints import FingerprintCache

if TYPE_CHECKING:
    from curate.plan import Plan
    from curate.recipe import Loaded
    from curate.store import Store

FORWARD = ("forward", "neighbours", "backward", "direction")  # passes over whole rows; samplers keep to the context


def beyond_positions(loaded: Loaded, store: Store, plan: Plan, sources: dict[str, list[str]]) -> list[str]:
    """A sentence for every number of positions (config: max_position_embeddings) that measured rows go past; models without a limit have none.

    Lengths are the tokens counted so far, of rows that can be measured; before any is counted, an estimate from the rows' characters.
    """
    cache = FingerprintCache(store.folder / "weights.json")
    limit = loaded.recipe.tokens.max_length
    counts = {
        task.measured.params["tokenizer"]: task.fingerprint
        for step in plan.steps
        for task in step.tasks
        if "prompt_tokens" in task.measurement.columns
    }
    found: dict[tuple[int, str], list[str]] = {}  # (positions, fingerprint of the token counts) -> models
    for step in plan.steps:
        counted = counts.get(step.tasks[0].measured.params.get("tokenizer", ""))
        if step.reads in FORWARD and counted and Path(step.subject.home).is_dir():
            positions = cache.positions(Path(step.subject.base or step.subject.home))
            if positions is not None and (limit is None or positions < limit):
                found.setdefault((positions, counted), []).append(step.subject.label)
    names = [name for group in sources.values() for name in group]
    notes = []
    for (positions, counted), models in found.items():
        lengths, about = _lengths(store, counted, names, loaded.recipe.kind)
        if longer := int((lengths > positions).sum()):
            of = models[0] if len(set(models)) == 1 else f"{models[0]} and {len(set(models)) - 1:,} more"
            notes.append(
                f"{about}{longer:,} of {len(lengths):,} rows are longer than the {positions:,} positions of {of}: their values are beyond what it "
                f"was trained on. Set `tokens.max_length: {positions}`."
            )
    return notes


def _lengths(store: Store, counted: str, sources: list[str], kind: str) -> tuple[np.ndarray, str]:
    """(rows,) tokens of every row, NaN where nothing is measured on it; and how the sentence begins where they are estimated."""
    sides = ("chosen_tokens", "rejected_tokens") if kind == "preference" else ("completion_tokens",)
    row_ids = store.row_ids_of(sources, kind=kind)
    tokens = store.columns(counted, ("prompt_tokens", *sides), row_ids)
    if np.isnan(tokens["prompt_tokens"]).all():
        characters = store.sql(
            "SELECT length(concat(prompt, completion)) + greatest(length(concat(chosen)), length(concat(rejected))) AS n FROM rows "
            "WHERE prompt IS NOT NULL AND kind = ?",
            [kind],
            source=sources or None,
        )["n"]
        return characters.to_numpy() / CHARACTERS_PER_TOKEN, "By their characters about "
    lengths = tokens["prompt_tokens"] + np.max([tokens[side] for side in sides], axis=0)
    problems = store.texts(counted, "token_problem", row_ids)
    return np.where([problem is None for problem in problems], lengths, np.nan), ""
