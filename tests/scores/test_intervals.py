"""Intervals: published values, coverage of a seeded simulation, and the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from curate.scores.intervals import mean_value, proportion_value, wilson


@pytest.mark.parametrize(
    "k, n, low, high",
    [  # Newcombe 1998, table I, method 3 (score)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(k, n, low, high):
    found = wilson(k / n, n)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_edges():
    assert all(math.isnan(x) for x in wilson(0.0, 0))
    assert wilson(1.0, 5)[1] == 1 and wilson(0.0, 5)[0] == 0
    v = proportion_value("x", np.array([np.nan, np.nan]))
    assert math.isnan(v.value) and v.n == 0
    v = mean_value("x", np.array([0.0, 0.0, np.nan]), bounds=(0.0, 1.0))
    assert (v.value, v.low, v.n) == (0.0, 0.0, 2) and v.high == pytest.approx(wilson(0.0, 2)[1])
    v = mean_value("x", np.array([3.0]))
    assert v.value == 3 and math.isnan(v.low) and math.isnan(v.high)
    v = mean_value("x", np.array([1.0, 2.0, 3.0]))
    assert (v.low, v.high) == pytest.approx((2 - 1.959964 / math.sqrt(3), 2 + 1.959964 / math.sqrt(3)))


def test_coverage():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        v = proportion_value("x", (rng.random(60) < 0.1).astype(float))
        inside += v.low <= 0.1 <= v.high
    assert 930 <= inside <= 985
