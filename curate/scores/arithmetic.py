"""The three functions that every family divides and squashes with: none overflows, warns, or turns an unknown into a number."""

from __future__ import annotations

import numpy as np

from curate.scores.declared import Array


def ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN where the denominator is 0 or either is NaN."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    result = np.full(numerator.shape, np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        np.divide(numerator, denominator, out=result, where=denominator != 0)
    return result


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(−x)), to the last digit on both tails."""
    x = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) = −log σ(−x)."""
    x = np.asarray(x, dtype=np.float64)
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))
