"""A hidden Markov model with Gaussian emissions: likelihood, posteriors, the most likely path, and its fit by EM. Plain numpy.

    p(z, x) = start[z_1] p(x_1 | z_1) Π_k transition[z_{k−1}, z_k] p(x_k | z_k),   p(x | z) = Π_d N(x_d; mean[z, d], variance[z, d])

Everything is in logarithms, so nothing underflows. What is unmeasured (NaN) is marginalised, number by number: its factor is 1. A zero of
`start` or `transition` stays zero in the fit, so what cannot happen can be built in.
Source: Rabiner 1989, doi:10.1109/5.18626. Our own because nothing else here may be imported: scores run where only numpy is, and hmmlearn,
in limited maintenance, refuses missing values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from curate.scores.declared import Array

Path = np.ndarray  # (N, K) of state numbers


@dataclass(frozen=True)
class Model:
    """start: (S,), transition: (S, S), from row to column, both of probabilities; mean, variance: (S, D)."""

    start: Array
    transition: Array
    mean: Array
    variance: Array


@dataclass(frozen=True)
class Posterior:
    """What the measurements say of the states. log_likelihood: (N,). state: (N, K, S), p(z_k | x). moves: (S, S), expected transitions of all."""

    log_likelihood: Array
    state: Array
    moves: Array


def log_emission(model: Model, x: Array) -> Array:
    """(N, K, S) log p(x_k | z) of (N, K, D) measurements; a number that is NaN counts for nothing."""
    away = x[:, :, None, :] - model.mean  # (N, K, S, D)
    each = -0.5 * (away**2 / model.variance + np.log(2 * np.pi * model.variance))
    return np.where(np.isnan(each), 0.0, each).sum(axis=-1)


def posterior(model: Model, emission: Array) -> Posterior:
    """Forwards and backwards over (N, K, S) log emissions, all sequences at once."""
    start, step = _log(model.start), _log(model.transition)
    _, k, s = emission.shape
    lift = emission.max(axis=2, keepdims=True)  # far from every state, their differences would drown in it
    emission = emission - lift
    ahead = np.empty_like(emission)  # log p(x_1..x_k, z_k)
    back = np.zeros_like(emission)  # log p(x_{k+1}.. | z_k)
    ahead[:, 0] = start + emission[:, 0]
    for at in range(1, k):
        ahead[:, at] = _logsumexp(ahead[:, at - 1, :, None] + step, axis=1) + emission[:, at]
    for at in range(k - 2, -1, -1):
        back[:, at] = _logsumexp(step + (emission[:, at + 1] + back[:, at + 1])[:, None, :], axis=2)
    total = _logsumexp(ahead[:, -1], axis=1)  # (N,)
    moves = np.zeros((s, s))
    for at in range(1, k):
        arrives = (emission[:, at] + back[:, at] - total[:, None])[:, None, :]
        moves += np.exp(ahead[:, at - 1, :, None] + step + arrives).sum(axis=0)
    return Posterior(total + lift.sum(axis=(1, 2)), np.exp(ahead + back - total[:, None, None]), moves)


def viterbi(model: Model, emission: Array) -> Path:
    """(N, K) the most likely path of every sequence; of equal ones the lower states."""
    step = _log(model.transition)
    n, k, _ = emission.shape
    best = _log(model.start) + emission[:, 0]  # (N, S)
    came = np.zeros(emission.shape, dtype=np.int64)
    for at in range(1, k):
        candidates = best[:, :, None] + step  # (N, from, to)
        came[:, at] = candidates.argmax(axis=1)
        best = candidates.max(axis=1) + emission[:, at]
    path = np.zeros((n, k), dtype=np.int64)
    path[:, -1] = best.argmax(axis=1)
    for at in range(k - 1, 0, -1):
        path[:, at - 1] = came[np.arange(n), at, path[:, at]]
    return path


def improved(model: Model, x: Array, expected: Posterior, *, floor: float) -> Model:
    """One M-step. A state that nothing visits keeps its numbers; no variance falls below `floor`."""
    start = expected.state[:, 0].sum(axis=0)
    leaves = expected.moves.sum(axis=1, keepdims=True)
    transition = np.where(leaves > 0, expected.moves / np.where(leaves > 0, leaves, 1.0), model.transition)
    known = ~np.isnan(x)  # (N, K, D)
    value = np.where(known, x, 0.0)
    weight = np.einsum("nks,nkd->sd", expected.state, known.astype(float))
    some = weight > 1e-9
    weight = np.where(some, weight, 1.0)
    mean = np.where(some, np.einsum("nks,nkd->sd", expected.state, value) / weight, model.mean)
    # two passes: a difference of squares would lose what a narrow state has
    away = np.where(known[:, :, None, :], (value[:, :, None, :] - mean) ** 2, 0.0)  # (N, K, S, D)
    variance = np.where(some, np.einsum("nks,nksd->sd", expected.state, away) / weight, model.variance)
    return Model(start / start.sum(), transition, mean, np.maximum(variance, floor))


def fit(
    model: Model, x: Array, *, floor: float, rounds: int = 100, tolerance: float = 1e-4
) -> tuple[Model, list[float]]:
    """EM from `model` over (N, K, D). The fitted model, and the log-likelihood before every round, which never falls.

    Stops when a round gains less than `tolerance` nats per sequence. floor: the least variance (the given model's are lifted to it).
    """
    model = Model(model.start, model.transition, model.mean, np.maximum(model.variance, floor))
    history: list[float] = []
    for _ in range(rounds):
        expected = posterior(model, log_emission(model, x))
        history.append(float(expected.log_likelihood.sum()))
        if len(history) > 1 and history[-1] - history[-2] < tolerance * len(x):
            break
        model = improved(model, x, expected, floor=floor)
    return model, history


def _log(probability: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(probability)


def _logsumexp(values: Array, *, axis: int) -> Array:
    largest = values.max(axis=axis, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0.0)  # all impossible: log 0, not log NaN
    return _log(np.exp(values - largest).sum(axis=axis)) + largest.squeeze(axis)
