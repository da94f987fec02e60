"""Accuracy read off graded samples: a hand table."""

from __future__ import annotations

import numpy as np

from curate.measurements import MEASUREMENTS, providers
from curate.measurements.accuracy import Graded, accuracy, on_policy


def test_hand_table():
    rows = [
        [Graded(True, 4, -2.0), Graded(False, 6, -8.0, finished=False)],  # −10 nats over 10 tokens
        [],  # nothing sampled
        [Graded(False)] * 3,  # an engine without log-probabilities
        [Graded(True, 4, -2.0), Graded(True, 4, None)],  # one sample's is missing
        [Graded(False, 0, 0.0, finished=False)],  # nothing generated
        [Graded(None, 5, -1.0), Graded(None, 5, -4.0)],  # no answer to compare with
    ]
    nan = np.nan
    wanted = {
        "n_samples": [2, nan, 3, 2, 1, 2],
        "n_correct": [1, nan, 0, 2, 0, nan],
        "accuracy": [0.5, nan, 0.0, 1.0, 0.0, nan],
        "sample_logp": [-1.0, nan, nan, nan, nan, -0.5],
        "n_unfinished": [1, nan, 0, 0, 1, 0],
    }
    found = accuracy(rows)
    assert set(found) == set(wanted) == set(MEASUREMENTS["accuracy"].columns)
    for column, values in wanted.items():
        assert found[column].dtype == np.float64
        np.testing.assert_array_equal(found[column], values)
    alone = on_policy(rows)
    assert set(alone) == {"n_samples", "sample_logp", "n_unfinished"}
    for column, values in alone.items():
        np.testing.assert_array_equal(values, found[column])


def test_no_rows():
    assert all(values.shape == (0,) for values in accuracy([]).values())


def test_it_is_registered():
    assert providers("accuracy", "sft").reads == "sample" and providers("n_unfinished", "sft").name == "accuracy"
    assert providers("sample_logp", "preference").name == "on_policy" and providers("accuracy", "preference") is None
