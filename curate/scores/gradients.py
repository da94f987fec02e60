"""What the first steps of DPO on a pair would do to its own two log-probabilities, from its empirical neural tangent kernel.

    K++ = ⟨g+, g+⟩   K+− = ⟨g+, g−⟩   K−− = ⟨g−, g−⟩      g± = ∇_θ logp(y±)      ‖g+ − g−‖² = K++ − 2K+− + K−−
    one step of gradient descent:  Δlogp+ ≈ s(K++ − K+−)   Δlogp− ≈ s(K+− − K−−)   Δmargin ≈ s‖g+ − g−‖² ≥ 0
    s = ηβ(1 − a), a = σ(β·margin), ½ at the reference: s = ηβ/2; a rises with the margin, so steps shrink on the way


    displacement_share ρ = (K++ − K+−)/‖g+ − g−‖²          change of logp+ per nat of margin gained
    steps_to_flip = (c + (e^{βc} − 1)/β)/(ηβ‖g+ − g−‖²)   flip_cost = −ρ·c                    c = max(logp− − logp+, 0)

First order: a ranking of pairs, not a forecast of a long run's level. Plain gradient descent: AdamW's steps are another size.
Source: Ren & Sutherland 2024, arXiv:2407.10490.
"""

from __future__ import annotations

import numpy as np

from curate.scores.arithmetic import ratio
from curate.scores.declare import score
from curate.scores.declared import Array
from curate.scores.parameters import Positive
from curate.scores.ranking import LOGPS, gap

REN = "Ren & Sutherland 2024, arXiv:2407.10490"
KERNEL = ("entk_cc", "entk_cr", "entk_rr")


def distance(cc: Array, cr: Array, rr: Array) -> Array:
    """‖g+ − g−‖², (rows,), at least 0; exactly 0 below what float32 gradients resolve, where g+ = g−."""
    squared = cc - 2 * cr + rr
    return np.where(squared <= 1e-6 * (cc + rr), np.where(np.isnan(squared), np.nan, 0.0), squared)


def step(beta: float, learning_rate: float) -> float:
    """s = ηβ/2: the weight of one step at the reference."""
    return learning_rate * beta / 2


@score(
    needs=KERNEL,
    kind="preference",
    unit="nats per nat",
    worst="low",
    high_means="the margin grows by lifting the chosen response; below 0 the chosen response falls although the margin grows",
    source=REN,
)
def displacement_share(entk_cc: Array, entk_cr: Array, entk_rr: Array) -> Array:
    """ρ, (rows,). NULL where one is, or where the two gradients are the same."""
    return ratio(entk_cc - entk_cr, distance(entk_cc, entk_cr, entk_rr))


@score(
    needs=("entk_cc", "entk_cr"),
    kind="preference",
    unit="nats",
    worst="low",
    high_means="one step on this pair lifts its chosen response",
    source=REN,
)
def predicted_chosen_change(
    entk_cc: Array, entk_cr: Array, *, beta: Positive = 0.1, learning_rate: Positive = 1e-6
) -> Array:
    """Δlogp+ of one step of gradient descent on this pair's DPO loss at the reference, (rows,). NULL where one is."""
    return step(beta, learning_rate) * (entk_cc - entk_cr)


@score(
    needs=("entk_cr", "entk_rr"),
    kind="preference",
    unit="nats",
    worst="none",
    high_means="one step on this pair lifts its rejected response",
    source=REN,
)
def predicted_rejected_change(
    entk_cr: Array, entk_rr: Array, *, beta: Positive = 0.1, learning_rate: Positive = 1e-6
) -> Array:
    """Δlogp− of one step of gradient descent on this pair's DPO loss at the reference, (rows,). NULL where one is."""
    return step(beta, learning_rate) * (entk_cr - entk_rr)


@score(
    needs=KERNEL,
    kind="preference",
    unit="nats",
    worst="none",
    high_means="one step on this pair widens its margin much",
    source=REN,
)
def predicted_margin_gain(
    entk_cc: Array, entk_cr: Array, entk_rr: Array, *, beta: Positive = 0.1, learning_rate: Positive = 1e-6
) -> Array:
    """Δ(logp+ − logp−) of one step of gradient descent on this pair's DPO loss at the reference, at least 0, (rows,). NULL where one is."""
    return step(beta, learning_rate) * distance(entk_cc, entk_cr, entk_rr)


