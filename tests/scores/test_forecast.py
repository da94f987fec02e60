"""Influence as a cosine over a target's groups, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from curate.scores import SCORES

NAN = np.nan


@pytest.mark.parametrize(
    "groups, rates, wanted, code",
    [
        ([[0.4, 0.0]], [1.0, 3.0], 0.1, 0),  # (0.4 + 0)/4
        ([[0.9, -0.5], [0.3, 0.3]], None, 0.3, 1),  # means .2 and .3: not the group that was once the best
        ([[0.9, -0.5], [0.3, 0.3]], [3.0, 1.0], 0.55, 0),
        ([[-0.2, -0.4], [-0.4, -0.6]], [1.0, NAN], -0.3, 0),  # a rate that nobody knows: equal weights
        ([[0.5]], [0.0], 0.5, 0),  # a single model
        ([[0.1, 0.1], [NAN, 0.9]], None, NAN, NAN),  # the unknown one could have been the best
    ],
)
def test_the_best_groups_mean_over_checkpoints(groups, rates, wanted, code):
    columns = [np.array([x, x]) for x in groups]
    rates = None if rates is None else np.array(rates)
    for name, value in (("influence_cosine", wanted), ("influence_group", code)):
        found = SCORES[name].function(*columns, target="bbh", rates=rates)
        np.testing.assert_allclose(found, [value, value])
