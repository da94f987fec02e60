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
