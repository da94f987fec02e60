"""What a model answers and how likely it finds the target: the plain values, and the difficulty for RL.

    accuracy   = correct / samples
    target_nll = mean target-token NLL, nats per token, the end marker included
    difficulty = p(1 − p), p the accuracy: the variance of one sampled reward, 0 where every sample is graded alike

Sources: Kang et al. 2024, arXiv:2411.07681; RL that keeps the middle, DAPO's dynamic sampling: Yu et al. 2025, arXiv:2503.14476.
"""

from __future__ import annotations

import numpy as np

from curate.scores.declare import dataset_value, score
from curate.scores.declared import Array, Value
from curate.scores.intervals import mean_value

KANG = "Kang et al. 2024, arXiv:2411.07681"


@score(
    needs=("accuracy",), kind="sft", unit="share", worst="none", high_means="the model answers it right", source=KANG
)
def accuracy(accuracy: Array) -> Array:
    """Share of the sampled answers that are graded right, 0..1, of the last checkpoint. NULL where nothing was sampled."""
    return accuracy.copy()


@score(
    needs=("target_nll",),
    kind="sft",
    unit="nats/token",
    worst="none",
    high_means="the model finds the target unlikely",
    source=KANG,
)
def target_nll(target_nll: Array) -> Array:
    """Mean negative log-likelihood of the target's tokens, ≥ 0, of the last checkpoint. NULL where it was not measured."""
    return target_nll.copy()


@score(
    needs=("accuracy",),
    kind="sft",
    unit="reward²",
    worst="low",
    high_means="answered right half the time: RL has something to tell apart",
    source="Yu et al. 2025, arXiv:2503.14476",
)
def difficulty(accuracy: Array) -> Array:
    """p(1 − p), 0..0.25. NULL where p is."""
    return accuracy * (1 - accuracy)


@dataset_value(needs=("accuracy",), optional=("in_train",), kind="sft", over="checkpoints")
def accuracy_values(accuracy: Array, in_train: Array | None = None) -> list[Value]:
    """Mean accuracy per checkpoint, over the rows measured at it (trained on, where in_train says so); normal interval, in 0..1."""
    trained = np.ones(len(accuracy), bool) if in_train is None else ~(in_train == 0).any(axis=1)
    return [mean_value("accuracy", accuracy[trained, at], at=at, bounds=(0.0, 1.0)) for at in range(accuracy.shape[1])]


@dataset_value(needs=("target_nll",), optional=("in_train",), kind="sft", over="checkpoints")
def target_nll_values(target_nll: Array, in_train: Array | None = None) -> list[Value]:
    """Mean target NLL per checkpoint, over the rows measured at it (trained on, where in_train says so); normal interval."""
    trained = np.ones(len(target_nll), bool) if in_train is None else ~(in_train == 0).any(axis=1)
    return [mean_value("target_nll", target_nll[trained, at], at=at) for at in range(target_nll.shape[1])]
