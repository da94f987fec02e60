"""The data map and LiMem by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from curate.errors import UsageError
from curate.scores import DATASET_VALUES, SCORES

NAN = math.nan


def test_the_map_by_hand():
    """p over two checkpoints: two rows change most, of the other four two are likelier."""
    p = np.array([[0.1, 0.9], [0.2, 0.8], [0.9, 0.9], [0.8, 0.9], [0.1, 0.1], [0.2, 0.3], [NAN, 0.5]])
    with np.errstate(invalid="ignore"):
        nll = -np.log(p)
    found = SCORES["map_region"].compute({"target_nll": nll})
    np.testing.assert_array_equal(found, [1, 1, 2, 2, 0, 0, NAN])
    assert SCORES["map_region"].names == ("hard", "ambiguous", "easy")
    values = {v.name: v for v in DATASET_VALUES["map_values"].compute({"target_nll": nll})}
    assert all(values[f"map_{name}"].value == pytest.approx(1 / 3) for name in ("hard", "ambiguous", "easy"))
    assert values["map_ambiguous"].n == 6 and values["map_ambiguous_variability"].value == pytest.approx(
        (0.4 + 0.3) / 2
    )
    assert (
        values["map_easy_confidence"].value == pytest.approx((0.9 + 0.85) / 2) and values["map_hard_confidence"].n == 2
    )
    everything = SCORES["map_region"].compute({"target_nll": nll}, params={"share": 1.0})
    np.testing.assert_array_equal(everything, [1] * 6 + [NAN])
    assert np.isnan(SCORES["map_region"].compute({"target_nll": nll[:, :1]})).all()  # one checkpoint does not vary


#     accuracy, problem, perturbed, limem
ROWS = [
    (0.8, "a", 0, 0.8 * (1 - 0.25)),
    (0.5, "a", 1, NAN),
    (0.0, "a", 1, NAN),
    (1.0, "b", 0, NAN),  # no perturbation
    (0.0, "c", 0, NAN),  # never solved: nothing to remember
    (0.4, "c", 1, NAN),
    (1.0, "d", 0, 1.0),  # its one measured perturbation fails
    (0.0, "d", 1, NAN),
    (NAN, "d", 1, NAN),
    (NAN, "a", 0, NAN),
    (0.9, None, 0, NAN),
    (0.9, "a", NAN, NAN),
]


def test_limem_by_hand():
    columns = {
        "accuracy": np.array([row[0] for row in ROWS]),
        "row.problem": np.array([row[1] for row in ROWS], dtype=object),
        "row.perturbed": np.array([row[2] for row in ROWS], dtype=float),
    }
    expected = np.array([row[3] for row in ROWS])
    np.testing.assert_allclose(SCORES["limem"].compute(columns), expected)
    order = np.random.default_rng(0).permutation(len(ROWS))
    shuffled = SCORES["limem"].compute({name: values[order] for name, values in columns.items()})
    np.testing.assert_allclose(shuffled, expected[order])
    numbered = {**columns, "row.problem": np.array([1, 1, 1, 2, 3, 3, 4, 4, 4, 1, NAN, 1])}
    np.testing.assert_allclose(SCORES["limem"].compute(numbered), expected)


def test_limem_by_a_functions_perturbations():
    """Their accuracy stands in a column of its own; the rows' columns are not read then."""
    columns = {
        "accuracy": np.array([0.8, 1.0, 0.0, NAN, 0.5]),
        "perturbed_accuracy": np.array([0.25, NAN, 0.5, 0.5, 1.0]),
        "row.problem": np.array(["a"] * 5, dtype=object),
        "row.perturbed": np.ones(5),
    }
    np.testing.assert_allclose(SCORES["limem"].compute(columns), [0.6, NAN, NAN, NAN, 0.0])
    with pytest.raises(UsageError, match="no perturbations; name a function that makes them"):
        SCORES["limem"].compute({"accuracy": columns["accuracy"], "row.problem": columns["row.problem"]})
