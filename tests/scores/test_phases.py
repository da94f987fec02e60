"""Phases: hand-labelled rows, every completion of what is unmeasured, and smoothing against labels without sampling noise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from curate.errors import UsageError
from curate.scores import DATASET_VALUES, SCORES
from curate.scores.phases import NAMES, by_rules, smoothed
from curate.scores.premem import running

TAU = 0.1
# accuracies and NLLs over three checkpoints -> phases, τ = 0.1, level 0.5; - is unknown
TABLE = [
    ([0.0, 0.2, 0.8], [2.0, 1.0, 0.5], "unlearned learning learned"),
    ([0.0, 0.8, 0.8], [2.0, 0.5, 0.01], "unlearned learned learned"),  # solved before it was by heart: stays learned
    ([0.0, 0.0, 1.0], [2.0, 0.05, 0.01], "unlearned memorised memorised"),  # right only by heart
    ([0.0, 0.8, 0.2], [2.0, 0.5, 0.5], "unlearned learned forgotten"),
    ([0.0, 0.8, 0.2], [2.0, 0.5, 0.01], "unlearned learned forgotten"),  # likely, but answered wrong now
    ([0.0, 0.2, 0.0], [2.0, 0.01, 0.5], "unlearned memorised forgotten"),  # by heart, and no more
    ([0.0, 1.0, 1.0], [2.0, 0.01, 0.5], "unlearned memorised learned"),  # right without it now
    ([0.2, 0.0, 0.4], [2.0, 1.0, 0.5], "learning unlearned learning"),
    ([0.5, 0.1, 0.5], [2.0, 1.0, 0.5], "learned forgotten learned"),  # at the level is right
    ([0.8, 0.2, 0.8], [0.05, 0.01, 0.01], "learned forgotten learned"),  # fluent from the start: accuracy alone
    ([0.0, None, 0.8], [2.0, 1.0, 0.5], "unlearned - learned"),
    ([0.0, None, 1.0], [2.0, 0.01, 0.01], "unlearned memorised memorised"),  # by heart: any accuracy says the same
    ([0.0, None, 1.0], [2.0, 1.0, 0.01], "unlearned - -"),  # was it right at the second?
    ([0.0, 0.2, 0.2], [None, 1.0, 1.0], "unlearned learning learning"),
    ([1.0, 0.0, 0.0], [2.0, None, 0.5], "learned forgotten forgotten"),
    ([0.0, 0.0, None], [2.0, 1.0, 0.5], "unlearned unlearned -"),
]


def test_hand_table():
    accuracy = np.array([row[0] for row in TABLE], dtype=float)
    nll = np.array([row[1] for row in TABLE], dtype=float)
    found = by_rules(accuracy, nll, TAU)
    words = [" ".join("-" if np.isnan(c) else NAMES[int(c)] for c in row) for row in found]
    assert words == [row[2] for row in TABLE]
    score = SCORES["phase"].compute(
        {"accuracy": accuracy, "target_nll": nll}, params={"threshold": TAU, "smooth": False}
    )
    np.testing.assert_array_equal(score, found[:, -1])


def test_what_is_unmeasured_is_known_exactly_where_every_completion_agrees():
    accuracies, nlls = (0.0, 0.25, 1.0), (0.5, 0.05)
    measured = list(itertools.product(accuracies, nlls))
    whole = list(itertools.product(measured, repeat=3))
    codes = by_rules(*(np.array([[p[i] for p in row] for row in whole]) for i in (0, 1)), TAU)
    assert not np.isnan(codes).any()
    of = dict(zip(whole, codes))
    gaps = list(itertools.product(itertools.product((*accuracies, None), (*nlls, None)), repeat=3))
    found = by_rules(*(np.array([[p[i] for p in row] for row in gaps], dtype=float) for i in (0, 1)), TAU)
    for row, got in zip(gaps, found):
        ways = [[m for m in measured if a in (None, m[0]) and n in (None, m[1])] for a, n in row]
        possible = np.array([of[way] for way in itertools.product(*ways)])
        agreed = np.where((possible == possible[0]).all(axis=0), possible[0], np.nan)
        np.testing.assert_array_equal(got, agreed, err_msg=str(row))


def test_learned_is_premem_at_the_level_and_smoothing_off_leaves_rows_alone():
    rng = np.random.default_rng(0)
    accuracy, nll = rng.integers(0, 6, (200, 5)) / 5, rng.uniform(0, 0.4, (200, 5))
    nll[:, 0] = 1.0  # nobody is fluent from the start
    np.testing.assert_array_equal(by_rules(accuracy, nll, TAU) == 2, running(accuracy, nll, TAU) >= 0.5)
    one = SCORES["phase"].compute(
        {"accuracy": accuracy[:1], "target_nll": nll[:1]}, params={"threshold": TAU, "smooth": False}
    )
    assert one[0] == by_rules(accuracy, nll, TAU)[0, -1]


def test_a_single_late_checkpoint_cannot_tell_fluent_from_memorised():
    columns = {"accuracy": np.array([[1.0], [0.0], [1.0]]), "target_nll": np.array([[0.01], [0.01], [0.5]])}
    late = SCORES["phase"].compute(columns, steps=[400], params={"threshold": TAU})
    np.testing.assert_array_equal(late, [np.nan, np.nan, 2])
    np.testing.assert_array_equal(SCORES["phase"].compute(columns, steps=[0], params={"threshold": TAU}), [2, 0, 2])


def generated(rng, rows=300, k=8, samples=4):
    """Rows that turn from wrong to right at a step of their own and are memorised later: (sampled accuracy, nll, true accuracy)."""
    onset = rng.integers(1, k + 3, rows)[:, None]
    at = np.arange(k)
    p = np.where(at < onset - 1, 0.02, np.where(at < onset, 0.25, 0.9))
    nll = np.clip(2.0 - 0.25 * at + 0.1 * rng.normal(size=(rows, k)) - 0.4 * (at >= onset), 0.02, None)
    return rng.binomial(samples, p) / samples, nll, p


def test_smoothing_moves_labels_towards_those_without_sampling_noise():
    wrong = []
    for seed in range(4):
        accuracy, nll, p = generated(np.random.default_rng(seed))
        truth = by_rules(p, nll, 0.3)
        wrong.append([(by_rules(a, nll, 0.3) != truth).mean() for a in (accuracy, smoothed(accuracy, nll))])
    plain, smooth = np.mean(wrong, axis=0)
    assert smooth < 0.85 * plain and all(after < before for before, after in wrong), wrong


def test_smoothing_marginalises_gaps_and_does_not_see_the_order_of_the_rows():
    rng = np.random.default_rng(2)
    accuracy, nll, _ = generated(rng, rows=120)
    gaps = rng.random(accuracy.shape) < 0.2
    holed = np.where(gaps, np.nan, accuracy)
    found = smoothed(holed, nll)
    np.testing.assert_array_equal(np.isnan(found), gaps)  # it smooths, it invents nothing
    assert ((found >= 0) & (found <= 1))[~gaps].all()
    order = rng.permutation(120)
    np.testing.assert_allclose(smoothed(holed[order], nll[order]), found[order], atol=1e-9)
    again = smoothed(holed, np.where(gaps, np.nan, nll))
    assert np.isfinite(again[~gaps]).all()
    np.testing.assert_array_equal(smoothed(np.ones((4, 3)), nll[:4, :3]), np.ones((4, 3)))  # nothing varies


def test_shares_per_checkpoint():
    accuracy = np.array([row[0] for row in TABLE], dtype=float)
    nll = np.array([row[1] for row in TABLE], dtype=float)
    values = DATASET_VALUES["phase_values"].compute(
        {"accuracy": accuracy, "target_nll": nll}, params={"threshold": TAU, "smooth": False}
    )
    at_last = {v.name: (v.value, v.n) for v in values if v.at == 2}
    assert at_last["phase_learned"] == (6 / 14, 14) and at_last["phase_forgotten"] == (4 / 14, 14)
    assert sum(v.value for v in values if v.at == 2) == pytest.approx(1.0)
    smooth = DATASET_VALUES["phase_values"].compute(
        {"accuracy": accuracy, "target_nll": nll}, params={"threshold": TAU}
    )
    assert [v.name for v in smooth if v.at is None] == ["phase_smoothed"] and smooth[0].n > 0


def test_groups_and_their_thresholds():
    columns = {"accuracy": np.ones((2, 2)), "target_nll": np.array([[2.0, 0.2], [2.0, 0.2]]), "row.{per}": ["a", "b"]}
    columns["accuracy"][:, 0] = 0
    params = {"threshold": {"a": 0.1, "b": 0.5}, "smooth": False}
    assert SCORES["phase"].compute(columns, params=params).tolist() == [2.0, 3.0]
    with pytest.raises(UsageError, match="no threshold for group 'b'"):
        SCORES["phase"].compute(columns, params={"threshold": {"a": 0.1}})


def test_the_onsets_of_known_skills_are_recovered():
    """Four skills whose rows turn right at a known checkpoint, one that is only memorised: half of the rows are learned from there on."""
    rng = np.random.default_rng(5)
    onsets, k = [1, 2, 4, 6, None], 8
    skill = np.repeat(np.arange(5), 40)
    p, nll = np.zeros((200, k)), np.zeros((200, k))
    for row, s in enumerate(skill):
        on = onsets[s]
        p[row] = np.where(np.arange(k) >= (5 if on is None else on), 0.9, 0.05)
        nll[row] = np.where(np.arange(k) >= 5, 0.05, 1.0 if on is None else np.where(np.arange(k) >= on, 0.5, 1.0))
    nll += 0.02 * rng.random(nll.shape)
    onsets[3] = None  # it turns right only after its rows are by heart (checkpoint 5): learned it cannot be
    codes = by_rules(smoothed(rng.binomial(4, p) / 4, nll), nll, 0.1)
    for s, on in enumerate(onsets):
        share = (codes[skill == s] == 2).mean(axis=0)
        found = int(np.argmax(share >= 0.5)) if (share >= 0.5).any() else None
        assert found == on
    assert (codes[skill == 4][:, 5:] == 3).mean() > 0.95
