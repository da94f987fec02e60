"""Phases: where a row stands at a checkpoint, named by rules over accuracies that one hidden Markov model of all rows has smoothed.

    right   = accuracy_k ≥ level         started = accuracy_k ≥ 0.1
    by heart = nll_k < τ                 never so for a row that was fluent from the start: its NLL says nothing
    solved  = right and not by heart, at this or an earlier checkpoint     (solved and right is: premem_k ≥ level)

    learned    right, and solved
    forgotten  not right, although solved; or neither right nor by heart any more
    memorised  by heart, and not solved
    learning   none of these, and started
    unlearned  none of these

Every checkpoint with a known accuracy and NLL has exactly one. The rules name; the model only takes sampling noise out of the accuracies
before: its states have no names, it is fitted to (nll, accuracy) of all rows, each normalised over all of them, and the accuracy that the
rules read is half the row's own and half what the model expects of it, given the row's whole series (`curate summary` says how many labels
that changes). States that are themselves the phases lose their meaning in EM: benchmarks/README.md has the figures.
Sources: hidden Markov models of training dynamics, Hu et al. 2023, arXiv:2308.09543; solved before memorised, Kang et al. 2024, arXiv:2411.07681.
"""

from __future__ import annotations

import numpy as np

from curate.scores import hmm
from curate.scores.declare import dataset_value, score
from curate.scores.declared import Array, Value
from curate.scores.intervals import proportion_value
from curate.scores.parameters import Share
from curate.scores.premem import KANG, Threshold, from_the_start, thresholds

HU = "Hu et al. 2023, arXiv:2308.09543"
NAMES = ("unlearned", "learning", "learned", "memorised", "forgotten")
UNLEARNED, LEARNING, LEARNED, MEMORISED, FORGOTTEN = range(5)
STARTED = 0.1  # of the samples right: below, it is chance
STATES = 4
FLOOR = 0.2  # least variance of a state, of the variance over all rows and checkpoints
FIT_ROWS = 20_000  # that the model is fitted to; every row is smoothed


def by_rules(
    accuracy: Array, target_nll: Array, threshold: float | Array, *, level: float = 0.5, steps: np.ndarray | None = None
) -> Array:
    """(rows, K) codes into NAMES from (rows, K); NaN where the measured values leave more than one phase possible, and only there.

    threshold: τ in nats/token, one number or (rows,). Every condition is kept as a pair, surely and possibly, so that what is unmeasured
    is neither true nor false.
    """
    tau = np.asarray(threshold, dtype=np.float64)
    fluent = from_the_start(target_nll, tau, steps)[:, None]
    tau = tau[:, None] if tau.ndim else tau
    right, maybe_right = accuracy >= level, ~(accuracy < level)
    started, maybe_started = accuracy >= min(STARTED, level), ~(accuracy < min(STARTED, level))
    heart, maybe_heart = (target_nll < tau) & (fluent == 0), ~(target_nll >= tau) & (fluent != 1)
    if accuracy.shape[1] > 1 or (steps is not None and len(steps) and steps[0] == 0):
        maybe_heart[:, :1] = False  # whoever is below τ there is fluent
    ever = np.logical_or.accumulate
    solved, maybe_solved = ever(right & ~maybe_heart, axis=1), ever(maybe_right & ~heart, axis=1)
    maybe_had = ever(maybe_heart, axis=1)
    known_once = ever(right | heart, axis=1)  # solved, or by heart then
    codes = np.full(accuracy.shape, np.nan)
    codes[~maybe_solved & ~maybe_had & ~maybe_started] = UNLEARNED
    codes[~maybe_solved & ~maybe_had & started] = LEARNING
    codes[~maybe_solved & heart] = MEMORISED
    codes[~maybe_right & (solved | (~maybe_heart & known_once))] = FORGOTTEN
    codes[solved & right] = LEARNED
    return codes


