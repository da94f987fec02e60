"""EL2N, AUM, IFD and angle concentration over their columns, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from curate.scores import SCORES


@pytest.mark.parametrize("gaps, wanted", [([1.0, -3.0], -1.0), ([2.0], 2.0), ([1.0, np.nan], np.nan)])
def test_aum_is_the_mean_over_checkpoints(gaps, wanted):
    np.testing.assert_array_equal(SCORES["aum"].compute({"target_gap": [gaps]}), [wanted])


@pytest.mark.parametrize(
    "nll, alone, wanted",
    [
        (1.0, 2.0, 0.5),  # the prompt halves the cost
        (3.0, 2.0, 1.5),  # the prompt does not help
        (1.0, 0.0, np.nan),
        (1.0, np.nan, np.nan),
        (np.nan, 1.0, np.nan),
    ],
)
def test_ifd(nll, alone, wanted):
    np.testing.assert_array_equal(SCORES["ifd"].compute({"target_nll": [nll], "alone_nll": [alone]}), [wanted])


def test_el2n_and_angles():
    assert SCORES["el2n"].compute({"target_error": [0.25]})[0] == 0.25
    found = SCORES["angle_concentration"].compute({"angle_intra": [0.5, 0.5], "angle_inter": [0.25, np.nan]})
    np.testing.assert_array_equal(found, [0.75, np.nan])
