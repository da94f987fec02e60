"""Scores of a pair's own gradients against hand tables."""

from __future__ import annotations

import numpy as np
import pytest

from curate.scores import SCORES

nan = float("nan")
# (g+, g−) -> K++, K+−, K−−:   (3, 0), (1, 0)   orthogonal   chosen shorter, alike   the same   opposite   unknown
CC = np.array([9.0, 4.0, 1.0, 2.0, 1.0, nan])
CR = np.array([3.0, 0.0, 2.0, 2.0, -2.0, 1.0])
RR = np.array([1.0, 1.0, 4.0, 2.0, 4.0, 1.0])
CHOSEN = np.array([-10.0, -5.0, -12.0, -9.0, -7.0, -3.0])
REJECTED = np.array([-6.0, -8.0, -9.0, -8.0, -7.0, -4.0])
TABLE = {
    "displacement_share": [6 / 4, 4 / 5, -1 / 1, nan, 3 / 9, nan],
    "predicted_chosen_change": [6.0, 4.0, -1.0, 0.0, 3.0, nan],  # of one unit of s
    "predicted_rejected_change": [2.0, -1.0, -2.0, 0.0, -6.0, 0.0],
    "predicted_margin_gain": [4.0, 5.0, 1.0, 0.0, 9.0, nan],
    "gradient_norm": [3.0, 2.0, 1.0, 2**0.5, 1.0, nan],
    "rejected_gradient_norm": [1.0, 1.0, 2.0, 2**0.5, 2.0, 1.0],
    "gradient_cosine": [1.0, 0.0, 1.0, 1.0, -1.0, nan],
    "steps_to_flip": [(4 + (np.exp(8) - 1) / 2) / 8, 0.0, (3 + (np.exp(6) - 1) / 2) / 2, nan, 0.0, nan],
    "flip_cost": [-6 / 4 * 4, 0.0, 3.0, nan, 0.0, nan],
}
COLUMNS = {"entk_cc": CC, "entk_cr": CR, "entk_rr": RR, "chosen_logp": CHOSEN, "rejected_logp": REJECTED}


@pytest.mark.parametrize("name", TABLE)
def test_hand_table(name):
    score = SCORES[name]
    columns = {need: COLUMNS[need] for need in score.needs}
    unit = {"beta": 2.0, "learning_rate": 1.0} if "beta" in score.parameters else {}  # s = ηβ/2 = 1
    np.testing.assert_allclose(score.compute(columns, params=unit), TABLE[name], rtol=1e-12)
    assert score.cost == "backward"


def test_the_step_counts():
    """Half the learning rate: half the change, twice the steps; the share and the cost know no step."""
    columns = {need: COLUMNS[need] for need in SCORES["steps_to_flip"].needs}
    steps = [SCORES["steps_to_flip"].compute(columns, params={"beta": 0.1, "learning_rate": x}) for x in (1e-6, 5e-7)]
    np.testing.assert_allclose(steps[1], 2 * steps[0])
    np.testing.assert_allclose(steps[0][0], (4 + np.expm1(0.4) / 0.1) / (1e-6 * 0.1 * 4))


@pytest.mark.parametrize("gap", [0.01, 3.0, 20.0, 40.0])  # β·gap up to 4, as most wrong pairs of real data have
def test_steps_really_taken(gap):
    """Gradient descent on DPO's loss of one pair whose two gradients never change, g+ = (2, 1) and g− = (0, 1), step by step to the tie."""
    beta, learning_rate, apart = 0.1, 0.05, 2.0**2
    moved, steps = 0.0, 0  # of the margin, in nats
    while moved < gap:
        moved += learning_rate * beta / (1 + np.exp(beta * moved)) * apart
        steps += 1
    columns = [np.array([x]) for x in (5.0, 1.0, 1.0, -gap, 0.0)]
    columns = dict(zip(("entk_cc", "entk_cr", "entk_rr", "chosen_logp", "rejected_logp"), columns, strict=True))
    found = SCORES["steps_to_flip"].compute(columns, params={"beta": beta, "learning_rate": learning_rate})
    assert found[0] == pytest.approx(steps, rel=0.01, abs=1.0)


def test_steps_beyond_numbers_are_unknown():
    columns = {
        "entk_cc": CC[:1],
        "entk_cr": CR[:1],
        "entk_rr": RR[:1],
        "chosen_logp": np.array([-1e5]),
        "rejected_logp": np.array([0.0]),
    }
    assert not np.isfinite(SCORES["steps_to_flip"].compute(columns)[0])


def test_rounding_is_no_difference_of_gradients():
    """A pair of two equal responses, measured in float32: the distance is rounding, the share unknown."""
    cc, cr, rr = np.array([5.0]), np.array([5.0 - 1e-7]), np.array([5.0])
    assert np.isnan(SCORES["displacement_share"].compute({"entk_cc": cc, "entk_cr": cr, "entk_rr": rr})[0])


def test_grand_is_the_measured_norm():
    values = np.array([0.5, nan])
    np.testing.assert_array_equal(SCORES["grand"].compute({"loss_gradient": values}), values)
