"""Which pairs are ranked otherwise than before: by a policy against the reference, or over the checkpoints of a DPO run.

    c            = logp(y−) − logp(y+);  right iff c ≤ 0, a tie is right, everywhere
    the table    = {before right, wrong} × {now right, wrong}   with share, mean DPO loss, mean reward margin
    margin       = β(c_before − c_now);  DPO loss = softplus(−margin)
    flipped      = right_last − right_first                   1: wrong, then right; −1: right, then wrong; 0: unchanged
    flip_step    = the first step whose ranking is not the first checkpoint's

Over checkpoints the first one stands for the reference: take one from before DPO (step 0) for loss and margin to be the training's.
Published target: under 10% of the pairs that the reference ranks wrong are flipped at the lowest validation loss (Pythia-2.8B, HH).
Source: Chen et al. 2024, arXiv:2405.19534.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from curate.scores.arithmetic import softplus
from curate.scores.declare import dataset_value, score
from curate.scores.declared import Array, Value
from curate.scores.intervals import mean_value, proportion_value
from curate.scores.parameters import Positive
from curate.scores.ranking import CHEN, LOGPS, gap, right


class Flip(NamedTuple):
    """One of the four cells. share: of all pairs measured; dpo_loss in nats and reward_margin: means over the cell, NaN where empty."""

    before: str
    now: str
    n: int
    share: float
    dpo_loss: float
    reward_margin: float


def _cells(c: Array, later_c: Array, beta: float) -> Iterator[tuple[str, str, Array, Array]]:
    """For each of the four cells: before, now, its rows (bool), and (rows,) β times how far the pair was moved apart."""
    margin = beta * (c - later_c)
    measured = ~np.isnan(margin)
    for before, was in (("right", 1.0), ("wrong", 0.0)):
        for now, becomes in (("right", 1.0), ("wrong", 0.0)):
            yield before, now, measured & (right(c) == was) & (right(later_c) == becomes), margin


def flip_table(c: Array, later_c: Array, *, beta: float = 0.1) -> list[Flip]:
    """The four cells, right→right, right→wrong, wrong→right, wrong→wrong, from two (rows,) gaps. Pairs with an unknown one are out."""
    result = []
    for before, now, cell, margin in _cells(c, later_c, beta):
        n, measured = int(cell.sum()), int((~np.isnan(margin)).sum())
        share = n / measured if measured else math.nan
        loss, moved = (float(softplus(-margin[cell]).mean()), float(margin[cell].mean())) if n else (math.nan, math.nan)
        result.append(Flip(before, now, n, share, loss, moved))
    return result


def flip_values(c: Array, later_c: Array, beta: float, *, at: int | None = None) -> list[Value]:
    """The table as values, flipped_to_right with them. Intervals: Wilson for shares, normal for means."""
    result = []
    for before, now, cell, margin in _cells(c, later_c, beta):
        name = f"flips_{before}_{now}"
        result.append(proportion_value(name, np.where(np.isnan(margin), np.nan, cell), at=at))
        result.append(mean_value(f"{name}_dpo_loss", softplus(-margin[cell]), at=at))
        result.append(mean_value(f"{name}_reward_margin", margin[cell], at=at))
    result.append(proportion_value("flipped_to_right", flipped_to_right(c, later_c), at=at))
    return result


def flipped_to_right(c: Array, later_c: Array) -> Array:
    """1.0 or 0.0 for each pair that was ranked wrong: whether it is ranked right now (NaN where unknown)."""
    return right(later_c)[right(c) == 0]


@dataset_value(needs=(*LOGPS, "policy.chosen_logp", "policy.rejected_logp"), kind="preference", source=CHEN)
def flips(
    chosen_logp: Array,
    rejected_logp: Array,
    policy_chosen_logp: Array,
    policy_rejected_logp: Array,
    *,
    beta: Positive = 0.1,
) -> list[Value]:
    """The policy against the reference: flips_wrong_right (share of all pairs), _dpo_loss and _reward_margin of each cell, and
    flipped_to_right, the share of the pairs that the reference ranks wrong and the policy right.
    """
    return flip_values(gap(chosen_logp, rejected_logp), gap(policy_chosen_logp, policy_rejected_logp), beta)


def place_of(step: int | None, steps: np.ndarray | None, count: int, otherwise: int) -> int:
    """The index of a step in the series; `otherwise` where none was asked for. ValueError naming the steps that there are."""
    if step is None:
        return otherwise
    known = list(range(count)) if steps is None else list(steps)  # NaN, an unknown one, is equal to none
    if step not in known:
        there = ", ".join(str(int(s)) for s in known if s == s)
        raise ValueError(f"there is no checkpoint of step {step}; there are {there}")
    return known.index(step)


@score(
    needs=LOGPS,
    kind="preference",
    over="checkpoints",
    unit="−1, 0 or 1",
    worst="none",
    high_means="ranked wrong at the first checkpoint and right at the last",
    source=CHEN,
)
def flipped(
    chosen_logp: Array,
    rejected_logp: Array,
    *,
    first: int | None = None,
    last: int | None = None,
    steps: np.ndarray | None = None,
) -> Array:
    """1 where the run flipped the pair to right, −1 to wrong, 0 where the ranking at `last` is that at `first`.

    NULL where one is unmeasured, and in a series of one checkpoint. first, last: steps of the series (its ends, if none are given).
    """
    ranked = right(gap(chosen_logp, rejected_logp))  # (rows, K)
    count = ranked.shape[1]
    if count < 2:
        return np.full(len(ranked), np.nan)
    start, end = place_of(first, steps, count, 0), place_of(last, steps, count, count - 1)
    return np.asarray(ranked[:, end] - ranked[:, start])


@score(
    needs=LOGPS,
    kind="preference",
    over="checkpoints",
    unit="steps",
    worst="none",
    high_means="its ranking held out for long",
    source=CHEN,
    null_where="never_flipped",
)
def flip_step(chosen_logp: Array, rejected_logp: Array, *, steps: np.ndarray | None = None) -> Array:
    """The first step at which the pair is ranked otherwise than at the first checkpoint (its index where nobody knows the steps).

    NULL where never_flipped is 1, which is not unknown; and, unknown, where an earlier checkpoint is unmeasured.
    """
    ranked = right(gap(chosen_logp, rejected_logp))
    if not ranked.shape[1]:
        return np.full(len(ranked), np.nan)
    index = np.arange(ranked.shape[1]) if steps is None else np.asarray(steps, dtype=np.float64)
    other = ranked == 1 - ranked[:, :1]
    at = other.argmax(axis=1)
    before_known = ~np.logical_or.accumulate(np.isnan(ranked), axis=1)[np.arange(len(ranked)), at]
    return np.where(other.any(axis=1) & before_known, index[at], np.nan)


@score(
    needs=LOGPS,
    kind="preference",
    over="checkpoints",
    unit="0 or 1",
    worst="none",
    high_means="ranked alike at every checkpoint",
    source=CHEN,
)
def never_flipped(chosen_logp: Array, rejected_logp: Array) -> Array:
    """1 where every checkpoint ranks the pair as the first does, 0 where one does not. NULL where those measured do not decide it."""
    ranked = right(gap(chosen_logp, rejected_logp))
    other = (ranked == 1 - ranked[:, :1]).any(axis=1)
    undecided = np.isnan(ranked).any(axis=1) | (ranked.shape[1] < 2)
    return np.where(other, 0.0, np.where(undecided, np.nan, 1.0))


@dataset_value(needs=LOGPS, kind="preference", over="checkpoints", source=CHEN)
def checkpoint_flips(
    chosen_logp: Array,
    rejected_logp: Array,
    *,
    first: int | None = None,
    beta: Positive = 0.1,
    steps: np.ndarray | None = None,
) -> list[Value]:
    """Every checkpoint against that of step `first` (the earliest, if none is given): the values of `flips`, and its ranking_accuracy."""
    c = gap(chosen_logp, rejected_logp)
    start = place_of(first, steps, c.shape[1], 0)
    result: list[Value] = []
    for at in range(c.shape[1]):
        result.append(proportion_value("ranking_accuracy", right(c[:, at]), at=at))
        if at != start:
            result += flip_values(c[:, start], c[:, at], beta, at=at)
    return result
