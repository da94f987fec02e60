"""Accuracy read off graded samples: a hand table."""

from __future__ import annotations

import numpy as np

from curate.measurements import MEASUREMENTS, providers
from curate.measurements.accuracy import Graded, accuracy


def test_hand_table():
    rows = [
        [Graded(True, 4, -2.0), Graded(False, 6, -8.0, finished=False)],  # −10 nats over 10 tokens
        [],  # nothing sampled
        [Graded(False)] * 3,  # an engine without log-probabilities
        [Graded(True, 4, -2.0), Graded(True, 4, None)],  # one sample's is missing
        [Graded(False, 0, 0.0, finished=False)],  # nothing generated
    ]
    nan = np.nan
    wanted = {
        "n_samples": [2, nan, 3, 2, 1],
        "n_correct": [1, nan, 0, 2, 0],
        "accuracy": [0.5, nan, 0.0, 1.0, 0.0],
        "sample_logp": [-1.0, nan, nan, nan, nan],
        "n_unfinished": [1, nan, 0, 0, 1],
    }
    found = accuracy(rows)
    assert set(found) == set(wanted) == set(MEASUREMENTS["accuracy"].columns)
    for column, values in wanted.items():
        assert found[column].dtype == np.float64
        np.testing.assert_array_equal(found[column], values)


def test_no_rows():
    assert all(values.shape == (0,) for values in accuracy([]).values())


def test_it_is_registered():
    assert providers("accuracy", "sft").reads == "sample" and providers("n_unfinished", "sft").name == "accuracy"