@score(
    needs=("entk_cc",),
    kind="preference",
    unit="nats per unit of parameter",
    worst="none",
    high_means="the chosen response moves the weights much",
    source="Paul et al. 2021, arXiv:2107.07075",
)
def gradient_norm(entk_cc: Array) -> Array:
    """‖g+‖ of the summed log-probability, (rows,). NULL where unmeasured."""
    return _root(entk_cc)


@score(
    needs=("entk_rr",),
    kind="preference",
    unit="nats per unit of parameter",
    worst="none",
    high_means="the rejected response moves the weights much",
    source="Paul et al. 2021, arXiv:2107.07075",
)
def rejected_gradient_norm(entk_rr: Array) -> Array:
    """‖g−‖ of the summed log-probability, (rows,). NULL where unmeasured."""
    return _root(entk_rr)


@score(
    needs=KERNEL,
    kind="preference",
    unit="cosine",
    worst="high",
    high_means="pushing the rejected response down pushes the chosen one down too",
    source=REN,
)
def gradient_cosine(entk_cc: Array, entk_cr: Array, entk_rr: Array) -> Array:
    """K+−/√(K++·K−−), −1..1, (rows,). NULL where one is, or where a gradient is 0."""
    return np.clip(ratio(entk_cr, _root(entk_cc) * _root(entk_rr)), -1.0, 1.0)


@score(
    needs=(*KERNEL, *LOGPS),
    version=2,
    kind="preference",
    unit="steps",
    worst="high",
    high_means="many steps on this pair before it is ranked right",
    source=REN,
)
def steps_to_flip(
    entk_cc: Array,
    entk_cr: Array,
    entk_rr: Array,
    chosen_logp: Array,
    rejected_logp: Array,
    *,
    beta: Positive = 0.1,
    learning_rate: Positive = 1e-6,
) -> Array:
    """Steps of gradient descent on this pair alone until its log-probabilities tie, 0 where it is ranked right, (rows,).

    With kernels that stay as they are the margin's change m obeys dm/dt = ηβ‖g+ − g−‖²σ(−βm), from 0 to the gap c: t = (c + (e^{βc} − 1)/β)/
    (ηβ‖g+ − g−‖²), which is 2c/(ηβ‖g+ − g−‖²) as long as βc is small. Real kernels change on the way, so at large βc this tells the
    order of magnitude. NULL where one is unknown, where the steps are more than numbers can hold, or where it is ranked wrong and the two
    gradients are the same.
    """
    missing = np.maximum(gap(chosen_logp, rejected_logp), 0.0)
    with np.errstate(over="ignore"):
        way = missing + np.expm1(beta * missing) / beta
    steps = ratio(way, beta * learning_rate * distance(entk_cc, entk_cr, entk_rr))
    known = ~np.isnan(entk_cc + entk_cr + entk_rr)
    return np.where((missing == 0) & known, 0.0, steps)


@score(
    needs=(*KERNEL, *LOGPS),
    kind="preference",
    unit="nats",
    worst="high",
    high_means="the chosen response loses this much while the pair is being turned round",
    source=REN,
)
def flip_cost(entk_cc: Array, entk_cr: Array, entk_rr: Array, chosen_logp: Array, rejected_logp: Array) -> Array:
    """−ρ·max(gap, 0): what the chosen response loses on the way to a tie, below 0 where it gains, (rows,). NULL as steps_to_flip."""
    missing = np.maximum(gap(chosen_logp, rejected_logp), 0.0)
    cost = -ratio(entk_cc - entk_cr, distance(entk_cc, entk_cr, entk_rr)) * missing
    known = ~np.isnan(entk_cc + entk_cr + entk_rr)
    return np.where((missing == 0) & known, 0.0, cost)


@score(
    needs=("loss_gradient",),
    kind="sft",
    unit="nats per unit of parameter",
    worst="none",
    high_means="the example moves the weights much",
    source="Paul et al. 2021, arXiv:2107.07075",
)
def grand(loss_gradient: Array) -> Array:
    """GraNd: ‖∇ℓ‖ of the mean loss per token at this model, (rows,). NULL where unmeasured."""
    return loss_gradient.copy()


def _root(squared: Array) -> Array:
    return np.sqrt(np.maximum(squared, 0.0))
