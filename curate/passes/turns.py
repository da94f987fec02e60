"""Where the assistant's turns stand among a conversation's tokens: what is measured where every one of them counts (`tokens.turns: all`).

    a template with {% generation %}    the tokens that transformers' assistant mask marks, which are those that TRL's `assistant_only_loss` trains
    any other                           of each assistant turn what it adds behind the conversation before it and the generation prompt, by rendering
                                        both; the row is refused where a turn is rendered otherwise once other turns follow it

Source: transformers' `apply_chat_template(return_assistant_tokens_mask=True)`, as TRL 1.16 calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from curate.passes.chat import Refused, ids_of, marks_turns, render, template_arguments
from curate.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Length of the longest common token prefix of two sequences of ids."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ids: Sequence[int], template_args: str
) -> np.ndarray:
    """(n,) the ascending positions in `ids` of the assistant's tokens. ids: of the whole conversation. Refused where they cannot be known."""
    if marks_turns(tokenizer):
        return _by_markers(tokenizer, messages, ids, template_args)
    return _by_rendering(tokenizer, messages, ids, template_args)


def _by_markers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ids: Sequence[int], template_args: str
) -> np.ndarray:
    if not tokenizer.is_fast:  # transformers knows where a token stands in the text of fast ones alone
        raise Refused("which tokens are the assistant's is not known of a slow tokenizer (tokens.turns: all)")
    rendered = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **template_arguments(tokenizer, template_args),
    )
    shift = len(rendered["input_ids"]) - len(ids)  # a doubled BOS is once in ours
    return np.flatnonzero(rendered["assistant_masks"][shift:])


def _by_rendering(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ids: Sequence[int], template_args: str
) -> np.ndarray:
    def rendered(n: int, *, generation_prompt: bool) -> list[int]:
        text = render(tokenizer, messages[:n], generation_prompt=generation_prompt, template_args=template_args)
        return one_bos(ids_of(tokenizer, text), tokenizer.bos_token_id)

    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        whole = rendered(i + 1, generation_prompt=False)
        before = rendered(i, generation_prompt=True) if i else _opening(whole, rendered(1, generation_prompt=True))
        if common_prefix(whole, ids) < len(whole):
            raise Refused(
                f"the chat template renders turn {i + 1} otherwise once other turns follow it, so where it stands is not known (tokens.turns: all); "
                "take a template with {% generation %} around what the assistant says"
            )
        spans.append(np.arange(common_prefix(before, ids), len(whole)))
    return np.unique(np.concatenate(spans)) if spans else np.zeros(0, int)


def _opening(whole: list[int], asked: list[int]) -> list[int]:
    """What stands before the text of a first turn that is the assistant's, where there is no conversation to render up to it: all up to the
    template's words for a turn of the assistant's. whole: the turn. asked: the turn with the generation prompt behind it.
    """
    words = asked[len(whole) :] if asked[: len(whole)] == whole else []
    for end in range(len(words), len(whole) + 1) if words else ():
        if whole[end - len(words) : end] == words:
            return whole[:end]
    raise Refused(
        "the conversation begins with a turn of the assistant's, and where its text begins is not known (tokens.turns: all); "
        "take a template with {% generation %} around what the assistant says"
    )


def one_bos(ids: list[int], bos: int | None) -> list[int]:
    """The ids with BOS once where it begins them several times."""
    while len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        ids.pop(0)
    return ids
