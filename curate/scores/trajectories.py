"""Training-dynamics scores: what a row's accuracy or target NLL does over the checkpoints of a run.

Step 0 is the untrained model (models.reference of an SFT recipe, or a run's own checkpoint-0). Means over epochs (confidence, variability,
correctness; aum and map_region elsewhere) are over the checkpoints of the training alone, as in the paper, whose epochs are counted from the
end of the first. What is about change counts from the start: forgetting_events (a row that the untrained model answered and the first
checkpoint does not was forgotten), first_learned_step (0: known before training), never_learned, loss_drop, learning_impact. A row with an
unmeasured checkpoint is NULL, unless the measured ones decide its value.

    p          = exp(−target_nll)                      per-token geometric mean of the target's probability
    confidence = mean_k p_k,  variability = std_k p_k  Swayamdipta et al. 2020, arXiv:2009.10795
    correct_k  = accuracy_k ≥ level; an event of forgetting is correct_k, then not correct_{k+1}     Toneva et al. 2019, arXiv:1812.05159
    loss_drop  = (ℓ(θ_0) − ℓ(θ_K)) / ℓ(θ_0)            TACS 2026, arXiv:2605.09404
    learning_impact = 1 − Σ_k (a_k − ā_k)² / Σ_k (1 − ā_k)², a the row's accuracy, ā the mean over rows   LIMR, arXiv:2502.11886
"""

from __future__ import annotations

import numpy as np

from curate.scores.arithmetic import ratio
from curate.scores.declare import score
from curate.scores.declared import Array
from curate.scores.parameters import Share

SWAYAMDIPTA = "Swayamdipta et al. 2020, arXiv:2009.10795"
TONEVA = "Toneva et al. 2019, arXiv:1812.05159"


def correct(accuracy: Array, level: float) -> Array:
    """(rows, K) 1.0 where accuracy ≥ level, 0.0 where below, NaN where unmeasured."""
    return np.where(np.isnan(accuracy), np.nan, accuracy >= level)


def of_training(values: Array, trained: np.ndarray | None) -> Array:
    """(rows, K) without the untrained model's column. trained: (K,) booleans; None where nobody said: all of them."""
    return values if trained is None else values[:, trained]


@score(
    needs=("target_nll",),
    kind="sft",
    over="checkpoints",
    unit="probability",
    worst="low",
    high_means="easy to learn; low values are hard to learn or mislabelled",
    source=SWAYAMDIPTA,
    least=1,
    version=2,
)
def confidence(target_nll: Array, *, trained: np.ndarray | None = None) -> Array:
    """Mean over the training's checkpoints of exp(−nll), 0..1. NULL where one is unmeasured; step 0, the untrained model, does not count."""
    return _over_known(np.exp(-of_training(target_nll, trained)), np.mean)


@score(
    needs=("target_nll",),
    kind="sft",
    over="checkpoints",
    unit="probability",
    worst="none",
    high_means="ambiguous: the model changed its mind about it",
    source=SWAYAMDIPTA,
    least=2,
    version=2,
)
def variability(target_nll: Array, *, trained: np.ndarray | None = None) -> Array:
    """Standard deviation (over K, as in the paper) of exp(−nll) over the training's checkpoints, 0..0.5.

    NULL where one is unmeasured, and where there are fewer than two; step 0, the untrained model, does not count.
    """
    nll = of_training(target_nll, trained)
    return _over_known(np.exp(-nll), np.std) if nll.shape[1] > 1 else np.full(len(nll), np.nan)


@score(
    needs=("accuracy",),
    kind="sft",
    over="checkpoints",
    unit="share",
    worst="none",
    high_means="answered right at most checkpoints",
    source=SWAYAMDIPTA,
    least=1,
    version=2,
)
def correctness(accuracy: Array, *, level: Share = 0.5, trained: np.ndarray | None = None) -> Array:
    """Share of the training's checkpoints with accuracy ≥ level, 0..1. NULL where one is unmeasured; step 0 does not count."""
    return _over_known(correct(of_training(accuracy, trained), level), np.mean)


