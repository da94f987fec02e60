"""Ranking accuracies of a whole dataset, and what an ideal DPO policy could reach.

    ranking accuracy           = mean 1[logp+ ≥ logp−]                              length-normalised beside it; not the reward accuracy
    idealised ranking accuracy = mean 1[−c + (1/β)·log(α/(1−α)) ≥ 0]                α: the share of annotators that prefer y+

Source: Chen et al. 2024, arXiv:2405.19534.
"""

from __future__ import annotations

import numpy as np

from curate.scores.declare import dataset_value
from curate.scores.declared import Array, Value
from curate.scores.intervals import proportion_value
from curate.scores.parameters import Share
from curate.scores.ranking import CHEN, LOGPS_AND_TOKENS, gap, gap_ln, right

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)
CLIP = 1e-3  # α = 1 counts as 0.999 (and 0 as 0.001), so that its log-odds are finite


@dataset_value(needs=LOGPS_AND_TOKENS, kind="preference", source=CHEN)
def ranking_accuracy(
    chosen_logp: Array, rejected_logp: Array, chosen_tokens: Array, rejected_tokens: Array
) -> list[Value]:
    """ranking_accuracy and ranking_accuracy_ln of the reference over the pairs measured; Wilson intervals."""
    summed = right(gap(chosen_logp, rejected_logp))
    per_token = right(gap_ln(chosen_logp, rejected_logp, chosen_tokens, rejected_tokens))
    return [proportion_value("ranking_accuracy", summed), proportion_value("ranking_accuracy_ln", per_token)]


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
