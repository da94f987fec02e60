"""Stopping when a band is decided: the rule by hand, and what it does to the estimate, by the exact binomial and by simulation."""

from __future__ import annotations

import re
from math import comb
from pathlib import Path

import numpy as np
import pytest

from curate.scores.rates import INSIDE, bands, wilson_bounds
from curate.scores.stopping import looks, undecided

PAGE = Path(__file__).parents[2] / "docs" / "rlvr.md"
LEAST, MOST, LOW, HIGH = 4, 32, 0.2, 0.8


@pytest.mark.parametrize(("least", "most", "at"), [(4, 32, [4, 8, 16, 32]), (3, 10, [3, 6, 10]), (8, 9, [8, 9])])
def test_looks_double(least, most, at):
    assert looks(least, most) == at


@pytest.mark.parametrize(
    ("right", "wrong", "goes_on"),
    [
        (0, 4, True),  # up to .49
        (0, 8, True),  # up to .32
        (0, 16, False),  # up to .19
        (16, 0, False),
        (4, 4, False),  # .215 to .785
        (2, 2, True),
        (3, 5, True),  # .14 to .69
        (0, 0, True),
    ],
)
def test_the_rule(right, wrong, goes_on):
    assert undecided([True] * right + [False] * wrong, LOW, HIGH) == goes_on
    assert undecided([None] * 3 + [True] * right + [False] * wrong, LOW, HIGH) == goes_on


def outcomes():
    """{(right, samples): in how many orders of right and wrong a row stops there}, look by look."""
    stops, on, n = {}, {0: 1}, 0
    for look in looks(LEAST, MOST):
        grown = {}
        for right, ways in on.items():
            for more in range(look - n + 1):
                grown[right + more] = grown.get(right + more, 0) + ways * comb(look - n, more)
        n, on = look, {}
        for right, ways in grown.items():
            goes_on = look < MOST and undecided([True] * right + [False] * (look - right), LOW, HIGH)
            (on if goes_on else stops)[right if goes_on else (right, look)] = ways
    return stops


STOPS = outcomes()


def exact(p):
    """What the page's table says of a row with this probability."""
    right, n = np.array(list(STOPS), float).T
    chance = np.array([ways * p**c * (1 - p) ** (k - c) for (c, k), ways in STOPS.items()])
    assert chance.sum() == pytest.approx(1)
    low, high = wilson_bounds(right, n)
    rate = right / n
    all_32 = sum(comb(MOST, c) * p**c * (1 - p) ** (MOST - c) for c in range(MOST + 1) if LOW <= c / MOST <= HIGH)
    in_band = (rate >= LOW) & (rate <= HIGH)
    return chance @ n, chance @ rate - p, chance @ ((low <= p) & (p <= high)), chance @ in_band, all_32


def test_the_page_says_what_stopping_does():
    rows = re.findall(r"^\| (0|0\.\d+) \| (.*) \|$", PAGE.read_text(), re.M)
    assert len(rows) == 8
    for p, cells in rows:
        given = [float(cell.replace("−", "-")) for cell in cells.split(" | ")]
        off = np.abs(np.array(given) - exact(float(p)))
        assert (off <= [0.051, 0.0006, 0.0051, 0.0051, 0.0051]).all(), p


def test_simulated_rows_stop_as_the_binomial_says():
    """The rule itself over drawn answers, against the table: mean samples and the bias, within three standard errors."""
    rng, p = np.random.default_rng(0), 0.3
    answers = rng.random((1000, MOST)) < p
    found = []
    for row in answers.tolist():
        n = next(n for n in looks(LEAST, MOST) if n == MOST or not undecided(row[:n], LOW, HIGH))
        found.append((n, sum(row[:n]) / n))
    samples, rates = np.array(found).T
    expected = exact(p)
    assert abs(samples.mean() - expected[0]) < 3 * samples.std() / np.sqrt(len(samples))
    assert abs(rates.mean() - p - expected[1]) < 3 * rates.std() / np.sqrt(len(rates))
    assert expected[1] > 0.02  # there is a bias


def test_the_band_is_as_sure_as_it_says():
    """A row that is really outside is called inside seldom, looking four times: the worst case is at the band's end."""
    right, n = np.array(list(STOPS), float).T
    inside = bands(right, n, LOW, HIGH) == INSIDE
    for p, most in ((0.1, 0.01), (0.15, 0.03), (0.2, 0.09)):
        chance = np.array([ways * p**c * (1 - p) ** (k - c) for (c, k), ways in STOPS.items()])
        assert chance @ inside < most
