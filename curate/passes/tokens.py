"""Rows as token ids: chat template or plain text, BOS and EOS, where the response starts, shared prefix, truncation.

    conversational   prompt with the generation prompt; response = what the full rendering adds, and no EOS of ours: a template that does not end
                     a reply trains no end, and none is measured
    standard         tokenizer(prompt) and tokenizer(prompt + response + EOS), as TRL does; one BOS at most
    start            longest common token prefix of the prompt alone and the prompt with its response (of a pair: the
                     shorter of the two). A merge across the boundary makes it shorter than the prompt: the response
                     then starts with the merged token.
    shared           longest common token prefix of a pair's two whole sequences: what is encoded once. It may be longer
                     than `start`.

Source: TRL 1.16 `DPOTrainer._prepare_dataset` and `DataCollatorForPreference`, so that sums of log-probabilities equal
TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from curate.errors import ValidationError
from curate.passes.chat import Refused, ids_of, left_out, render, turns, with_context
from curate.passes.chat import as_chat as as_chat
from curate.passes.tokenizer import context_length as context_length
from curate.passes.tokenizer import load_tokenizer as load_tokenizer
from curate.passes.tokenizer import tokenizer_fingerprint as tokenizer_fingerprint
from curate.passes.turns import assistant_tokens, one_bos
from curate.passes.turns import common_prefix as common_prefix
from curate.rows import Example, Message, Pair, Row, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_start", "keep_end", "drop", "error"]
Turns = Literal["last", "all"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How rows become tokens: how long prompt + response may be, and what happens to a longer one. None: no limit.

    keep_start keeps the first `max_length` tokens (TRL's default; EOS goes first), keep_end the last, drop measures
    nothing on the row, error stops with the row's id. chat: rows of plain text are asked and measured through the chat template, as messages.
    turns: of SFT rows of messages, whether the completion alone is measured or every assistant turn (passes/turns.py).
    """

    max_length: int | None = None
    truncation: Truncation = "keep_start"
    chat: bool = False
    turns: Turns = "last"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One SFT row, or one side of a pair. `ids[start:]` are the response tokens that are measured, EOS included; where all assistant turns count,
    the tokens at `counted` are (ascending, each 1 or more), and the completion alone begins at `start`.

    `start` is at least 1: a first token with nothing before it cannot be predicted and counts as context.
    `problem` says why nothing can be measured (None: all is well); `truncated` whether max_length took tokens away.
    `question`, of SFT rows: first and last + 1 index of the last user message's text in the prompt (plain text: all but BOS).
    A row without a completion keeps its prompt's ids, with start = len(ids) and a problem. `left_out`: roles of the turns whose text the chat
    template does not render, those of the response as "reply".
    """

    ids: np.ndarray  # (length,) int32
    start: int
    truncated: bool = False
    problem: str | None = None
    question: tuple[int, int] | None = None
    left_out: tuple[str, ...] = ()
    counted: np.ndarray | None = None

    @property
    def n_response(self) -> int:
        """How many tokens are measured."""
        return max(len(self.ids) - self.start, 0) if self.counted is None else len(self.counted)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Both sides of a preference pair; `shared` is the length of their common token prefix (after truncation)."""

    chosen: Encoded
    rejected: Encoded
    shared: int

    @property
    def problem(self) -> str | None:
        for side, encoded in (("chosen", self.chosen), ("rejected", self.rejected)):
            if encoded.problem:
                return f"{side}: {encoded.problem}"
        return None

    @property
    def truncated(self) -> bool:
        return self.chosen.truncated or self.rejected.truncated

    @property
    def cut_alike(self) -> bool:
        """Whether truncation took away all that tells the responses apart: nothing can be learnt from the pair, its gap of 0 says nothing."""
        return self.truncated and self.problem is None and np.array_equal(self.chosen.ids, self.rejected.ids)

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.chosen.left_out, *self.rejected.left_out)))


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt to sample from: its text as rendered, token ids, and messages (None for plain text)."""

    text: str
    ids: list[int]
    messages: tuple[Message, ...] | None = None
    truncated: bool = False
    problem: str | None = None
    left_out: tuple[str, ...] = ()


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, limits: Limits = Limits()) -> Encoded | EncodedPair:
    """Token ids of one row: an EncodedPair for a pair, an Encoded for an SFT example.

    Rows on which nothing can be measured come back with `problem` set: no completion, a prompt that fills max_length,
    a row longer than max_length under `drop`, messages that the chat template refuses, two responses that become the
    same tokens. ValidationError, naming the row, under truncation `error`; ModelError when a conversational row meets a
    tokenizer without a chat template.
    """
    name, row = row.row_id, as_chat(row) if limits.chat else row
    responses = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)
    try:
        prompt, _ = _ids(tokenizer, row.prompt, template_args=row.template_args)
        if isinstance(row, Example) and row.completion is None:
            return _prompt_only(row, prompt, tokenizer, limits)
        full = [_ids(tokenizer, row.prompt, response, row.template_args) for response in responses]
        counted = _counted(row, full[0][0], tokenizer, limits)
    except Refused as refused:
        nothing = Encoded(np.zeros(0, np.int32), 0, problem=str(refused))
        return EncodedPair(nothing, nothing, 0) if isinstance(row, Pair) else nothing
    start = min(common_prefix(prompt, ids) for ids, _ in full)
    sides = [replace(_limited(ids, start, limits, name, counted), left_out=lost) for ids, lost in full]
    if isinstance(row, Example):
        return _with_question(sides[0], row, prompt, tokenizer, cut=len(full[0][0]) - len(sides[0].ids), limits=limits)
    if limits.truncation == "drop":  # one side too long: the pair is not measured, and both sides say so
        longer = next((side.problem for side in sides if side.problem), None)
        sides = [replace(side, problem=side.problem or longer) for side in sides]
    if full[0][0] == full[1][0]:  # no gap of 0: what tells them apart is not measured
        why = (
            "the chat template leaves out the text that"
            if "reply" in sides[0].left_out
            else "the tokenizer leaves out what"
        )
        alike = f"the same tokens as the other response's: {why} tells them apart"
        sides = [replace(side, problem=side.problem or alike) for side in sides]
    return EncodedPair(sides[0], sides[1], common_prefix(sides[0].ids, sides[1].ids))


def after_examples(row: Example, examples: Sequence[Example]) -> Example:
    """The row with solved examples before its prompt, as a few-shot prompt has them."""
    if isinstance(row.prompt, str):
        return replace(row, prompt=_shots(examples) + row.prompt)
    return replace(row, prompt=with_context(row.prompt, None, examples))


def _shots(examples: Sequence[Example]) -> str:
    return "".join(f"{e.prompt}{e.completion}\n\n" for e in examples)


def encode_prompt(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    few_shot: str | Sequence[Example] | None = None,
    limits: Limits = Limits(),
) -> PromptTokens:
    """The prompt of a row, ready for sampling: generation prompt included, no EOS.

    `system`: a system message (conversational rows that have none), or text before the prompt. `few_shot`: text, or
    solved examples, before the prompt (examples become turns of a conversational row). A prompt of max_length tokens
    or more leaves no room for an answer: keep_end keeps its last max_length − 1 tokens, every other policy sets
    `problem` (error raises): a prompt cut at its end is another question.
    """
    messages: tuple[Message, ...] | None = None
    name, row = row.row_id, as_chat(row) if limits.chat else row
    if isinstance(row.prompt, str):
        shots = few_shot if isinstance(few_shot, str) else _shots(few_shot or ())
        text = (f"{system}\n\n" if system else "") + shots + row.prompt
        source: Text = text
    else:
        messages = with_context(row.prompt, system, few_shot)
        source = messages
        text = ""
    try:
        ids, lost = _ids(tokenizer, source, template_args=row.template_args)
        if messages is not None:
            text = render(tokenizer, messages, template_args=row.template_args)
    except Refused as refused:
        return PromptTokens("", [], messages, problem=str(refused))
    limit = limits.max_length
    if limit is None or len(ids) < limit:
        return PromptTokens(text, ids, messages, left_out=lost)
    too_long = f"the prompt has {len(ids)} tokens, max_length is {limit}: no room for an answer"
    if limits.truncation == "keep_end":
        ids = ids[len(ids) - limit + 1 :]
        return PromptTokens(tokenizer.decode(ids), ids, messages, truncated=True, left_out=lost)
    if limits.truncation == "error":
        raise ValidationError(f"row {name}: {too_long}.\n  {_NEXT_LENGTH}")
    return PromptTokens(text, ids, messages, truncated=True, problem=too_long)


NO_COMPLETION = "the row has no completion"
_NEXT_LENGTH = (
    "Raise it with `--set tokens.max_length=…`, or choose `--set tokens.truncation=keep_start` (or keep_end, drop)."
)


def _prompt_only(row: Example, prompt: list[int], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Encoded:
    """A row that has a prompt and perhaps an answer: something can still be read off its prompt."""
    problem = NO_COMPLETION
    if limits.max_length is not None and len(prompt) > limits.max_length:
        return Encoded(np.zeros(0, np.int32), 0, truncated=True, problem=problem)
    encoded = Encoded(np.asarray(prompt, np.int32), len(prompt), problem=problem)
    return _with_question(encoded, row, prompt, tokenizer, cut=0, limits=limits)


def _with_question(
    encoded: Encoded, row: Example, prompt: list[int], tokenizer: PreTrainedTokenizerBase, *, cut: int, limits: Limits
) -> Encoded:
    """The same with the span of its question, as far as truncation left it. cut: how many ids truncation took."""
    span = _question_span(row, prompt, tokenizer)
    if span is None:
        return encoded
    shift = cut if limits.truncation == "keep_end" else 0
    low, high = (min(max(at - shift, 0), encoded.start) for at in span)
    return replace(encoded, question=(low, high)) if high > low else encoded


def _question_span(row: Example, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Where the last user message's text stands in the prompt's ids: what changes when that text is left out."""
    prompt = row.prompt
    if isinstance(prompt, str):
        low = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
        return (low, len(ids)) if low < len(ids) else None
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=None)
    if last is None:
        return None
    emptied = tuple({**m, "content": ""} if i == last else m for i, m in enumerate(prompt))
    try:
        without, _ = _ids(tokenizer, emptied, template_args=row.template_args)
    except Refused:
        return None
    low = common_prefix(ids, without)
    after = min(common_prefix(ids[::-1], without[::-1]), len(without) - low, len(ids) - low)
    return (low, len(ids) - after) if len(ids) - after > low else None


