"""The hidden Markov model against the enumeration of every path, against EM's own law, and against a known generator."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from curate.scores import hmm


def random_model(rng, states=3, numbers=2, impossible=True):
    transition = rng.dirichlet(np.ones(states), states)
    if impossible:
        transition[0, 2] = 0.0
        transition /= transition.sum(axis=1, keepdims=True)
    start = np.array([0.7, 0.3, 0.0])[:states] if impossible else rng.dirichlet(np.ones(states))
    mean = rng.normal(0, 2, (states, numbers))
    return hmm.Model(start, transition, mean, rng.uniform(0.3, 1.5, (states, numbers)))


def every_path(model, x):
    """(path, p(path, x)) of one (K, D) sequence, by plain products."""
    states = len(model.start)
    for path in itertools.product(range(states), repeat=len(x)):
        p = model.start[path[0]]
        for before, after in itertools.pairwise(path):
            p *= model.transition[before, after]
        for state, numbers in zip(path, x):
            for value, mean, variance in zip(numbers, model.mean[state], model.variance[state]):
                if not math.isnan(value):
                    p *= math.exp(-((value - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        yield path, p


def test_likelihood_posteriors_moves_and_path_against_every_path():
    rng = np.random.default_rng(0)
    model = random_model(rng)
    x = rng.normal(0, 2, (12, 5, 2))
    x[rng.random(x.shape) < 0.3] = np.nan  # single numbers, and now and then a whole checkpoint
    x[0, 2] = np.nan
    emission = hmm.log_emission(model, x)
    found, paths = hmm.posterior(model, emission), hmm.viterbi(model, emission)
    moves = np.zeros((3, 3))
    for n, sequence in enumerate(x):
        joint = list(every_path(model, sequence))
        total = sum(p for _, p in joint)
        assert found.log_likelihood[n] == pytest.approx(math.log(total), abs=1e-10)
        state = np.zeros((5, 3))
        for path, p in joint:
            state[np.arange(5), path] += p / total
            for before, after in itertools.pairwise(path):
                moves[before, after] += p / total
        np.testing.assert_allclose(found.state[n], state, atol=1e-10)
        assert tuple(paths[n]) == max(joint, key=lambda pair: pair[1])[0]
    np.testing.assert_allclose(found.moves, moves, atol=1e-9)


def test_a_sequence_of_which_nothing_is_known_is_the_prior():
    model = random_model(np.random.default_rng(1))
    found = hmm.posterior(model, hmm.log_emission(model, np.full((1, 3, 2), np.nan)))
    assert found.log_likelihood[0] == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(found.state[0, 2], model.start @ model.transition @ model.transition)


def test_far_away_measurements_do_not_underflow():
    model = random_model(np.random.default_rng(2))
    x = np.full((2, 400, 2), 1e4)
    found = hmm.posterior(model, hmm.log_emission(model, x))
    assert np.isfinite(found.log_likelihood).all()
    np.testing.assert_allclose(found.state.sum(axis=-1), 1.0)


def drawn(rng, model, n, k):
    """n sequences of k from the model: (measurements, states)."""
    states = np.zeros((n, k), int)
    for row in range(n):
        states[row, 0] = rng.choice(len(model.start), p=model.start)
        for at in range(1, k):
            states[row, at] = rng.choice(len(model.start), p=model.transition[states[row, at - 1]])
    return rng.normal(model.mean[states], np.sqrt(model.variance[states])), states


def test_em_never_loses_keeps_zeros_and_finds_the_generator():
    rng = np.random.default_rng(3)
    true = hmm.Model(
        np.array([1.0, 0.0, 0.0]),
        np.array([[0.8, 0.2, 0.0], [0.0, 0.7, 0.3], [0.1, 0.0, 0.9]]),
        np.array([[-2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]),
        np.array([[0.5, 0.5], [0.3, 0.8], [0.6, 0.4]]),
    )
    x, states = drawn(rng, true, 300, 12)
    x[rng.random(x.shape) < 0.1] = np.nan
    first = hmm.Model(
        np.array([0.6, 0.4, 0.0]),
        np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]),
        true.mean + rng.normal(0, 0.5, (3, 2)),
        np.ones((3, 2)),
    )
    model, history = hmm.fit(first, x, floor=1e-3, tolerance=1e-7, rounds=60)
    assert (np.diff(history) >= -1e-8).all() and history[-1] > history[0] + 100
    assert model.transition[0, 2] == model.transition[1, 0] == model.start[2] == 0.0
    np.testing.assert_allclose(model.transition, true.transition, atol=0.05)
    np.testing.assert_allclose(model.mean, true.mean, atol=0.1)
    np.testing.assert_allclose(model.variance, true.variance, atol=0.12)
    assert (hmm.viterbi(model, hmm.log_emission(model, x)) == states).mean() > 0.93


def test_em_with_the_floor_reached_never_loses_either():
    rng = np.random.default_rng(4)
    x = np.round(rng.random((60, 6, 1)))  # two values only: every state would shrink onto one of them
    _, history = hmm.fit(
        random_model(rng, states=2, numbers=1, impossible=False), x, floor=0.05, tolerance=0.0, rounds=40
    )
    assert len(history) > 3 and (np.diff(history) >= -1e-8).all()
