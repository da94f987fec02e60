"""95% intervals of dataset values: Wilson's for shares of rows, the normal one for means.

    Wilson: ( p + z²/2n ± z·√(p(1−p)/n + z²/4n²) ) / (1 + z²/n),  z = 1.96
    normal: m ± z·s/√n

Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
"""

from __future__ import annotations

import math

import numpy as np

from curate.scores.declared import Array, Value

Z = 1.959963984540054  # the normal distribution's 97.5% quantile


def wilson(share: float, n: int) -> tuple[float, float]:
    """The interval of a share of n rows; NaNs for n = 0. Never empty, even at 0 and 1."""
    if n == 0:
        return math.nan, math.nan
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return (0.0 if share == 0 else max(0.0, centre - half)), (1.0 if share == 1 else min(1.0, centre + half))


def proportion_value(name: str, flags: Array, *, at: int | None = None) -> Value:
    """The share of ones among the known (0 or 1, NaN left out), with Wilson's interval."""
    known = flags[~np.isnan(flags)]
    share = float(known.mean()) if len(known) else math.nan
    return Value(name, share, *wilson(share, len(known)), len(known), at)


def mean_value(name: str, values: Array, *, at: int | None = None, bounds: tuple[float, float] | None = None) -> Value:
    """The mean of the known (NaN left out), with the normal interval.

    bounds: values that cannot leave low..high; the interval is cut there, and where all of them are equal (a spread of 0 would claim
    certainty) it is Wilson's, which is the widest: no variable between 0 and 1 with mean p varies more than p(1−p). Without bounds a
    single value has no interval (NaN).
    """
    known = values[~np.isnan(values)]
    n = len(known)
    if n == 0:
        return Value(name, math.nan, math.nan, math.nan, 0, at)
    mean = float(known.mean())
    spread = float(known.std(ddof=1)) if n > 1 else 0.0
    if bounds is not None and spread == 0:
        low, high = bounds
        below, above = wilson(min(max((mean - low) / (high - low), 0.0), 1.0), n)
        return Value(name, mean, low + below * (high - low), low + above * (high - low), n, at)
    if n == 1:
        return Value(name, mean, math.nan, math.nan, 1, at)
    half = Z * spread / math.sqrt(n)
    least, most = bounds if bounds is not None else (-math.inf, math.inf)
    return Value(name, mean, max(least, mean - half), min(most, mean + half), n, at)