def _counted(row: Row, ids: list[int], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> np.ndarray | None:
    """The positions of all assistant turns' tokens, where they count; None where the completion alone does."""
    if limits.turns == "last" or isinstance(row, Pair) or row.completion is None or isinstance(row.prompt, str):
        return None
    return assistant_tokens(tokenizer, (*row.prompt, *turns(row.completion)), ids, row.template_args)


def _limited(ids: list[int], start: int, limits: Limits, name: str, counted: np.ndarray | None = None) -> Encoded:
    """Truncation of one sequence. start: index of its first response token in `ids`. name: the row's id. counted: as in `Encoded`."""
    limit, length = limits.max_length, len(ids)
    truncated = limit is not None and length > limit
    problem = None
    if limit is not None and truncated:
        if limits.truncation == "error":
            raise ValidationError(
                f"row {name}: prompt and response have {length} tokens, max_length is {limit}.\n  {_NEXT_LENGTH}"
            )
        if limits.truncation == "drop":
            problem = f"{length} tokens, max_length is {limit}"
        elif limits.truncation == "keep_start":
            if start >= limit and counted is None:
                problem = f"the prompt alone has {start} tokens, max_length is {limit}: nothing of the response is left"
            ids = ids[:limit]
        else:
            ids, start = ids[length - limit :], max(start - (length - limit), 0)
            counted = None if counted is None else counted - (length - limit)
    start = min(max(start, 1), len(ids))
    if counted is not None:
        counted = counted[(counted >= 1) & (counted < len(ids))]
    if problem is None and not (start < len(ids) if counted is None else len(counted)):
        problem = "the response has no tokens that can be predicted"
        if counted is not None:
            problem = f"no token of an assistant turn is {'left within max_length' if truncated else 'there'}"
    return Encoded(np.asarray(ids, np.int32), start, truncated, problem, counted=counted)


def _ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, response: Text | None = None, template_args: str = ""
) -> tuple[list[int], tuple[str, ...]]:
    """Ids of a prompt (generation prompt included), or of a prompt with its response, and what the template leaves out of them.

    Plain text ends with EOS, as TRL appends it; of messages the template says how they end.
    """
    lost: tuple[str, ...] = ()
    if isinstance(prompt, str):
        ids = _plain_ids(tokenizer, prompt, None if response is None else str(response))
    elif response is None:
        text = render(tokenizer, prompt, template_args=template_args) if prompt else ""
        ids, lost = ids_of(tokenizer, text) if prompt else [], tuple(left_out(prompt, text))
    else:
        reply = turns(response)
        text = render(tokenizer, (*prompt, *reply), generation_prompt=False, template_args=template_args)
        ids = ids_of(tokenizer, text)
        lost = (*left_out(prompt, text), *left_out(reply, text, of_reply=True))
    return one_bos(ids, tokenizer.bos_token_id), tuple(dict.fromkeys(lost))


def _plain_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str | None) -> list[int]:
    eos, text = tokenizer.eos_token_id, prompt
    if response is not None:
        text += response
        if tokenizer.eos_token and not response.endswith(tokenizer.eos_token):
            text += tokenizer.eos_token
    ids = list(tokenizer(text=text, verbose=False)["input_ids"])
    while len(ids) > 1 and eos is not None and ids[-1] == ids[-2] == eos:  # a tokenizer that appends EOS by itself
        ids.pop()
    if response is not None and eos is not None and not (ids and ids[-1] == eos):
        ids.append(eos)
    return ids
