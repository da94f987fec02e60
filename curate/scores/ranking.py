"""Preference ranking: does the reference rank the pair right, and could DPO still flip it?

    c                    = logp_ref(y−) − logp_ref(y+)           wrong in the reference iff c > 0; a tie is right, everywhere
    ranked right         iff the pair's DPO loss ≤ −log σ(βc)    the flip loss
    break-even agreement = σ(βc)                                 the share of annotators that must prefer y+
    implicit reward gap  = β[log π/π_ref(y+) − log π/π_ref(y−)]

The authors' released client compares logp1/logp2, a ratio of logarithms; the difference is right.
Source: Chen et al. 2024, arXiv:2405.19534.
"""

from __future__ import annotations

import numpy as np

from curate.scores.arithmetic import ratio, sigmoid, softplus
from curate.scores.declare import score
from curate.scores.declared import Array
from curate.scores.parameters import Positive

CHEN = "Chen et al. 2024, arXiv:2405.19534"
LOGPS = ("chosen_logp", "rejected_logp")
LOGPS_AND_TOKENS = (*LOGPS, "chosen_tokens", "rejected_tokens")


def gap(chosen_logp: Array, rejected_logp: Array) -> Array:
    """c in nats, (rows,); NaN where either is, or where both are −inf."""
    with np.errstate(invalid="ignore"):
        return np.asarray(rejected_logp, float) - np.asarray(chosen_logp, float)


def gap_ln(chosen_logp: Array, rejected_logp: Array, chosen_tokens: Array, rejected_tokens: Array) -> Array:
    """c with each log-probability divided by its own number of tokens: nats/token, (rows,)."""
    return gap(ratio(chosen_logp, chosen_tokens), ratio(rejected_logp, rejected_tokens))


def right(c: Array) -> Array:
    """1.0 where c ≤ 0, 0.0 where c > 0, NaN where c is."""
    return np.where(np.isnan(c), np.nan, c <= 0)


@score(
    needs=LOGPS,
    kind="preference",
    unit="nats",
    worst="high",
    high_means="the reference finds the rejected response more likely by this much",
    source=CHEN,
)
def ranking_gap(chosen_logp: Array, rejected_logp: Array) -> Array:
    """c = logp_ref(y−) − logp_ref(y+). Above 0: ranked wrong. NULL where either log-probability is."""
    return gap(chosen_logp, rejected_logp)


@score(
    needs=LOGPS,
    kind="preference",
    unit="0 or 1",
    worst="low",
    high_means="the reference ranks the pair right",
    source=CHEN,
)
def ranking_correct(chosen_logp: Array, rejected_logp: Array) -> Array:
    """1 where logp_ref(y+) ≥ logp_ref(y−), else 0. A tie is right. NULL where either is."""
    return right(gap(chosen_logp, rejected_logp))


@score(
    needs=LOGPS_AND_TOKENS,
    kind="preference",
    unit="0 or 1",
    worst="low",
    high_means="the reference ranks the pair right per token",
    source=CHEN,
)
def ranking_correct_ln(chosen_logp: Array, rejected_logp: Array, chosen_tokens: Array, rejected_tokens: Array) -> Array:
    """ranking_correct of the length-normalised log-probabilities logp/T. NULL where one is, or T is 0."""
    return right(gap_ln(chosen_logp, rejected_logp, chosen_tokens, rejected_tokens))


@score(
    needs=LOGPS,
    kind="preference",
    unit="nats",
    worst="low",
    high_means="easily ranked right: already a small drop of its DPO loss does it",
    source=CHEN,
)
def flip_loss(chosen_logp: Array, rejected_logp: Array, *, beta: Positive = 0.1) -> Array:
    """softplus(−βc): the pair is ranked right iff its DPO loss is at or below this. log 2 at c = 0; near 0 it is hopeless."""
    return softplus(-beta * gap(chosen_logp, rejected_logp))


@score(
    needs=LOGPS,
    kind="preference",
    unit="share",
    worst="high",
    high_means="DPO ranks it right only if nearly every annotator agrees",
    source=CHEN,
)
def break_even_agreement(chosen_logp: Array, rejected_logp: Array, *, beta: Positive = 0.1) -> Array:
    """σ(βc), 0..1: the share of annotators that must prefer y+ for the optimal DPO policy to rank the pair right."""
    return sigmoid(beta * gap(chosen_logp, rejected_logp))


@score(
    needs=(*LOGPS, "policy.chosen_logp", "policy.rejected_logp"),
    kind="preference",
    unit="reward",
    worst="none",
    high_means="the policy has moved towards the chosen response, away from the rejected one",
    source="Rafailov et al. 2023, arXiv:2305.18290",
)
def implicit_reward_gap(
    chosen_logp: Array,
    rejected_logp: Array,
    policy_chosen_logp: Array,
    policy_rejected_logp: Array,
    *,
    beta: Positive = 0.1,
) -> Array:
    """β[log π/π_ref(y+) − log π/π_ref(y−)], π the recipe's policy. Published uses disagree on which end to keep. NULL where one is."""
    return beta * (gap(chosen_logp, rejected_logp) - gap(policy_chosen_logp, policy_rejected_logp))
