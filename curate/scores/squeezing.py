"""Squeezing: what DPO's push on a rejected response does around it, and the LM head's part of likelihood displacement.

    valley_depth        = mean_t [max_v log π(v) − log π(y−_t)]
    squeezed_mass       = mean_t π*·(π* + π_{y−} − ‖π‖²)       π* the largest probability among tokens other than y−_t
    squeezed_vocabulary = mean_t share of the vocabulary with π_i < ‖π‖² − π_{y−}
    on_policy_gap       = log-prob of the model's own samples − that of y−, both mean per token
    head_displacement   = ⟨R+ᵀH+, R−ᵀH−⟩ − ‖R+ᵀH+‖²            R = onehot(y) − π(·); CHES replaces every ⟨r, r'⟩ by 1

Source: Ren & Sutherland 2024, arXiv:2407.10490; Razin et al. 2024, arXiv:2410.08847.
"""

from __future__ import annotations

import numpy as np

from curate.scores.declare import score
from curate.scores.declared import Array

REN = "Ren & Sutherland 2024, arXiv:2407.10490"


@score(
    needs=("valley_depth",),
    kind="preference",
    unit="nats per token",
    worst="high",
    high_means="the rejected response lies deep in a valley; pushing it down feeds the model's favourite tokens",
    source=REN,
)
def valley_depth(valley_depth: Array) -> Array:
    """How far below the model's favourite tokens the rejected response lies, at least 0, (rows,). NULL where unmeasured."""
    return valley_depth.copy()


@score(
    needs=("squeezed_mass",),
    kind="preference",
    unit="probability²",
    worst="high",
    high_means="pushing the rejected response down lifts one other token most",
    source=REN,
)
def squeezed_mass(squeezed_mass: Array) -> Array:
    """First-order rise of the strongest other token under a push on the rejected response, (rows,). NULL where unmeasured."""
    return squeezed_mass.copy()


@score(
    needs=("squeezed_vocabulary",),
    kind="preference",
    unit="share",
    worst="high",
    high_means="most of the vocabulary sinks together with the rejected response",
    source=REN,
)
def squeezed_vocabulary(squeezed_vocabulary: Array) -> Array:
    """Share of the vocabulary below the squeezing line, 0..1, (rows,). NULL where unmeasured."""
    return squeezed_vocabulary.copy()


@score(
    needs=("head_cc", "head_cr"),
    kind="preference",
    unit="gradient²",
    worst="high",
    high_means="through the LM head, DPO pushes the chosen response down",
    source="Razin et al. 2024, arXiv:2410.08847; " + REN,
)
def head_displacement(head_cc: Array, head_cr: Array) -> Array:
    """The LM-head part of K+− − K++, (rows,). NULL where one is. Judge an error against |head_cr| + head_cc."""
    return head_cr - head_cc


@score(
    needs=("sample_logp", "rejected_logp", "rejected_tokens"),
    kind="preference",
    unit="nats per token",
    worst="high",
    high_means="the rejected response is far from what the model says itself; squeezing grows with it",
    source=REN,
)
def on_policy_gap(sample_logp: Array, rejected_logp: Array, rejected_tokens: Array) -> Array:
    """Mean per-token log-prob of sampled responses minus that of the rejected one, (rows,). NULL where one is, or where y− is empty."""
    tokens = np.where(rejected_tokens > 0, rejected_tokens, np.nan)
    return sample_logp - rejected_logp / tokens
