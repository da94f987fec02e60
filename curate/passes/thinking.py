"""What a model thinks before it answers: told apart from the answer by the tags around it, and kept to a budget.

    <think> 7 · 6 is 42 </think> The answer is 42.        reasoning " 7 · 6 is 42 ", answer " The answer is 42."
    a prompt that ends with <think>                       the answer begins in its thinking
    no </think>                                           all of it is thinking: there is no answer

Source: how vLLM's reasoning parsers and the chat templates of Qwen3, DeepSeek R1 and Magistral have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tags = tuple[str, str]  # what opens and what closes a model's thinking
KNOWN_TAGS: tuple[Tags, ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


def tags_of(tokenizer: PreTrainedTokenizerBase) -> Tags | None:
    """The tags that a model thinks in, by its chat template or its vocabulary; None where neither has any that is known."""
    template, vocabulary = str(getattr(tokenizer, "chat_template", None) or ""), tokenizer.get_vocab()
    for opening, closing in KNOWN_TAGS:
        if closing in template or (opening in vocabulary and closing in vocabulary):
            return opening, closing
    return None


def opens(prompt: str, tags: Sequence[str] | None) -> bool:
    """Whether an answer to this prompt begins in the model's thinking."""
    return tags is not None and prompt.rstrip().endswith(tags[0])


def has_tags(text: str) -> bool:
    """Whether a text closes, or begins, a thinking of the kinds that are known."""
    return any(closing in text or text.lstrip().startswith(opening) for opening, closing in KNOWN_TAGS)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Every token that a decoded text leaves out: those with a name, and those that the vocabulary marks as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}


def without_special(text: str, tokenizer: PreTrainedTokenizerBase, shown: Sequence[str]) -> str:
    """A text that was decoded with its special tokens, without those that are not `shown`."""
    for token in special_tokens(tokenizer).difference(shown):
        text = text.replace(token, "")
    return text


def split(text: str, tags: Sequence[str] | None, *, opened: bool = False) -> tuple[str | None, str]:
    """(reasoning, answer) of a sampled text: None where it has no reasoning, and no answer, "", where the thinking is not closed.

    opened: the prompt has opened the thinking already.
    """
    if tags is None:
        return None, text
    opening, closing = tags
    if closing in text:
        reasoning, _, answer = text.partition(closing)
        return reasoning.partition(opening)[2] if reasoning.lstrip().startswith(opening) else reasoning, answer
    if opened or text.lstrip().startswith(opening):
        return text.partition(opening)[2] if text.lstrip().startswith(opening) else text, ""
    return None, text
