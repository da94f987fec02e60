"""How hard an SFT example is for the model, from one forward pass, or from one at each checkpoint.

el2n = mean_t ‖π − onehot(y_t)‖₂                              Paul et al. 2021, arXiv:2107.07075
aum  = mean over the training's checkpoints of mean_t (z_y − largest other)  Pleiss et al. 2020, arXiv:2001.10528
ifd  = mean CE(y | x) / mean CE(y)                            Li et al. 2023, arXiv:2308.12032
neighbour_excess = ℓ(y | x) − ℓ(y | neighbours, x)            ICA; RHO-LOSS: Mindermann et al. 2022, arXiv:2206.07137
angle_concentration = intra + inter                           GAIN-RL 2025, arXiv:2506.02281
"""

from __future__ import annotations

import numpy as np

from curate.scores.arithmetic import ratio
from curate.scores.declare import score
from curate.scores.declared import Array
from curate.scores.trajectories import of_training


@score(
    needs=("target_error",),
    kind="sft",
    unit="probability",
    worst="none",
    high_means="far from learned, or mislabelled",
    source="Paul et al. 2021, arXiv:2107.07075",
)
def el2n(target_error: Array) -> Array:
    """Mean norm of the prediction's error, 0..√2, (rows,). NULL where unmeasured. Meant for a checkpoint early in training."""
    return target_error.copy()


@score(
    needs=("target_gap",),
    kind="sft",
    over="checkpoints",
    unit="logits",
    worst="low",
    high_means="learned with a margin; low values are hard or mislabelled",
    source="Pleiss et al. 2020, arXiv:2001.10528",
    least=1,
    version=2,
)
def aum(target_gap: Array, *, trained: np.ndarray | None = None) -> Array:
    """Area under the margin: mean over the training's checkpoints, (rows, K) -> (rows,). NULL where one is unmeasured; step 0 does not count."""
    gap = of_training(target_gap, trained)
    return np.asarray(gap.mean(1)) if gap.shape[1] else np.full(len(gap), np.nan)


@score(
    needs=("target_nll", "alone_nll"),
    kind="sft",
    unit="ratio",
    worst="none",
    high_means="the prompt helps little; above 1 it does not help at all",
    source="Li et al. 2023, arXiv:2308.12032",
)
def ifd(target_nll: Array, alone_nll: Array) -> Array:
    """Instruction-following difficulty, (rows,) ≥ 0. NULL where one is unmeasured or the completion alone costs nothing."""
    return ratio(target_nll, alone_nll)


@score(
    needs=("angle_intra", "angle_inter"),
    kind="sft",
    unit="cosine",
    worst="none",
    high_means="its gradient is large and it is learned early; GAIN-RL trains on high values first",
    source="GAIN-RL 2025, arXiv:2506.02281",
)
def angle_concentration(angle_intra: Array, angle_inter: Array) -> Array:
    """Angle concentration within the question plus between question and the rest of the prompt, −2..2, (rows,). NULL where one is."""
    return angle_intra + angle_inter


@score(
    needs=("target_nll", "neighbour_nll"),
    kind="sft",
    unit="nats/token",
    worst="low",
    high_means="its nearest training examples make it likelier: it can be learned, and they teach it",
    source="ICA, in-context approximation; RHO-LOSS: Mindermann et al. 2022, arXiv:2206.07137",
)
def neighbour_excess(target_nll: Array, neighbour_nll: Array) -> Array:
    """ℓ(y|x) − ℓ(y|x, neighbours), of the last checkpoint; below 0 where the neighbours make it unlikelier. NULL without a neighbour that fits.

    The neighbours, at most three, are the rows of the source whose prompts share most words with this one's (BM25).
    """
    return target_nll - neighbour_nll
