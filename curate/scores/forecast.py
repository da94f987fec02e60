"""What the training set as a whole is about to do to a pair, whose fault that is, and what a row does to a target: first-order forecasts.

    G = mean_j s_j (g+_j − g−_j)          the step that the set will take; s_j = β σ(−β·margin_j), β/2 at the reference
    batch_forecast  = ⟨g+_i, P·G⟩         margin_forecast = ⟨g+_i − g−_i, P·G⟩        head_forecast: the LM head's part of the first, forward only
    displacement_contribution = s_i ⟨P·ḡ+, g+_i − g−_i⟩          ḡ+ = mean_j g+_j: their mean is the mean batch_forecast, where P is the same
    influence = Σ_k η_k s_i ⟨P·ḡ_target, g+_i − g−_i⟩            over checkpoints k; SFT rows: ⟨P·ḡ_target, ∇ mean log-probability per token⟩
    influence_cosine = max_j Σ_k η_k cos(ḡ_j, P·(g+_i − g−_i)) / Σ_k η_k      j: the target's groups; SFT rows: cos(ḡ_j, P·∇ log-probability)

P, a diagonal taken at G and then fixed: sgd (1), sign (1/|G|: P·G = sign(G), AdamW's first step), adam (1/√v̂ of a saved optimizer or of a
warm-up). Along another gradient than G, sign's diagonal weighs coordinates most where G is nearly 0: take sgd or adam there. Values are per
unit of step: times η they are nats. First order: they rank, they are no calibrated change of a long run. β, warm-up and optimizer are the
recipe's `forecast:`, the targets its `targets:`.

Source: Pruthi et al. 2020, arXiv:2002.08484 (TracIn); Xia et al. 2024, arXiv:2402.04333 (LESS).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from curate.scores.declare import score
from curate.scores.declared import Array

REN = "first order in the set's step; Ren & Sutherland 2024, arXiv:2407.10490"
TRACIN = "Pruthi et al. 2020, arXiv:2002.08484; Xia et al. 2024, arXiv:2402.04333"
UNIT = "nats per unit of step"
Step = Literal["sgd", "sign", "adam"]
At = Literal["reference", "policy", "warmup"]


@score(
    needs=("{at}.forecast_{step}_chosen",),
    kind="preference",
    unit=UNIT,
    worst="low",
    high_means="the set's step lifts this chosen response; below 0 it is about to fall, whoever's fault it is",
    source=REN,
)
def batch_forecast(chosen: Array, *, step: Step = "sign", at: At = "reference") -> Array:
    """⟨g+_i, P·G⟩, (rows,). NULL where unmeasured. at: the model that is measured: the reference, models.policy, or the reference after a warm-up."""
    return chosen.copy()


@score(
    needs=("{at}.forecast_{step}_chosen", "{at}.forecast_{step}_rejected"),
    kind="preference",
    unit=UNIT,
    worst="low",
    high_means="the set's step widens this pair's margin much",
    source=REN,
)
def margin_forecast(chosen: Array, rejected: Array, *, step: Step = "sign", at: At = "reference") -> Array:
    """⟨g+_i − g−_i, P·G⟩, (rows,). NULL where unmeasured."""
    return chosen - rejected


@score(
    needs=("{at}.head_forecast_{step}",),
    kind="preference",
    unit=UNIT,
    worst="low",
    high_means="the LM head's part of the set's step lifts this chosen response",
    source=REN,
)
def head_forecast(chosen: Array, *, step: Literal["sgd", "sign"] = "sgd", at: At = "reference") -> Array:
    """The LM head's part of batch_forecast, (rows,): two forward passes and no backward. NULL where unmeasured."""
    return chosen.copy()


@score(
    needs=("{at}.contribution_{step}",),
    kind="preference",
    unit=UNIT,
    worst="low",
    high_means="this pair's own step lifts the set's chosen responses; below 0 it pushes them down",
    source=REN,
)
def displacement_contribution(contribution: Array, *, step: Step = "adam", at: At = "warmup") -> Array:
    """s_i⟨P·ḡ+, g+_i − g−_i⟩, (rows,): whose fault a falling chosen response is. NULL where unmeasured.

    Taken after a short warm-up of DPO by default: at the reference itself it misleads.
    """
    return contribution.copy()


@score(
    needs=("influence_{target}_{step}",),
    over="checkpoints",
    unit=UNIT,
    worst="low",
    high_means="training on this row makes the target's answers likelier",
    source=TRACIN,
)
def influence(along: Array, *, target: str, step: Step = "sgd", rates: Array | None = None) -> Array:
    """Σ_k η_k⟨P·ḡ_target, the row's own step⟩ over the checkpoints, (rows,). NULL where one of them is unmeasured.

    target: one of the recipe's `targets`. η_k: the mean learning rate up to checkpoint k by its trainer_state.json; 1 for all where one is not known.
    """
    return (along * _weights(rates, along.shape[1])).sum(axis=1)


@score(
    needs=("cosine_{target}_{step}",),
    over="checkpoints",
    unit="cosine",
    worst="low",
    high_means="training on this row goes the way of the target, or of the one of its groups that it serves best",
    source="Xia et al. 2024, arXiv:2402.04333 (LESS)",
)
def influence_cosine(
    *cosines: Array, target: str, step: Literal["sgd", "adam"] = "sgd", rates: Array | None = None
) -> Array:
    """The largest over the target's groups of Σ_k η_k cos(ḡ_group, P·the row's own step) / Σ_k η_k, −1..1, (rows,). NULL where one is.

    LESS, without projection: a row's length does not count, as it does in `influence`. target: one of the recipe's `targets`; its `per` names
    the column that groups are the values of, none: a single one. P = 1/√v̂ is the checkpoint's own, where LESS adds the row's gradient to Adam's
    state; a target's rows weigh as their summed log-probabilities do. η_k as in `influence`.
    """
    return _of_groups(cosines, rates).max(axis=0)


@score(
    needs=("cosine_{target}_{step}",),
    over="checkpoints",
    unit="group",
    high_means="a code and no amount: the target's groups in the order of their names",
    source="Xia et al. 2024, arXiv:2402.04333 (LESS)",
    names=("{target}",),
)
def influence_group(
    *cosines: Array, target: str, step: Literal["sgd", "adam"] = "sgd", rates: Array | None = None
) -> Array:
    """The target's group that `influence_cosine` is of, (rows,); its name stands beside it, in the column `influence_group_name`. NULL as that."""
    means = _of_groups(cosines, rates)
    return np.where(np.isnan(means).any(axis=0), np.nan, means.argmax(axis=0))


def _of_groups(cosines: tuple[Array, ...], rates: Array | None) -> Array:
    """(groups, rows) means over checkpoints by learning rate of (rows, K) each."""
    weights = _weights(rates, cosines[0].shape[1])
    return np.stack([(x * weights).sum(axis=1) for x in cosines]) / weights.sum()


def _weights(rates: Array | None, checkpoints: int) -> Array:
    """(K,) η_k; 1 for all where one is not known, or there is one alone."""
    known = rates is not None and len(rates) > 1 and not np.isnan(rates).any()
    return rates if known else np.ones(checkpoints)  # type: ignore[return-value]
