"""The flip table and what a run flips, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from curate.errors import UsageError
from curate.scores import DATASET_VALUES, SCORES
from curate.scores.flips import flip_table

NAN = math.nan


def test_flips_by_hand():
    """Five measured pairs: one stays right, one breaks, two are flipped, one stays wrong; a sixth is unknown."""
    reference = np.array([-2.0, -1.0, 1.0, 3.0, 2.0, np.nan])  # c
    policy = np.array([-6.0, 1.0, -1.0, 0.0, 1.5, 1.0])
    zero = np.zeros(6)
    cells = {(f.before, f.now): f for f in flip_table(reference, policy, beta=0.5)}
    assert {k: f.n for k, f in cells.items()} == {
        ("right", "right"): 1, ("right", "wrong"): 1, ("wrong", "right"): 2, ("wrong", "wrong"): 1,
    }  # fmt: skip
    assert cells["wrong", "right"].share == 2 / 5
    assert cells["wrong", "right"].reward_margin == pytest.approx(0.5 * (2 + 3) / 2)
    assert cells["wrong", "right"].dpo_loss == pytest.approx(
        (math.log1p(math.exp(-1)) + math.log1p(math.exp(-1.5))) / 2
    )
    assert cells["right", "wrong"].dpo_loss == pytest.approx(math.log1p(math.exp(1)))
    needs = DATASET_VALUES["flips"].needs
    values = {
        v.name: v
        for v in DATASET_VALUES["flips"].compute(
            dict(zip(needs, (zero, reference, zero, policy))), params={"beta": 0.5}
        )
    }
    for (before, now), cell in cells.items():
        assert values[f"flips_{before}_{now}"].value == cell.share
        assert values[f"flips_{before}_{now}_dpo_loss"].value == pytest.approx(cell.dpo_loss)
        assert values[f"flips_{before}_{now}_reward_margin"].value == pytest.approx(cell.reward_margin)
    assert values["flipped_to_right"].value == 2 / 3 and values["flipped_to_right"].n == 3


def test_flips_of_a_model_with_itself():
    rng = np.random.default_rng(3)
    a, b = -10 * rng.random(50), -10 * rng.random(50)
    cells = flip_table(b - a, b - a)
    assert [cell.n for cell in cells][1:3] == [0, 0] and np.isnan(cells[1].dpo_loss)
    assert cells[0].dpo_loss == pytest.approx(math.log(2)) and cells[3].reward_margin == 0


#         c at steps 0, 10, 20              flipped  flip_step  never_flipped
RUN = [
    ((2.0, 1.0, -1.0), 1, 20, 0),
    ((-2.0, 1.0, -1.0), 0, 10, 0),  # there and back
    ((-2.0, 1.0, 1.0), -1, 10, 0),
    ((2.0, 1.0, 0.5), 0, NAN, 1),
    ((1.0, 0.0, NAN), NAN, 10, 0),  # a tie is right
    ((NAN, 1.0, -1.0), NAN, NAN, NAN),  # who knows what it was before
    ((1.0, NAN, 1.0), 0, NAN, NAN),
    ((1.0, NAN, -1.0), 1, NAN, 0),  # it flipped at 10 or at 20
]


def run_columns():
    c = np.array([row[0] for row in RUN])
    return {"chosen_logp": np.full_like(c, -30.0), "rejected_logp": c - 30.0}


@pytest.mark.parametrize("name, at", [("flipped", 1), ("flip_step", 2), ("never_flipped", 3)])
def test_a_run_by_hand(name, at):
    found = SCORES[name].compute(run_columns(), steps=[0, 10, 20])
    np.testing.assert_array_equal(found, np.array([row[at] for row in RUN], dtype=float))


def test_between_any_two_checkpoints():
    found = SCORES["flipped"].compute(run_columns(), steps=[0, 10, 20], params={"first": 10, "last": 20})
    np.testing.assert_array_equal(found, [1, 1, 0, 0, NAN, 1, NAN, NAN])
    with pytest.raises(UsageError, match="no checkpoint of step 15; there are 0, 10, 20"):
        SCORES["flipped"].compute(run_columns(), steps=[0, 10, 20], params={"last": 15})


def test_every_checkpoint_against_the_first():
    """Each checkpoint's values are those of the reference-policy table between it and the first."""
    value, steps = DATASET_VALUES["checkpoint_flips"], [0, 10, 20]
    columns = run_columns()
    found = value.compute(columns, steps=steps, params={"beta": 0.5})
    assert sorted({v.at for v in found}) == [0, 1, 2]
    assert [v.name for v in found if v.at == 0] == ["ranking_accuracy"]
    for at in (1, 2):
        pair = (columns[n][:, k] for k in (0, at) for n in ("chosen_logp", "rejected_logp"))
        needs = DATASET_VALUES["flips"].needs
        expected = DATASET_VALUES["flips"].compute(dict(zip(needs, pair, strict=True)), params={"beta": 0.5})
        mine = [v._replace(at=None) for v in found if v.at == at and v.name != "ranking_accuracy"]
        np.testing.assert_array_equal([v[1:5] for v in mine], [v[1:5] for v in expected])
        assert [v.name for v in mine] == [v.name for v in expected]
    later = value.compute(columns, steps=steps, params={"first": 20})
    assert [v.name for v in later if v.at == 2] == ["ranking_accuracy"]
