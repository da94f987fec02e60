"""Squeezing scores and head displacement are their columns; NULL stays NULL."""

from __future__ import annotations

import numpy as np
import pytest

from curate.scores import SCORES


@pytest.mark.parametrize("name", ["valley_depth", "squeezed_mass", "squeezed_vocabulary"])
def test_columns_as_they_are(name):
    found = SCORES[name].compute({name: [0.5, np.nan]})
    np.testing.assert_array_equal(found, [0.5, np.nan])


@pytest.mark.parametrize(
    "cc, cr, wanted", [(5.0, 1.0, -4.0), (2.0, 3.0, 1.0), (np.nan, 1.0, np.nan), (1.0, np.nan, np.nan)]
)
def test_head_displacement(cc, cr, wanted):
    np.testing.assert_array_equal(SCORES["head_displacement"].compute({"head_cc": [cc], "head_cr": [cr]}), [wanted])


def test_on_policy_gap():
    """Samples at −1 nats a token; rejected at −12 nats over 4 tokens, then unknown, then empty."""
    columns = {
        "sample_logp": [-1.0, -1.0, np.nan, -1.0],
        "rejected_logp": [-12.0, np.nan, -12.0, 0.0],
        "rejected_tokens": [4, 4, 4, 0],
    }
    np.testing.assert_array_equal(SCORES["on_policy_gap"].compute(columns), [2.0, np.nan, np.nan, np.nan])
