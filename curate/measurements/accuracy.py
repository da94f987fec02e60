"""Accuracy by sampling: what graded answers say of each row.

    accuracy           = n_correct / n_samples           n_samples without the unfinished ones under `sampling.unfinished: leave_out`
    perturbed_accuracy = mean of that over the row's perturbations, each graded with its own answer
    sample_logp        = Σ logp / Σ tokens over the row's samples: the model's own log-probability of what it said, nats per token

A sample is right, wrong or unfinished: cut at max_new_tokens before it gave an answer, in its thinking or in a text that the grader reads none out
of. One that was cut later is graded as it stands. n_unfinished counts all that were cut.

Source: Kang et al. 2024, arXiv:2411.07681 (accuracy over samples at each checkpoint).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from curate.measurements.declare import measurement

Outcome = Literal["right", "wrong", "unfinished"]


@dataclass(frozen=True, slots=True)
class Graded:
    """One sampled response and its grade (None where the row has no answer to compare with). outcome: right, wrong, or unfinished, which is never
    right; None where it is not graded. counts: whether n_samples and accuracy are of it.

    n_tokens, logp (summed, nats): None where the engine does not return them. finished: ended by itself, not cut at max_new_tokens. text,
    reasoning: what is kept of it beside, its answer and what it thought before.
    """

    correct: bool | None
    n_tokens: int | None = None
    logp: float | None = None
    finished: bool = True
    text: str = ""
    reasoning: str | None = None
    outcome: Outcome | None = None
    counts: bool = True


SAMPLED = {"n_samples": "samples", "sample_logp": "mean nats per token", "n_unfinished": "samples"}


@measurement(
    reads="sample", kind="sft", columns={"n_samples": "samples", "n_correct": "samples", "accuracy": "share", **SAMPLED}
)
def accuracy(graded: Sequence[Sequence[Graded]]) -> dict[str, np.ndarray]:
    """How many of a row's sampled answers are right.

    graded: one list per row, in the rows' order. Each column is (rows,) float64; a row without samples is NaN in all of them, one
    without an answer in n_correct and accuracy, one of whose samples none counts in accuracy, and sample_logp also where the engine gave a sample no
    log-probability or no token count.
    """
    out = sampled(graded)
    out |= {column: np.full(len(graded), np.nan) for column in ("n_correct", "accuracy")}
    for i, samples in enumerate(graded):
        marks = [sample.correct for sample in samples if sample.counts]
        if samples and None not in marks:
            out["n_correct"][i] = sum(map(bool, marks))
            out["accuracy"][i] = out["n_correct"][i] / len(marks) if marks else np.nan
    return out


@measurement(
    reads="sample", kind="sft", columns={"n_perturbed": "perturbations", "perturbed_accuracy": "share"}, perturbed=True
)
def perturbed(graded: Sequence[Sequence[Sequence[Graded]]]) -> dict[str, np.ndarray]:
    """How many of the sampled answers to a row's perturbations are right.

    graded: one list per row of one list per perturbation. Each column is (rows,) float64: n_perturbed, how many perturbations gave an
    accuracy, and the mean of these; NaN where none did.
    """
    out = {column: np.full(len(graded), np.nan) for column in ("n_perturbed", "perturbed_accuracy")}
    for i, of_row in enumerate(graded):
        accuracies = accuracy(of_row)["accuracy"]
        known = accuracies[~np.isnan(accuracies)]
        out["n_perturbed"][i] = len(known)
        if len(known):
            out["perturbed_accuracy"][i] = known.mean()
    return out


@measurement(reads="sample", kind="preference", columns=SAMPLED)
def on_policy(graded: Sequence[Sequence[Graded]]) -> dict[str, np.ndarray]:
    """How likely the model finds what it says itself to a pair's prompt: n_samples, sample_logp, n_unfinished, each (rows,) float64.

    NaN where nothing was sampled, and sample_logp where the engine gave a sample no log-probability or no token count.
    """
    return sampled(graded)


def sampled(graded: Sequence[Sequence[Graded]]) -> dict[str, np.ndarray]:
    """The columns that need no grade: (rows,) float64 each."""
    out = {column: np.full(len(graded), np.nan) for column in SAMPLED}
    for i, samples in enumerate(graded):
        if not samples:
            continue
        out["n_samples"][i] = sum(sample.counts for sample in samples)
        out["n_unfinished"][i] = sum(not sample.finished for sample in samples)
        if all(sample.logp is not None and sample.n_tokens is not None for sample in samples):
            tokens = sum(sample.n_tokens or 0 for sample in samples)
            if tokens:
                out["sample_logp"][i] = sum(sample.logp or 0.0 for sample in samples) / tokens
    return out
