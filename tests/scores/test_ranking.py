"""Ranking scores: the table of docs/scores.md, hand-computed rows, and tails that neither overflow nor warn."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest

from curate.scores import DATASET_VALUES, SCORES
from curate.scores.arithmetic import ratio, sigmoid, softplus
from curate.scores.ranking_values import BETAS, idealised

PAIR = ("chosen_logp", "rejected_logp")


def compute(name, *arrays, **params):
    return SCORES[name].compute(dict(zip(SCORES[name].needs, arrays)), params=params)


@pytest.mark.parametrize("c, loss", [(-10, 1.3133), (0, 0.6931), (10, 0.3133), (50, 6.715e-3), (100, 4.54e-5)])
def test_the_documented_flip_losses(c, loss):
    found = compute("flip_loss", [-20.0], [-20.0 + c], beta=0.1)[0]
    assert found == pytest.approx(loss, rel=2e-4)  # four digits are printed


#       logp+, logp−,   T+, T−,   gap, right, right per token,  break-even agreement at β = 0.1
HAND = [
    (-10.0, -12.0, 5, 4, -2.0, 1, 1, 1 / (1 + math.exp(0.2))),  # −2 a token against −3
    (-10.0, -8.0, 5, 2, 2.0, 0, 1, 1 / (1 + math.exp(-0.2))),  # longer, but likelier a token: −2 against −4
    (-10.0, -10.0, 4, 5, 0.0, 1, 0, 0.5),  # a tie is right; −2.5 against −2
    (-10.0, -10.0, 5, 5, 0.0, 1, 1, 0.5),  # a tie is right per token too
    (-30.0, -12.0, 0, 3, 18.0, 0, None, 1 / (1 + math.exp(-1.8))),  # no token: no mean
    (None, -12.0, 4, 3, None, None, None, None),
    (-12.0, None, 4, 3, None, None, None, None),
]


def test_hand_computed_pairs():
    chosen, rejected, tc, tr, gap, right, right_ln, agreement = np.array(HAND, dtype=float).T
    np.testing.assert_allclose(compute("ranking_gap", chosen, rejected), gap)
    np.testing.assert_array_equal(compute("ranking_correct", chosen, rejected), right)
    np.testing.assert_array_equal(compute("ranking_correct_ln", chosen, rejected, tc, tr), right_ln)
    np.testing.assert_allclose(compute("break_even_agreement", chosen, rejected), agreement)
    np.testing.assert_allclose(compute("flip_loss", chosen, rejected), -np.log(agreement))  # β = 0.1 is the default


def test_flip_loss_is_minus_log_of_the_sigmoid():
    c = np.linspace(-300, 300, 61)
    for beta in (0.01, 0.1, 1.0):
        slow = [math.log1p(math.exp(-beta * x)) for x in c]
        np.testing.assert_allclose(compute("flip_loss", np.zeros(61), c, beta=beta), slow, rtol=1e-14)


def test_tails():
    """Against 60-digit decimals; nothing overflows or warns."""
    getcontext().prec = 60
    x = np.array([-800.0, -700.0, -40.0, -1e-9, 0.0, 1e-9, 40.0, 700.0, 800.0, 1e300, -1e300])
    with np.errstate(all="raise", under="ignore"):
        soft, sig = softplus(x), sigmoid(x)
    for value, s, g in zip(x[:9], soft, sig):
        e = Decimal(float(value)).exp()
        assert s == pytest.approx(float((1 + e).ln()), rel=1e-15)
        assert g == pytest.approx(float(e / (1 + e)), rel=1e-15)
    assert soft[-2] == 1e300 and soft[-1] == 0 and sig[-2] == 1 and sig[-1] == 0


def test_infinite_log_probabilities():
    with np.errstate(all="raise"):
        found = compute("ranking_gap", [-np.inf, -np.inf, 0.0], [-1.0, -np.inf, -np.inf])
    np.testing.assert_array_equal(found, [np.inf, np.nan, -np.inf])


def test_a_ratio_over_zero_is_unknown():
    np.testing.assert_array_equal(
        ratio(np.array([1.0, 0.0, np.nan, 4.0]), np.array([0.0, 0.0, 1.0, 2.0])), [np.nan, np.nan, np.nan, 2.0]
    )


def test_implicit_reward_gap():
    #  chosen rose by 2 nats, rejected fell by 3: β·5
    assert compute("implicit_reward_gap", [-10.0], [-8.0], [-8.0], [-11.0], beta=0.1)[0] == pytest.approx(0.5)


def test_idealised_by_hand():
    """α = 0.8, β = 0.1: log-odds 1.3863, so c up to 13.863 can be flipped; α = ½: only what is right already."""
    c = np.array([13.86, 13.87, 0.0, 0.1, -1.0, np.nan])
    np.testing.assert_array_equal(idealised(c, 0.8, 0.1), [1, 0, 1, 1, 1, np.nan])
    np.testing.assert_array_equal(idealised(c, 0.5, 0.1), [0, 0, 1, 0, 1, np.nan])
    np.testing.assert_array_equal(idealised(np.array([69.0, 69.1]), 1.0, 0.1), [1, 0])  # clipped: log(999)/0.1 = 69.07
    np.testing.assert_array_equal(idealised(np.array([-69.0, -69.1]), 0.0, 0.1), [0, 1])


def test_idealised_is_the_break_even_agreement():
    """Ranked right by the ideal policy exactly where the annotators agree at least to the break-even share."""
    rng = np.random.default_rng(1)
    chosen, rejected, alpha = -40 * rng.random(500), -40 * rng.random(500), 0.001 + 0.998 * rng.random(500)
    for beta in BETAS:
        needed = compute("break_even_agreement", chosen, rejected, beta=beta)
        np.testing.assert_array_equal(idealised(rejected - chosen, alpha, beta), alpha >= needed)


def test_ranking_accuracies():
    chosen, rejected, tc, tr = (np.array([row[i] for row in HAND], dtype=float) for i in range(4))
    plain, per_token = DATASET_VALUES["ranking_accuracy"].compute(
        {"chosen_logp": chosen, "rejected_logp": rejected, "chosen_tokens": tc, "rejected_tokens": tr}
    )
    assert (plain.name, plain.value, plain.n) == ("ranking_accuracy", 3 / 5, 5)
    assert (per_token.name, per_token.value, per_token.n) == ("ranking_accuracy_ln", 3 / 4, 4)
    assert 0 < plain.low < plain.value < plain.high < 1


def test_idealised_ranking_accuracies():
    columns = {
        "chosen_logp": [-10.0, -10.0, -10.0, -10.0], "rejected_logp": [-12.0, -8.0, 0.0, -9.99],
        "chosen_tokens": [10.0] * 4, "rejected_tokens": [10.0] * 4,
    }  # fmt: skip
    value = DATASET_VALUES["idealised_ranking_accuracy"]
    found = {v.name: v.value for v in value.compute(columns, params={"alpha": 0.8})}
    # c = −2, 2, 10, 0.01 against log(4)/β = 138.6, 13.86, 1.386, 0.277, 0.1386
    assert [found[f"idealised_ranking_accuracy_b{b:g}"] for b in BETAS] == [1, 1, 0.5, 0.5, 0.5]
    assert [found[f"idealised_ranking_accuracy_{m}"] for m in ("min", "median", "max")] == [0.5, 0.5, 1]
    # c_ln = −0.2, 0.2, 1, 0.001
    assert [found[f"idealised_ranking_accuracy_ln_b{b:g}"] for b in BETAS] == [1, 1, 1, 0.75, 0.5]
    assert [found[f"idealised_ranking_accuracy_ln_{m}"] for m in ("min", "median", "max")] == [0.5, 1, 1]
    assert len(found) == 16
    votes = value.compute({**columns, "row.agreement": [0.8, np.nan, 0.1, 0.5]}, params={"alpha": 0.999})
    by_name = {v.name: v.value for v in votes}
    assert (
        by_name["idealised_ranking_accuracy_b0.1"] == 0.5
    )  # rows 1 and 2 (α from the setting); row 4 needs more than half


def test_a_pair_is_ranked_right_iff_its_loss_is_at_most_the_flip_loss():
    """The sentence that gives the score its name, on random policies."""
    rng = np.random.default_rng(2)
    rc, rr, pc, pr = (-30 * rng.random(400) for _ in range(4))
    margin = (pc - rc) - (pr - rr)
    loss = np.log1p(np.exp(-0.1 * margin))
    flip = compute("flip_loss", rc, rr, beta=0.1)
    np.testing.assert_array_equal(pc >= pr, loss <= flip)
