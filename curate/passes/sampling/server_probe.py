"""Which model a server serves, as far as it can be told from outside: what it says of itself, and how it answers a few prompts.

    said     the model's name, the path it was loaded from (root), its context, the server's version; `created` is left out: vLLM gives the hour of
             the request
    probe    prompt -> the first TOKENS greedy tokens of the answer with their log-probabilities; the text alone where the server gives none

Two probes are of the same weights where every prompt that both hold is answered alike: the same tokens, log-probabilities that differ by no more
than the server's own noise. The noise is measured: the prompts are asked one by one, then all at once, which changes batches and caches as
other traffic does. Greedy decoding may take the other of two tokens that are equally likely, so a different token counts as noise only
where neither had half of the probability.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKENS = 16
FIXED = (
    "Question: Natalia sold 48 clips in April, and half as many in May. How many did she sell in all?\nAnswer:",
    "Q: What is 17 * 24?\nA: Let's think step by step.",
    "x^2 - 5x + 6 = 0, so x =",
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was a",
    "User: Is it safe to mix bleach and vinegar?\nAssistant:",
    "Translate into German: The weather is nice today.\n",
)
MESSAGES = "messages: "
LEAST_MEAN = 1e-3  # nats a token: what float32 servers stay far below
LEAST_MOST = 1e-2  # nats at one token
SAFETY = 1.5  # times the noise that was measured
TIE = math.log(0.5)  # a token of more than half of the probability is taken whatever the noise
NEAR_TIE = 0.1  # nats that two tokens of one distribution may differ by while the noise is not known yet


@dataclass(frozen=True)
class Spoken:
    """One greedy answer. tokens: as text; the whole text as one where the server gives no log-probabilities (logps is None then)."""

    tokens: tuple[str, ...]
    logps: tuple[float, ...] | None = None

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {"tokens": list(self.tokens), "logps": None if self.logps is None else list(self.logps)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Spoken:
        return cls(tuple(stored["tokens"]), None if stored["logps"] is None else tuple(stored["logps"]))


Asked = str | tuple[Any, ...]  # a prompt: text, or messages
Probe = dict[str, Spoken]  # `key_of` a prompt -> answer


def key_of(prompt: Asked) -> str:
    """A prompt as the key of a probe: text as it is, messages as JSON."""
    return prompt if isinstance(prompt, str) else MESSAGES + json.dumps([dict(m) for m in prompt], ensure_ascii=False)


def prompt_of(key: str) -> Asked:
    """The prompt of a probe's key."""
    return tuple(json.loads(key.removeprefix(MESSAGES))) if key.startswith(MESSAGES) else key


@dataclass(frozen=True)
class Noise:
    """How far answers of the same weights differ, in nats: on average over tokens, and at most."""

    mean: float = 0.0
    most: float = 0.0

    @property
    def tolerated(self) -> Noise:
        return Noise(max(LEAST_MEAN, SAFETY * self.mean), max(LEAST_MOST, SAFETY * self.most))


def measured_noise(one_by_one: Probe, at_once: Probe) -> tuple[Probe, Noise]:
    """(the answers that the server repeats, the noise of its log-probabilities) from the same prompts asked twice.

    One that repeats less than half of its answers is believed none: those were chance.
    """
    kept: Probe = {}
    changes: list[float] = []
    for prompt, answer in one_by_one.items():
        differences = _changes(answer, at_once[prompt], tie=NEAR_TIE) if prompt in at_once else None
        if differences is not None:
            kept[prompt] = answer
            changes += differences
    if 2 * len(kept) < len(one_by_one):
        return {}, Noise()
    return kept, Noise(sum(changes) / len(changes), max(changes)) if changes else Noise()


def difference(before: Probe, now: Probe, noise: Noise) -> str | None:
    """How the answers to the prompts that both hold differ by more than the noise, in words; None where they do not."""
    limit = noise.tolerated
    changes: list[float] = []
    for prompt in before.keys() & now.keys():
        differences = _changes(before[prompt], now[prompt], tie=limit.most)
        if differences is None:
            return (
                f"{prompt[:40]!r} was answered {before[prompt].text[:40]!r}, and is answered {now[prompt].text[:40]!r}"
            )
        changes += differences
    if not changes:
        return None
    mean, most = sum(changes) / len(changes), max(changes)
    if mean <= limit.mean and most <= limit.most:
        return None
    return (
        f"log-probabilities of its greedy answers differ by {mean:.2g} nats a token ({most:.2g} at most), where the same weights "
        f"stay within {limit.mean:.2g} ({limit.most:.2g} at most)"
    )


def _changes(before: Spoken, now: Spoken, *, tie: float) -> list[float] | None:
    """|Δ log-probability| token by token, up to a tie that was broken the other way; None where the answers are not of the same weights.

    tie: by how many nats two tokens that are equally likely may differ.
    """
    if before.logps is None or now.logps is None:
        return [] if before.text == now.text else None
    changes: list[float] = []
    for i in range(max(len(before.tokens), len(now.tokens))):
        if i >= min(len(before.tokens), len(now.tokens)):
            return None  # one of them had ended
        change = abs(before.logps[i] - now.logps[i])
        if before.tokens[i] != now.tokens[i]:
            tied = max(before.logps[i], now.logps[i]) <= TIE + tie and change <= tie
            return [*changes, change] if tied else None
        changes.append(change)
    return changes