@score(
    needs=("accuracy",),
    kind="sft",
    over="checkpoints",
    unit="events",
    worst="none",
    high_means="learned and lost again and again",
    source=TONEVA,
)
def forgetting_events(accuracy: Array, *, level: Share = 0.5) -> Array:
    """How often correct is followed by wrong, from the untrained model on, 0, 1, 2, …; 0 too where it was never correct.

    NULL where a checkpoint is unmeasured.
    """
    return _over_known(np.diff(correct(accuracy, level), axis=1) == -1, np.sum, known=accuracy)


@score(
    needs=("accuracy",),
    kind="sft",
    over="checkpoints",
    unit="steps",
    worst="none",
    high_means="learned late",
    source=TONEVA,
    null_where="never_learned",
)
def first_learned_step(accuracy: Array, *, level: Share = 0.5, steps: np.ndarray | None = None) -> Array:
    """The step of the first checkpoint with accuracy ≥ level (its index where nobody knows the steps); 0: known before training.

    NULL where never_learned is 1, which is not unknown; and, unknown, where an earlier checkpoint is unmeasured.
    """
    flags = correct(accuracy, level)
    index = np.arange(flags.shape[1]) if steps is None else np.asarray(steps, dtype=np.float64)
    learned = flags == 1
    if not flags.shape[1]:
        return np.full(len(flags), np.nan)
    first = learned.argmax(axis=1)
    before_known = ~np.logical_or.accumulate(np.isnan(flags), axis=1)[np.arange(len(flags)), first]
    return np.where(learned.any(axis=1) & before_known, index[first], np.nan)


@score(
    needs=("accuracy",),
    kind="sft",
    over="checkpoints",
    unit="0 or 1",
    worst="high",
    high_means="wrong at every checkpoint: too hard, or mislabelled",
    source=TONEVA,
)
def never_learned(accuracy: Array, *, level: Share = 0.5) -> Array:
    """1 where accuracy < level at every checkpoint, 0 where it is not at one. NULL where the measured ones do not decide it."""
    flags = correct(accuracy, level)
    learned = (flags == 1).any(axis=1)
    undecided = np.isnan(flags).any(axis=1) | (flags.shape[1] == 0)
    return np.where(learned, 0.0, np.where(undecided, np.nan, 1.0))


@score(
    needs=("target_nll",),
    kind="sft",
    over="checkpoints",
    unit="share",
    worst="low",
    high_means="the run, trained towards a target, made this row likelier too",
    source="TACS 2026, arXiv:2605.09404",
)
def loss_drop(target_nll: Array) -> Array:
    """(first NLL − last NLL) / first NLL, at most 1; below 0 where it grew. NULL where either is, the first is 0, or K < 2."""
    if target_nll.shape[1] < 2:
        return np.full(len(target_nll), np.nan)
    return ratio(target_nll[:, 0] - target_nll[:, -1], target_nll[:, 0])


@score(
    needs=("accuracy",),
    kind="sft",
    over="checkpoints",
    unit="1",
    worst="low",
    high_means="learned as the whole set is learned",
    source="LIMR, Li et al. 2025, arXiv:2502.11886",
)
def learning_impact(accuracy: Array) -> Array:
    """LIMR's alignment with the mean curve over all rows given, at most 1. NULL where a checkpoint is unmeasured or ā is 1 throughout.

    ā_k is the mean over the rows measured at checkpoint k, so a row's value depends on the other rows.
    """
    known = ~np.isnan(accuracy)
    mean = ratio(np.where(known, accuracy, 0.0).sum(axis=0), known.sum(axis=0))  # (K,)
    away = ((accuracy - mean) ** 2).sum(axis=1)
    return 1 - ratio(away, ((1 - mean) ** 2).sum())


def _over_known(values: Array, reduce: object, *, known: Array | None = None) -> Array:
    """reduce over axis 1, NaN where a checkpoint is unmeasured or there is none."""
    measured = values if known is None else known
    result = np.full(len(values), np.nan)
    rows = ~np.isnan(measured).any(axis=1) & (measured.shape[1] > 0)
    result[rows] = reduce(values[rows], axis=1)  # type: ignore[operator]
    return result
