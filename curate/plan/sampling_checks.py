"""Whether a model can be sampled as the recipe says, known before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.errors import UsageError

if TYPE_CHECKING:
    from curate.plan.rendering import Rendering
    from curate.recipe.sections import Sampling


def check_sampling(sampling: Sampling, rendering: Rendering, model: str) -> None:
    """UsageError for settings of a template that no prompt goes through, and for a budget of thinking whose end is not known."""
    through_template = rendering.chat or rendering.messages
    if sampling.chat_template_kwargs and not through_template:
        raise UsageError(
            "sampling.chat_template_kwargs are read by a chat template, and these rows are asked as plain text. Ask them as a chat "
            "(`--set tokens.chat=always`), or take the settings out (`--set sampling.chat_template_kwargs={}`)."
        )
    if sampling.thinking_tokens is None or isinstance(sampling.thinking_tags, list):
        return
    if not through_template or rendering.template is None or rendering.template.thinks_in is None:
        raise UsageError(
            f"sampling.thinking_tokens: what closes the thinking of {model} is not known from its chat template or vocabulary. Name it "
            '(`--set sampling.thinking_tags=\'["<think>", "</think>"]\'`), or leave the budget out.'
        )
