"""Scores over checkpoints: hand-computed rows and the rules for unmeasured checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest

from curate.scores import DATASET_VALUES, SCORES

NaN = None

# accuracies over checkpoints at steps 0, 10, 20, 30      correctness, forgetting, first learned, never learned
ACCURACIES = [
    (
        [0.0, 0.6, 0.2, 0.8],
        2 / 3,
        1,
        10,
        0,
    ),  # step 0, the untrained model, is no epoch: correctness is over the other three
    ([0.5, 0.4, 0.5, 0.0], 1 / 3, 2, 0, 0),  # at the level is right; known before training, and forgotten at once
    ([0.0, 0.0, 0.0, 0.4], 0.0, 0, NaN, 1),  # never learned: not unknown
    ([1.0, 1.0, 1.0, 1.0], 1.0, 0, 0, 0),
    ([0.0, NaN, 0.0, 1.0], NaN, NaN, NaN, 0),  # learned by 30, perhaps by 10
    ([0.0, 1.0, NaN, 1.0], NaN, NaN, 10, 0),
    ([NaN, 1.0, 0.0, 1.0], 2 / 3, NaN, NaN, 0),  # the untrained model is unmeasured: correctness does not ask it
    ([0.0, NaN, 0.0, 0.0], NaN, NaN, NaN, NaN),
]


def equal(found, wanted):
    np.testing.assert_array_equal(found, np.array(wanted, dtype=float))


def test_hand_table():
    accuracy = np.array([row[0] for row in ACCURACIES], dtype=float)
    for i, name in enumerate(("correctness", "forgetting_events", "first_learned_step", "never_learned"), 1):
        equal(SCORES[name].compute({"accuracy": accuracy}, steps=[0, 10, 20, 30]), [row[i] for row in ACCURACIES])


def test_null_where_never_learned_is_not_unknown():
    s = SCORES["first_learned_step"]
    assert s.null_where == "never_learned"
    accuracy = np.array([row[0] for row in ACCURACIES], dtype=float)
    unknown = np.isnan(s.compute({"accuracy": accuracy})) & (SCORES[s.null_where].compute({"accuracy": accuracy}) != 1)
    assert unknown.tolist() == [False, False, False, False, True, False, True, True]


def test_levels_and_indices():
    columns = {"accuracy": np.array([[0.0, 0.6, 0.2, 0.8]])}
    assert SCORES["correctness"].compute(columns, params={"level": 0.7})[0] == 0.25
    assert SCORES["first_learned_step"].compute(columns, params={"level": 0.7})[0] == 3  # steps unknown: the index
    assert SCORES["never_learned"].compute(columns, params={"level": 0.9})[0] == 1


def test_cartography():
    """p = 0.5 and 0.25: mean 0.375, standard deviation 0.125."""
    columns = {"target_nll": np.array([[math.log(2), math.log(4)], [0.0, np.nan]])}
    np.testing.assert_allclose(SCORES["confidence"].compute(columns), [0.375, np.nan])
    np.testing.assert_allclose(SCORES["variability"].compute(columns), [0.125, np.nan])


def test_the_untrained_model_is_no_epoch():
    """p at step 0 is low for every row: counted, it would make the rows that are learned best the most variable."""
    nll = -np.log(np.array([[0.01, 0.9, 0.98], [0.01, 0.2, 0.7], [0.01, 0.1, 0.14]]))
    for steps in ([0, 10, 20], [0, 10, None]):
        np.testing.assert_allclose(SCORES["confidence"].compute({"target_nll": nll}, steps=steps), [0.94, 0.45, 0.12])
        np.testing.assert_allclose(SCORES["variability"].compute({"target_nll": nll}, steps=steps), [0.04, 0.25, 0.02])
        equal(SCORES["map_region"].compute({"target_nll": nll}, steps=steps), [2, 1, 0])
        np.testing.assert_allclose(SCORES["aum"].compute({"target_gap": nll}, steps=steps), nll[:, 1:].mean(1))
        shares = {v.name: v.value for v in DATASET_VALUES["map_values"].compute({"target_nll": nll}, steps=steps)}
        assert shares["map_ambiguous_confidence"] == pytest.approx(0.45)
    # nobody knows the steps: their order stands for them, and the first is as good as the others
    np.testing.assert_allclose(
        SCORES["confidence"].compute({"target_nll": nll}, steps=[0, 1, 2], trained=[True] * 3), np.exp(-nll).mean(1)
    )


@pytest.mark.parametrize(("name", "least"), [("confidence", 1), ("variability", 2), ("map_region", 2), ("aum", 1)])
def test_too_few_checkpoints_of_the_training_are_unknown(name, least):
    """The untrained model alone says nothing of a training, and one checkpoint varies by nothing: that is unknown, and not 0."""
    need, values = SCORES[name].needs[0], np.array([[1.0, 0.5, 0.2], [2.0, 1.0, 1.5]])
    assert SCORES[name].least == least
    for k in range(1, 4):
        found = SCORES[name].compute({need: values[:, :k]}, steps=[0, 10, 20][:k])
        assert np.isnan(found).all() == (k - 1 < least)


def test_loss_drop():
    nll = np.array([[2.0, 9.0, 0.5], [0.0, 1.0, 0.0], [1.0, np.nan, 2.0], [np.nan, 1.0, 1.0], [1.0, 1.0, np.nan]])
    equal(SCORES["loss_drop"].compute({"target_nll": nll}), [0.75, None, -1.0, None, None])
    equal(SCORES["loss_drop"].compute({"target_nll": nll[:, :1]}), [None] * 5)


def test_learning_impact_by_hand():
    """Mean curve (0.25, 0.75): Σ(1 − ā)² = 0.625. The row at the mean scores 1, the others 1 − (0.0625·2)/0.625 = 0.8."""
    accuracy = np.array([[0.25, 0.75], [0.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(SCORES["learning_impact"].compute({"accuracy": accuracy}), [1.0, 0.8, 0.8])
    equal(SCORES["learning_impact"].compute({"accuracy": np.ones((2, 3))}), [None, None])  # ā = 1 throughout: 0/0
    with_gap = np.concatenate([accuracy, [[0.25, np.nan]]])
    equal(np.isnan(SCORES["learning_impact"].compute({"accuracy": with_gap})), [False, False, False, True])


def test_difficulty():
    equal(SCORES["difficulty"].compute({"accuracy": [0.0, 0.5, 1.0, np.nan]}), [0, 0.25, 0, None])


@pytest.mark.parametrize("name", ["confidence", "variability", "correctness", "forgetting_events"])
def test_order_matters_only_where_it_should(name):
    rng = np.random.default_rng(0)
    values = rng.random((30, 5))
    need = SCORES[name].needs[0]
    same = np.array_equal(SCORES[name].compute({need: values}), SCORES[name].compute({need: values[:, ::-1]}))
    close = np.allclose(SCORES[name].compute({need: values}), SCORES[name].compute({need: values[:, ::-1]}))
    assert close is (name != "forgetting_events") or same
