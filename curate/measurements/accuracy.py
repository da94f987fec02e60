"""Accuracy by sampling: what graded answers say of each row.

    accuracy    = n_correct / n_samples
    sample_logp = Σ logp / Σ tokens over the row's samples: the model's own log-probability of what it said, nats per token

A sample that hit max_new_tokens is graded as it stands, and counted in n_unfinished.

Source: Kang et al. 2024, arXiv:2411.07681 (accuracy over samples at each checkpoint).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curate.measurements import measurement


@dataclass(frozen=True, slots=True)
class Graded:
    """One sampled response and its grade.

    n_tokens, logp (summed, nats): None where the engine does not return them. finished: ended by itself, not cut at max_new_tokens.
    """

    correct: bool
    n_tokens: int | None = None
    logp: float | None = None
    finished: bool = True


@measurement(
    reads="sample",
    kind="sft",
    columns={
        "n_samples": "samples",
        "n_correct": "samples",
        "accuracy": "share",
        "sample_logp": "mean nats per token",
        "n_unfinished": "samples",
    },
)
def accuracy(graded: Sequence[Sequence[Graded]]) -> dict[str, np.ndarray]:
    """How many of a row's sampled answers are right.

    graded: one list per row, in the rows' order. Each column is (rows,) float64; a row without samples is NaN in all of them, and
    sample_logp also where the engine gave a sample no log-probability or no token count.
    """
    out = {column: np.full(len(graded), np.nan) for column in accuracy.measurement.columns}  # type: ignore[attr-defined]
    for i, samples in enumerate(graded):
        if not samples:
            continue
        right = sum(sample.correct for sample in samples)
        out["n_samples"][i] = len(samples)
        out["n_correct"][i] = right
        out["accuracy"][i] = right / len(samples)
        out["n_unfinished"][i] = sum(not sample.finished for sample in samples)
        if all(sample.logp is not None and sample.n_tokens is not None for sample in samples):
            tokens = sum(sample.n_tokens or 0 for sample in samples)
            if tokens:
                out["sample_logp"][i] = sum(sample.logp or 0.0 for sample in samples) / tokens
    return out
