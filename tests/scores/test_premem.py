"""Pre-memorization accuracy: the tables of docs/style.md, and a slow loop over every possible value of what is unknown."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from curate.errors import UsageError
from curate.scores import DATASET_VALUES, SCORES
from curate.scores.premem import running

TAU = 0.1
fresh, memorised, unseen = 0.5, 0.05, None

TABLE = [
    # (checkpoints' accuracies, masked?, wanted at the last checkpoint)
    ([0.2, 0.8], [fresh, memorised], 0.2),  # 0.8 came only after memorising
    ([0.9, 0.4], [fresh, fresh], 0.4),  # forgotten: capped by the last checkpoint
    ([None, 0.5], [fresh, fresh], 0.5),  # the unknown one could not lift it above acc_t
    ([None, 0.5], [fresh, memorised], None),  # here it could: unknown
    ([0.5, None], [fresh, fresh], None),  # acc_t itself unknown
    ([0.4], [TAU], 0.4),  # nll = τ is not masked
    ([0.4], [memorised], 0.0),
    ([0.2, 0.9, 0.6], [fresh, fresh, memorised], 0.6),
    ([0.2, 0.5, 0.6], [fresh, fresh, memorised], 0.5),
    ([None, 0.5], [memorised, memorised], 0.0),  # masked whatever its accuracy was
    ([0.0, 0.5], [unseen, memorised], 0.0),  # 0 whether masked or not
    ([0.3, 0.5], [unseen, memorised], None),  # 0.3 or 0
    ([0.3, 0.4, 0.5], [unseen, fresh, memorised], 0.4),  # 0.3 or 0: 0.4 either way
    ([0.3, 0.4], [fresh, unseen], None),  # 0.3 or 0.4
    ([0.3, 0.0], [None, None], 0.0),  # never above acc_t
]


@pytest.mark.parametrize("accuracy, nll, wanted", TABLE)
def test_hand_table(accuracy, nll, wanted):
    columns = {"accuracy": np.array([accuracy], float), "target_nll": np.array([nll], float)}
    found = SCORES["premem_accuracy"].compute(columns, params={"threshold": TAU})[0]
    assert math.isnan(found) if wanted is None else found == wanted


def slow(accuracy, nll, tau):
    """The formula as it is written, for known values."""
    masked = [a if n >= tau else 0.0 for a, n in zip(accuracy, nll)]
    return [min(max(masked[: t + 1]), accuracy[t]) for t in range(len(masked))]


def test_known_values_against_the_formula():
    rng = np.random.default_rng(0)
    accuracy, nll = rng.integers(0, 6, (300, 5)) / 5, rng.random((300, 5)) * 0.2
    found = running(accuracy, nll, TAU)
    np.testing.assert_array_equal(found, [slow(a, n, TAU) for a, n in zip(accuracy, nll)])


def test_unknown_values_against_every_completion():
    """Known exactly where each way of filling the gaps gives one and the same value."""
    rng = np.random.default_rng(1)
    accuracy = rng.choice([0.0, 0.4, 0.8, 1.0, np.nan], (200, 3))
    nll = rng.choice([0.05, 0.5, np.nan], (200, 3))
    found = running(accuracy, nll, TAU)
    for row in range(200):
        ways = [
            slow(a, n, TAU)
            for a in itertools.product(*([v] if v == v else [0.0, 0.2, 0.6, 1.0] for v in accuracy[row]))
            for n in itertools.product(*([v] if v == v else [0.05, 0.5] for v in nll[row]))
        ]
        for t in range(3):
            values = {way[t] for way in ways}
            if np.isnan(accuracy[row, t]) and values == {0.0}:
                continue  # acc_t unknown is NULL by the rule, even where it could only be 0
            assert found[row, t] == values.pop() if len(values) == 1 else np.isnan(found[row, t])


def test_rows_with_gaps_do_not_change_complete_rows():
    """The quick path for complete arrays and the careful one agree."""
    rng = np.random.default_rng(2)
    accuracy, nll = rng.integers(0, 6, (50, 4)) / 5, rng.random((50, 4)) * 0.2
    gap = np.full((1, 4), np.nan)
    both = running(np.concatenate([accuracy, gap]), np.concatenate([nll, gap]), TAU)
    np.testing.assert_array_equal(both[:-1], running(accuracy, nll, TAU))
    assert np.isnan(both[-1]).all()


def test_a_threshold_per_group():
    columns = {"accuracy": np.array([[0.2, 0.8]] * 3), "target_nll": np.array([[0.5, 0.15]] * 3)}
    groups = {**columns, "row.{per}": np.array(["a", "b", "a"])}
    per_group = {"threshold": {"a": 0.1, "b": 0.2}}
    s = SCORES["premem_accuracy"]
    assert s.compute(groups, params=per_group).tolist() == [0.8, 0.2, 0.8]
    assert s.compute(groups, params={"threshold": 0.2}).tolist() == [0.2, 0.2, 0.2]
    with pytest.raises(UsageError, match="no threshold for group 'b'"):
        s.compute(groups, params={"threshold": {"a": 0.1}})
    with pytest.raises(UsageError, match="there is no 'topic'"):
        s.compute(columns, params={**per_group, "per": "topic"})
    numbered = {**columns, "row.{per}": np.array([1.0, 2.0, np.nan])}  # whole numbers and NULL, as a recipe's keys
    by_number = s.check({"threshold": {1: 0.1, 2: 0.2, None: 0.1}})
    assert s.compute(numbered, params=by_number).tolist() == [0.8, 0.2, 0.8]


@pytest.mark.parametrize(
    "nll, steps, wanted",
    [
        ([0.05, 0.01], [0, 10], 1),  # at the base model
        ([0.05, 0.01], [10, 20], 1),  # at the first checkpoint
        ([0.5, 0.01], [0, 10], 0),
        ([None, 0.01], [0, 10], None),  # only a late one measured
        ([0.05, None], [0, 10], 1),
        ([0.05], [0], 1),  # the base model alone
        ([0.05], [10], None),  # one late checkpoint alone cannot tell
        ([0.05], None, None),
    ],
)  # fmt: skip
def test_fluent(nll, steps, wanted):
    found = SCORES["fluent"].compute({"target_nll": np.array([nll], float)}, steps=steps, params={"threshold": TAU})[0]
    assert math.isnan(found) if wanted is None else found == wanted


def test_dataset_values():
    accuracy = np.array([[0.2, 0.8], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    nll = np.array([[0.5, 0.05], [0.05, 0.01], [0.5, 0.4], [0.5, 0.4]])
    columns = {"accuracy": accuracy, "target_nll": nll, "in_train": np.array([[1, 1], [1, 1], [1, 1], [0, 0]])}
    found = {
        (v.name, v.at): v
        for v in DATASET_VALUES["premem_values"].compute(columns, params={"threshold": TAU}, steps=[5, 9])
    }
    # premem: (.2, .2), (0, 0: fluent), (0, 0: wrong); the fourth row was not trained on
    assert found["premem_accuracy", 0].value == pytest.approx(0.2 / 3) and found["premem_accuracy", 0].n == 3
    assert found["premem_zeros_fluent", 1].value == 0.5 and found["premem_zeros_fluent", 1].n == 2
    assert found["fluent", None].value == pytest.approx(1 / 3)
    assert DATASET_VALUES["accuracy_values"].compute(columns)[1].value == pytest.approx(0.6)
    assert DATASET_VALUES["target_nll_values"].compute({"target_nll": nll})[0].value == pytest.approx(0.3875)
