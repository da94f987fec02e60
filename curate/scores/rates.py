"""Pass rates: what the counts of right and wrong samples say of a row, and how surely. For choosing prompts of RL with verifiable rewards.

    pass_rate             = c / n                          c right ones of n samples
    pass_rate_low, _high  = Wilson's 95% interval of it
    pass_at k             = 1 − C(n − c, k) / C(n, k)      unbiased estimate of "one of k samples is right"; NULL where n < k
    pass_band             = where that interval lies of low..high, undecided where it crosses an end

c/n is rounded once, as SQL's `.2` is, so that `pass_rate BETWEEN .2 AND .8` has 1 of 5 and 4 of 5 in it whatever n is: a band works on counts.

Sources: Wilson 1927, doi:10.1080/01621459.1927.10502953; Chen et al. 2021, arXiv:2107.03374 (pass@k); prompts whose samples are all right or all
wrong have no gradient under group-relative advantages: Yu et al. 2025, arXiv:2503.14476.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from curate.scores.declare import dataset_value, score
from curate.scores.declared import Array, Value
from curate.scores.intervals import Z, mean_value, proportion_value
from curate.scores.parameters import Range, Share

WILSON, CHEN, DAPO = (
    "Wilson 1927, doi:10.1080/01621459.1927.10502953",
    "Chen et al. 2021, arXiv:2107.03374",
    "Yu et al. 2025, arXiv:2503.14476",
)
BANDS = ("all_wrong", "below", "inside", "above", "all_right", "undecided")
ALL_WRONG, BELOW, INSIDE, ABOVE, ALL_RIGHT, UNDECIDED = range(6)
LOW, HIGH = 0.2, 0.8  # the band of `pass_band` and of adaptive sampling where the recipe names none


def share_of(n_correct: Array, n_samples: Array) -> Array:
    """c / n, NaN where either is unknown, n is 0, or there cannot be c right ones of n (imported counts)."""
    possible = (n_samples > 0) & (n_correct >= 0) & (n_correct <= n_samples)
    return np.divide(n_correct, n_samples, out=np.full(len(n_correct), np.nan), where=possible)


def wilson_bounds(n_correct: Array, n_samples: Array) -> tuple[Array, Array]:
    """Wilson's 95% interval of every row, (rows,) each; exactly 0 below 0 of n, exactly 1 above n of n. NaN as `share_of`."""
    share = share_of(n_correct, n_samples)
    n = np.where(np.isnan(share), np.nan, n_samples)
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    low, high = np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)
    return np.where(share == 0, 0.0, low), np.where(share == 1, 1.0, high)


def bands(n_correct: Array, n_samples: Array, low: float, high: float) -> Array:
    """(rows,) codes of BANDS: where the interval lies of low..high, both ends in it. NaN where nothing was graded. ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"low is {low:g} and high {high:g}, expected a band with low below high")
    share = share_of(n_correct, n_samples)
    least, most = wilson_bounds(n_correct, n_samples)
    codes = np.full(len(share), float(UNDECIDED))
    codes[(least >= low) & (most <= high)] = INSIDE
    codes[most < low] = BELOW
    codes[least > high] = ABOVE
    codes[(codes == BELOW) & (share == 0)] = ALL_WRONG
    codes[(codes == ABOVE) & (share == 1)] = ALL_RIGHT
    return np.where(np.isnan(share), np.nan, codes)


@score(
    needs=("n_correct", "n_samples"),
    kind="sft",
    unit="share",
    worst="none",
    high_means="the model answers it right; at 0 and at 1 group-relative RL learns nothing from it",
    source=DAPO,
)
def pass_rate(n_correct: Array, n_samples: Array) -> Array:
    """Share of the samples that are graded right, 0..1, of the last checkpoint. NULL where nothing was sampled or graded."""
    return share_of(n_correct, n_samples)


@score(
    needs=("n_correct", "n_samples"),
    kind="sft",
    unit="share",
    worst="none",
    high_means="the pass rate is at least this, as far as the samples tell",
    source=WILSON,
)
def pass_rate_low(n_correct: Array, n_samples: Array) -> Array:
    """The lower end of the pass rate's 95% interval, 0..1. NULL where the pass rate is."""
    return wilson_bounds(n_correct, n_samples)[0]


