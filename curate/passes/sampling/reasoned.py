"""Samples of a model that thinks before it answers: reasoning and answer apart (passes/thinking.py), and its thinking within a budget.

    up to `tokens` tokens            as sampled
    still thinking then              the closing tag is written for the model, and it answers with the rest of max_new_tokens
    anything else that was cut       goes on where it was

What is written for the model is in neither n_tokens nor logp. The second part of an answer has random numbers of its own, so it is a draw of the
model's own distribution after the first. Source: the budget of Qwen3 (arXiv:2505.09388, section 4.7), and s1's forcing (arXiv:2501.19393).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from curate.passes.sampling.types import Prompt, Sample, Sampler, Sampling
from curate.passes.thinking import opens, special_tokens, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LATER = 1 << 20  # number of the first answer of second parts: streams that no first part has


@dataclass(frozen=True)
class Thinking:
    """How a model thinks. tags: what opens and closes it. tokens: after so many it has to answer (None: no budget). closing: ids of the text that is
    written to close it. shown: those of the tags that are special tokens, which are otherwise no text. unseen: a server's template
    ends the prompt, with what is not known: an answer that was cut before either tag is taken to have begun in its thinking.
    """

    tags: tuple[str, str]
    tokens: int | None = None
    closing: tuple[int, ...] = ()
    shown: tuple[str, ...] = ()
    unseen: bool = False

    @classmethod
    def of(cls, tags: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, tokens: int | None = None) -> Thinking:
        """tokenizer: None where the model is a server's, whose text has the tags or has not."""
        opening, closing = tags
        if tokenizer is None:
            return cls((opening, closing), tokens, unseen=True)
        ids = tokenizer(_written(closing), add_special_tokens=False, verbose=False)["input_ids"]
        special = special_tokens(tokenizer)
        shown = tuple(tag for tag in (opening, closing) if tag in special)
        return cls((opening, closing), tokens, tuple(ids), shown)

    def begins(self, prompt: str, sample: Sample) -> bool:
        """Whether an answer without an opening tag has begun in the model's thinking."""
        return opens(prompt, self.tags) or (self.unseen and not sample.finished)


def sample_reasoned(
    sampler: Sampler, prompts: list[Prompt], sampling: Sampling, thinking: Thinking | None
) -> list[list[Sample]]:
    """`sampler.sample` with reasoning and answer apart, as `thinking` says; as it is where that is None."""
    if thinking is None:
        return sampler.sample(prompts, sampling)
    sampling = replace(sampling, shown=thinking.shown)
    if thinking.tokens is None:
        drawn = sampler.sample(prompts, sampling)
    else:
        drawn = _within(sampler, prompts, sampling, thinking)
    return [
        [told_apart(s, thinking.tags, opened=thinking.begins(prompt.text, s)) for s in of_prompt]
        for prompt, of_prompt in zip(prompts, drawn, strict=True)
    ]


class Reasoned:
    """A `Sampler` whose samples have reasoning and answer apart."""

    def __init__(self, sampler: Sampler, thinking: Thinking):
        self._sampler, self._thinking = sampler, thinking

    def sample(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        return sample_reasoned(self._sampler, prompts, sampling, self._thinking)


def told_apart(sample: Sample, tags: Sequence[str] | None, *, opened: bool = False) -> Sample:
    """The sample with what it thought beside its answer, where that is in its text still."""
    if tags is None or sample.reasoning is not None:
        return sample
    reasoning, answer = split(sample.text, tags, opened=opened)
    return replace(sample, reasoning=reasoning, text=answer)


def _written(closing: str) -> str:
    """What closes the thinking for the model, as chat templates write it."""
    return f"\n{closing}\n\n"


def _within(sampler: Sampler, prompts: list[Prompt], sampling: Sampling, thinking: Thinking) -> list[list[Sample]]:
    assert thinking.tokens is not None
    first = sampler.sample(prompts, replace(sampling, max_new_tokens=thinking.tokens, with_ids=True))
    distinct = 1 if sampling.temperature == 0 else sampling.n
    cut = [
        (i, k)
        for i, of_prompt in enumerate(first)
        for k, sample in enumerate(of_prompt[:distinct])
        if not sample.finished and sample.ids
    ]
    closes = [_thinks(first[i][k].text, prompts[i], thinking) for i, k in cut]
    further = [
        _further(prompts[i], k, first[i][k], thinking.closing if close else ())
        for (i, k), close in zip(cut, closes, strict=True)
    ]
    rest = replace(sampling, n=1, max_new_tokens=sampling.max_new_tokens - thinking.tokens)
    whole = [list(of_prompt[:distinct]) for of_prompt in first]
    for (i, k), close, second in zip(cut, closes, sampler.sample(further, rest) if further else [], strict=True):
        if second:  # else the context is full
            whole[i][k] = _joined(whole[i][k], _written(thinking.tags[1]) if close else "", second[0])
    return [of_prompt * (sampling.n // distinct) for of_prompt in whole]


def _thinks(text: str, prompt: Prompt, thinking: Thinking) -> bool:
    """Whether an answer that was cut here was still in its thinking."""
    reasoning, answer = split(text, thinking.tags, opened=opens(prompt.text, thinking.tags))
    return reasoning is not None and not answer and thinking.tags[1] not in text


def _further(prompt: Prompt, k: int, sample: Sample, closing: Sequence[int]) -> Prompt:
    ids = [*prompt.ids, *(sample.ids or ()), *closing]
    return replace(prompt, ids=ids, text="", messages=None, first=LATER + prompt.first + k)


def _joined(first: Sample, between: str, second: Sample) -> Sample:
    n_tokens = None if None in (first.n_tokens, second.n_tokens) else (first.n_tokens or 0) + (second.n_tokens or 0)
    logp = None if first.logp is None or second.logp is None else first.logp + second.logp
    return Sample(first.text + between + second.text, n_tokens, logp, second.finished)
