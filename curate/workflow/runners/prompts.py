"""What is asked of a sampling engine: the recipe's settings, a row's prompt for a server's own tokenizer; and what is said of answers that it cut."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from curate.rows import Row, text_of

if TYPE_CHECKING:
    from curate.passes.sampling.types import Sampling
    from curate.recipe.sections import Sampling as RecipeSampling


def sampling_of(recipe: RecipeSampling, n: int) -> Sampling:
    """How a recipe samples n answers a prompt."""
    from curate.passes.sampling.types import Sampling

    return Sampling(
        n,
        recipe.temperature,
        recipe.top_p,
        recipe.max_new_tokens,
        tuple(recipe.stop),
        top_k=recipe.top_k,
        min_p=recipe.min_p,
        repetition_penalty=recipe.repetition_penalty,
        extra_body=recipe.extra_body,
    )


def with_template_settings(row: Row, settings: Mapping[str, Any]) -> Row:
    """The row with `settings` for the chat template, beneath its own."""
    if not settings:
        return row
    own = json.loads(row.template_args) if row.template_args else {}
    merged = {**own, "chat_template_kwargs": {**settings, **own.get("chat_template_kwargs", {})}}
    return replace(row, template_args=json.dumps(merged, ensure_ascii=False))


def plain_prompt(row: Row, seed: int, system: str | None, few_shot: str | None) -> Any:
    """A prompt for a server whose tokenizer is its own."""
    from curate.passes.chat import with_context
    from curate.passes.sampling.types import Prompt

    if isinstance(row.prompt, str):
        parts = [f"{system}\n\n" if system else "", few_shot or "", row.prompt]
        return Prompt([], "".join(parts), None, seed)
    messages = with_context(row.prompt, system, few_shot)
    return Prompt([], "\n".join(map(text_of, messages)), messages, seed, template_args=row.template_args)


def cut_notes(counts: Mapping[str, int], model: str, recipe: RecipeSampling) -> list[str]:
    """What is said of answers that were cut. counts: of `answers`, of those `cut`, and of those of them that are `unfinished`."""
    answers, cut, unfinished = counts["answers"], counts["cut"], counts["unfinished"]
    if not cut:
        return []
    counted = "left out of n_samples and accuracy" if recipe.unfinished == "leave_out" else "wrong for accuracy"
    graded = [
        f"{unfinished:,} of them before they gave an answer: unfinished, and {counted} (sampling.unfinished)"
    ] * bool(unfinished)
    graded += [f"{'the others' if unfinished else 'all'} are graded as they stand"] * (unfinished < cut)
    text = f"{cut:,} of {answers:,} answers of {model} were cut at max_new_tokens {recipe.max_new_tokens} (n_unfinished); {'; '.join(graded)}."
    if 10 * cut < 9 * answers:
        return [text]
    return [
        f"Warning: {text} Raise it with `--set sampling.max_new_tokens=…`, or say where an answer ends: `sampling.stop`."
    ]