@score(
    needs=("n_correct", "n_samples"),
    kind="sft",
    unit="share",
    worst="none",
    high_means="the pass rate may be as high as this, as far as the samples tell",
    source=WILSON,
)
def pass_rate_high(n_correct: Array, n_samples: Array) -> Array:
    """The upper end of the pass rate's 95% interval, 0..1. NULL where the pass rate is."""
    return wilson_bounds(n_correct, n_samples)[1]


@score(
    needs=("n_correct", "n_samples"),
    kind="sft",
    unit="probability",
    worst="none",
    high_means="one of k samples is likely right",
    source=CHEN,
)
def pass_at(n_correct: Array, n_samples: Array, *, k: Annotated[int, Range(1)] = 1) -> Array:
    """1 − C(n − c, k)/C(n, k), 0..1: the unbiased estimate that at least one of k samples is right. NULL where fewer than k were graded.

    k: how many samples one may have; with k: 1 it is the pass rate.
    """
    return _pass_at(n_correct, n_samples, k)


def _pass_at(n_correct: Array, n_samples: Array, k: int) -> Array:
    known = ~np.isnan(share_of(n_correct, n_samples)) & (n_samples >= k)
    c, n = np.where(known, n_correct, 0.0), np.where(known, n_samples, float(k))
    none_right = np.ones(len(c))
    for taken in range(k):  # of n − taken samples that are left, n − c − taken are wrong
        none_right *= np.maximum(n - c - taken, 0.0) / (n - taken)
    return np.where(known, 1.0 - none_right, np.nan)


@score(
    needs=("n_correct", "n_samples"),
    kind="sft",
    unit="code",
    worst="none",
    high_means="a name, not an amount: where the pass rate's 95% interval lies of the band low..high",
    source=WILSON,
    names=BANDS,
)
def pass_band(n_correct: Array, n_samples: Array, *, low: Share = LOW, high: Share = HIGH) -> Array:
    """0 all_wrong, 1 below, 2 inside, 3 above, 4 all_right: the whole 95% interval lies there; 5 undecided: it crosses an end of the band.

    NULL where nothing was sampled or graded. all_wrong and all_right are rows below and above whose samples are graded all alike; where too few
    samples are alike to tell, the row is undecided. low, high: the band, both ends in it.
    """
    return bands(n_correct, n_samples, low, high)


@dataset_value(needs=("n_correct", "n_samples"), kind="sft", source=DAPO, of="pass_rate")
def pass_rate_values(n_correct: Array, n_samples: Array) -> list[Value]:
    """pass_rate: the mean over the rows, normal interval in 0..1; pass_rate_all_wrong, _mixed, _all_right: shares of rows by their samples' grades,
    Wilson's interval.
    """
    share = share_of(n_correct, n_samples)
    known = share[~np.isnan(share)]
    return [
        mean_value("pass_rate", share, bounds=(0.0, 1.0)),
        proportion_value("pass_rate_all_wrong", (known == 0).astype(float)),
        proportion_value("pass_rate_mixed", ((known > 0) & (known < 1)).astype(float)),
        proportion_value("pass_rate_all_right", (known == 1).astype(float)),
    ]


@dataset_value(needs=("n_correct", "n_samples"), kind="sft", source=CHEN, of="pass_at")
def pass_at_values(n_correct: Array, n_samples: Array, *, k: Annotated[int, Range(1)] = 1) -> list[Value]:
    """pass_at_<k>: the mean over the rows of which k samples or more are graded; normal interval, in 0..1."""
    return [mean_value(f"pass_at_{k}", _pass_at(n_correct, n_samples, k), bounds=(0.0, 1.0))]


@dataset_value(needs=("n_correct", "n_samples"), kind="sft", source=WILSON, of="pass_band")
def pass_band_values(n_correct: Array, n_samples: Array, *, low: Share = LOW, high: Share = HIGH) -> list[Value]:
    """pass_band_<name>: the share of rows in every band, with Wilson's interval."""
    codes = bands(n_correct, n_samples, low, high)
    known = codes[~np.isnan(codes)]
    return [proportion_value(f"pass_band_{name}", (known == code).astype(float)) for code, name in enumerate(BANDS)]