def smoothed(accuracy: Array, target_nll: Array) -> Array:
    """(rows, K) accuracies, half the measured one and half the model's expectation; NaN where unmeasured. As measured where nothing varies.

    A row's values depend on the other rows, not on their order. Unmeasured checkpoints are marginalised.
    """
    scaled = [_normalised(column) for column in (target_nll, accuracy)]
    if scaled[1] is None or accuracy.shape[1] < 2:
        return accuracy.copy()
    x = np.stack([accuracy * np.nan if s is None else s for s in scaled], axis=-1)  # (rows, K, 2)
    x = x[~np.isnan(accuracy).all(axis=1)]
    progress = np.where(np.isnan(x[..., 1]), 0.0, x[..., 1]) - np.where(np.isnan(x[..., 0]), 0.0, x[..., 0])
    some = x[np.argsort(progress.sum(axis=1), kind="stable")[:: -(-len(x) // FIT_ROWS)]]
    model, _ = hmm.fit(_first(some), some, floor=FLOOR, tolerance=1e-3)
    expected = np.full(accuracy.shape, np.nan)
    for at in range(0, len(accuracy), FIT_ROWS):
        rows = slice(at, at + FIT_ROWS)
        x = np.stack([np.full_like(accuracy[rows], np.nan) if s is None else s[rows] for s in scaled], axis=-1)
        expected[rows] = hmm.posterior(model, hmm.log_emission(model, x)).state @ model.mean[:, 1]
    known = accuracy[~np.isnan(accuracy)]
    return (accuracy + np.clip(expected * known.std() + known.mean(), 0.0, 1.0)) / 2


def _normalised(values: Array) -> Array | None:
    known = values[~np.isnan(values)]
    return (values - known.mean()) / known.std() if len(known) and known.std() > 0 else None


def _first(x: Array) -> hmm.Model:
    """Where EM starts: the checkpoints cut by accuracy into parts of equal width, which needs no chance and no order of the rows."""
    flat = np.nan_to_num(x[~np.isnan(x[..., 1])])  # (points, 2)
    low, high = flat[:, 1].min(), flat[:, 1].max()
    part = np.minimum((flat[:, 1] - low) / max(high - low, 1e-9) * STATES, STATES - 1).astype(int)
    mean = np.stack([flat[part == s].mean(axis=0) if (part == s).any() else flat.mean(axis=0) for s in range(STATES)])
    transition = np.where(np.eye(STATES, dtype=bool), 0.7, 0.3 / (STATES - 1))
    return hmm.Model(np.full(STATES, 1 / STATES), transition, mean, np.full((STATES, 2), 0.3))


def _phases(
    accuracy: Array, target_nll: Array, tau: float | Array, level: float, smooth: bool, steps: np.ndarray | None
) -> Array:
    seen = smoothed(accuracy, target_nll) if smooth else accuracy
    return by_rules(seen, target_nll, tau, level=level, steps=steps)


def phases(
    accuracy: Array,
    target_nll: Array,
    group: np.ndarray | None = None,
    *,
    threshold: Threshold = 0.1,
    per: str = "group",
    level: Share = 0.5,
    smooth: bool = True,
    steps: np.ndarray | None = None,
) -> Array:
    """The phase at every checkpoint, (rows, K); the arguments are those of `phase`."""
    return _phases(accuracy, target_nll, thresholds(threshold, group, len(accuracy), per=per), level, smooth, steps)


@score(
    needs=("accuracy", "target_nll"),
    optional=("row.{per}",),
    kind="sft",
    over="checkpoints",
    unit="phase",
    worst="none",
    high_means="a code and no amount: 0 unlearned, 1 learning, 2 learned, 3 memorised, 4 forgotten",
    source=f"{HU}; {KANG}",
    names=NAMES,
    per_checkpoint=phases,
)
def phase(
    accuracy: Array,
    target_nll: Array,
    group: np.ndarray | None = None,
    *,
    threshold: Threshold = 0.1,
    per: str = "group",
    level: Share = 0.5,
    smooth: bool = True,
    steps: np.ndarray | None = None,
) -> Array:
    """The phase at the last checkpoint, 0 to 4; (rows,) from (rows, K). Its name stands beside it, in the column `phase_name`:

    2 learned: accuracy ≥ level, which it reached before its NLL fell below τ too. 4 forgotten: below level after that, or once known by
    heart and no more. 3 memorised: NLL < τ, and no such accuracy before. 1 learning: else, accuracy ≥ 0.1. 0 unlearned: else.

    NULL where the measured checkpoints do not decide it. Over several runs, the phase in most of them, NULL at a tie. Rows fluent from the
    start are never memorised: see `fluent`. The phases at every checkpoint of every run stand in the view `trajectories`.

    threshold: τ in nats/token, or one per value of the source's column `per`; auto, auto_per_group: calibrated, as for premem_accuracy.
    smooth: false takes every accuracy as it was sampled.
    """
    if accuracy.shape[1] == 0:
        return np.full(len(accuracy), np.nan)
    return phases(accuracy, target_nll, group, threshold=threshold, per=per, level=level, smooth=smooth, steps=steps)[
        :, -1
    ]


@dataset_value(
    needs=("accuracy", "target_nll"),
    optional=("in_train", "row.{per}"),
    kind="sft",
    over="checkpoints",
    source=HU,
    of="phase",
)
def phase_values(
    accuracy: Array,
    target_nll: Array,
    in_train: Array | None = None,
    group: np.ndarray | None = None,
    *,
    threshold: Threshold = 0.1,
    per: str = "group",
    level: Share = 0.5,
    smooth: bool = True,
    steps: np.ndarray | None = None,
) -> list[Value]:
    """Per checkpoint phase_unlearned, phase_learning, …: the share of the rows trained on that are in it, Wilson's intervals.

    For the series phase_smoothed: the share of all labels that smoothing changed. Rows whose phase is NULL are left out, n says how many
    are in.
    """
    trained = np.ones(len(accuracy), bool) if in_train is None else ~(in_train == 0).any(axis=1)
    tau = thresholds(threshold, group, len(accuracy), per=per)
    tau = tau[trained] if isinstance(tau, np.ndarray) else tau
    accuracy, target_nll = accuracy[trained], target_nll[trained]
    codes = _phases(accuracy, target_nll, tau, level, smooth, steps)
    unsmoothed = by_rules(accuracy, target_nll, tau, level=level, steps=steps)
    changed = np.where(np.isnan(codes), np.nan, codes != unsmoothed).ravel()
    result = [proportion_value("phase_smoothed", changed)] if smooth else []
    for at in range(codes.shape[1]):
        for code, name in enumerate(NAMES):
            flags = np.where(np.isnan(codes[:, at]), np.nan, codes[:, at] == code)
            result.append(proportion_value(f"phase_{name}", flags, at=at))
    return result
