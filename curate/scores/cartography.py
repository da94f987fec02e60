"""The data map: every row by how sure the model is of its target over the checkpoints, and by how much that changes.

    p_k = exp(−target_nll_k);   confidence = mean_k p_k,   variability = std_k p_k
    ambiguous   the `share` of the rows with the highest variability
    easy, hard  of the others: the upper half by confidence, the lower half (a tie with the median is easy)

k are the checkpoints of the training: the untrained model, step 0, is none of the paper's epochs. Counted as one, it makes the rows that are
learned best the most variable, and so "ambiguous". The paper takes the extreme thirds of each, which overlap; here every row is in one region.
Source: Swayamdipta et al. 2020, arXiv:2009.10795, section 3 (training on the ambiguous third kept most of the accuracy out of distribution).
"""

from __future__ import annotations

import numpy as np

from curate.scores.declare import dataset_value, score
from curate.scores.declared import Array, Value
from curate.scores.intervals import mean_value, proportion_value
from curate.scores.parameters import Share
from curate.scores.trajectories import SWAYAMDIPTA, confidence, of_training, variability

NAMES = ("hard", "ambiguous", "easy")


def regions(target_nll: Array, share: float, trained: np.ndarray | None = None) -> Array:
    """(rows,) codes into NAMES; NaN where a checkpoint of the training is unmeasured or there are fewer than two."""
    target_nll = of_training(target_nll, trained)
    result = np.full(len(target_nll), np.nan)
    sure, varies = confidence(target_nll), variability(target_nll)
    known = ~np.isnan(sure) & (target_nll.shape[1] > 1)
    if not known.any():
        return result
    ambiguous = known & (varies > np.quantile(varies[known], 1 - share)) if share < 1 else known
    others = known & ~ambiguous
    result[ambiguous] = NAMES.index("ambiguous")
    if others.any():
        result[others] = np.where(sure[others] >= np.median(sure[others]), NAMES.index("easy"), NAMES.index("hard"))
    return result


@score(
    needs=("target_nll",),
    kind="sft",
    over="checkpoints",
    unit="region",
    worst="none",
    high_means="a code and no amount: 0 hard, 1 ambiguous, 2 easy",
    source=SWAYAMDIPTA,
    names=NAMES,
    least=2,
    version=2,
)
def map_region(target_nll: Array, *, share: Share = 1 / 3, trained: np.ndarray | None = None) -> Array:
    """Where the row lies on the data map, 0 to 2; its name stands beside it, in the column `map_region_name`.

    1 ambiguous: among the `share` of the rows with the highest variability. 2 easy, 0 hard: the others, by the median of their
    confidence. NULL where a checkpoint is unmeasured or there are fewer than two after training began (step 0 does not count). A row's region
    depends on the other rows.
    """
    return regions(target_nll, share, trained)


@dataset_value(needs=("target_nll",), kind="sft", over="checkpoints", source=SWAYAMDIPTA, of="map_region")
def map_values(target_nll: Array, *, share: Share = 1 / 3, trained: np.ndarray | None = None) -> list[Value]:
    """The map in numbers: map_<region>, its share of the rows (Wilson), and the means of confidence and variability in it (normal)."""
    target_nll = of_training(target_nll, trained)
    codes = regions(target_nll, share)
    result = []
    for code, name in enumerate(NAMES):
        here = codes == code
        result.append(proportion_value(f"map_{name}", np.where(np.isnan(codes), np.nan, here)))
        for what, values in (("confidence", confidence(target_nll)), ("variability", variability(target_nll))):
            result.append(mean_value(f"map_{name}_{what}", values[here], bounds=(0.0, 1.0)))
    return result
