"""Ranking accuracies of a whole dataset, what an ideal DPO policy could reach, and which pairs a policy has flipped.

    ranking accuracy           = mean 1[logp+ ≥ logp−]                              length-normalised beside it; not the reward accuracy
    idealised ranking accuracy = mean 1[−c + (1/β)·log(α/(1−α)) ≥ 0]                α: the share of annotators that prefer y+
    flips                      = {reference right, wrong} × {policy right, wrong}   with share, mean DPO loss, mean reward margin

Published target: under 10% of the pairs that the reference ranks wrong are flipped at the lowest validation loss (Pythia-2.8B, HH).
Source: Chen et al. 2024, arXiv:2405.19534.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from curate.scores import Array, Positive, Share, Value, dataset_value
from curate.scores.arithmetic import softplus
from curate.scores.intervals import mean_value, proportion_value
from curate.scores.ranking import CHEN, LOGPS, LOGPS_AND_TOKENS, gap, gap_ln, right

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)
CLIP = 1e-3  # α = 1 counts as 0.999 (and 0 as 0.001), so that its log-odds are finite


@dataset_value(needs=LOGPS_AND_TOKENS, kind="preference", source=CHEN)
def ranking_accuracy(
    chosen_logp: Array, rejected_logp: Array, chosen_tokens: Array, rejected_tokens: Array
) -> list[Value]:
    """ranking_accuracy and ranking_accuracy_ln of the reference over the pairs measured; Wilson intervals."""
    plain = right(gap(chosen_logp, rejected_logp))
    per_token = right(gap_ln(chosen_logp, rejected_logp, chosen_tokens, rejected_tokens))
    return [proportion_value("ranking_accuracy", plain), proportion_value("ranking_accuracy_ln", per_token)]


def idealised(c: Array, alpha: float | Array, beta: float) -> Array:
    """(rows,) 1.0 where the optimal DPO policy ranks the pair right, else 0.0; NaN where c or α is."""
    share = np.clip(np.asarray(alpha, dtype=np.float64), CLIP, 1 - CLIP)
    margin = (np.log(share) - np.log1p(-share)) / beta - c
    return np.where(np.isnan(margin), np.nan, margin >= 0)


@dataset_value(needs=LOGPS_AND_TOKENS, optional=("row.agreement",), kind="preference", source=CHEN)
def idealised_ranking_accuracy(
    chosen_logp: Array,
    rejected_logp: Array,
    chosen_tokens: Array,
    rejected_tokens: Array,
    agreement: Array | None = None,
    *,
    alpha: Share = 1.0,
) -> list[Value]:
    """For β in .01, .1, 1, 5, 10 and both length variants, with their min, median and max over β; Wilson intervals.

    agreement: α per row, the source's column of that name (NaN: `alpha` stands in). alpha: of every row without one; 1 takes each
    label at its word (clipped to 0.999). Names: idealised_ranking_accuracy_b0.01 …, _min, _median, _max; and _ln_b0.01 ….
    """
    known = alpha if agreement is None else np.where(np.isnan(agreement), alpha, agreement)
    result = []
    for name, c in (
        ("idealised_ranking_accuracy", gap(chosen_logp, rejected_logp)),
        ("idealised_ranking_accuracy_ln", gap_ln(chosen_logp, rejected_logp, chosen_tokens, rejected_tokens)),
    ):
        over = [proportion_value(f"{name}_b{beta:g}", idealised(c, known, beta)) for beta in BETAS]
        order = sorted(over, key=lambda v: v.value)
        picks = {"min": order[0], "median": order[len(order) // 2], "max": order[-1]}
        result += [*over, *(value._replace(name=f"{name}_{pick}") for pick, value in picks.items())]
    return result


class Flip(NamedTuple):
    """One of the four cells. share: of all pairs measured; dpo_loss in nats and reward_margin: means over the cell, NaN where empty."""

    reference: str
    policy: str
    n: int
    share: float
    dpo_loss: float
    reward_margin: float


def _cells(c: Array, policy_c: Array, beta: float) -> Iterator[tuple[str, str, Array, Array]]:
    """For each of the four cells: before, now, its rows (bool), and (rows,) β times how far the policy moved the pair apart."""
    margin = beta * (c - policy_c)
    measured = ~np.isnan(margin)
    for before, was in (("right", 1.0), ("wrong", 0.0)):
        for now, becomes in (("right", 1.0), ("wrong", 0.0)):
            yield before, now, measured & (right(c) == was) & (right(policy_c) == becomes), margin


def flip_table(
    chosen_logp: Array,
    rejected_logp: Array,
    policy_chosen_logp: Array,
    policy_rejected_logp: Array,
    *,
    beta: float = 0.1,
) -> list[Flip]:
    """The four cells, right→right, right→wrong, wrong→right, wrong→wrong. Pairs with an unknown log-probability are out."""
    result = []
    c, policy_c = gap(chosen_logp, rejected_logp), gap(policy_chosen_logp, policy_rejected_logp)
    for before, now, cell, margin in _cells(c, policy_c, beta):
        n, measured = int(cell.sum()), int((~np.isnan(margin)).sum())
        share = n / measured if measured else math.nan
        loss, moved = (float(softplus(-margin[cell]).mean()), float(margin[cell].mean())) if n else (math.nan, math.nan)
        result.append(Flip(before, now, n, share, loss, moved))
    return result


@dataset_value(needs=(*LOGPS, "policy.chosen_logp", "policy.rejected_logp"), kind="preference", source=CHEN)
def flips(
    chosen_logp: Array,
    rejected_logp: Array,
    policy_chosen_logp: Array,
    policy_rejected_logp: Array,
    *,
    beta: Positive = 0.1,
) -> list[Value]:
    """flip_table as values: flips_wrong_right (share of all pairs), _dpo_loss and _reward_margin of each cell; and flipped_to_right,
    the share of the pairs ranked wrong by the reference that the policy ranks right. Intervals: Wilson for shares, normal for means.
    """
    c, policy_c = gap(chosen_logp, rejected_logp), gap(policy_chosen_logp, policy_rejected_logp)
    result = []
    for before, now, cell, margin in _cells(c, policy_c, beta):
        name = f"flips_{before}_{now}"
        result.append(proportion_value(name, np.where(np.isnan(margin), np.nan, cell)))
        result.append(mean_value(f"{name}_dpo_loss", softplus(-margin[cell])))
        result.append(mean_value(f"{name}_reward_margin", margin[cell]))
    result.append(proportion_value("flipped_to_right", right(policy_c)[right(c) == 0]))
    return result
