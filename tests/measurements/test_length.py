"""Token counts and edit distance: hand table, and the textbook dynamic programme."""

from __future__ import annotations

import numpy as np
import pytest

from curate.measurements import MEASUREMENTS, measure_tokens
from curate.measurements.length import edit_distance
from curate.passes.tokens import Encoded, EncodedPair


@pytest.mark.parametrize(
    "a, b, wanted",
    [
        ("kitten", "sitting", 3),
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("abc", "abd", 1),
        ("a", "b", 1),
        ("ab", "ba", 2),
        ("flaw", "lawn", 2),
    ],
)
def test_edit_distance_by_hand(a, b, wanted):
    assert edit_distance([ord(c) for c in a], [ord(c) for c in b]) == wanted


def textbook(a, b) -> int:
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        line, before = [i], line
        for j, y in enumerate(b, 1):
            line.append(min(before[j] + 1, line[-1] + 1, before[j - 1] + (x != y)))
    return line[-1]


def test_edit_distance_against_the_textbook():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (rng.integers(0, 4, rng.integers(0, 90)) for _ in range(2))
        assert edit_distance(a, b) == textbook(a, b)


def encoded(*ids, start, **extra) -> Encoded:
    return Encoded(np.asarray(ids, np.int32), start, **extra)


def test_columns():
    pair = EncodedPair(encoded(1, 5, 6, 7, 2, start=2), encoded(1, 5, 6, 2, start=2, truncated=True), 3)
    sft = encoded(1, 5, 6, 2, start=2)
    measurements = [MEASUREMENTS["length"], MEASUREMENTS["completion_length"]]
    found = measure_tokens([pair, sft], measurements)
    wanted = {
        "prompt_tokens": [2, 2],
        "chosen_tokens": [3, np.nan],
        "rejected_tokens": [2, np.nan],
        "edit_distance": [1 / 3, np.nan],
        "truncated": [1, 0],
        "completion_tokens": [np.nan, 2],
    }
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_nothing_left_of_a_response():
    empty = Encoded(np.zeros(0, np.int32), 0, problem="the row has no completion")
    found = measure_tokens([EncodedPair(empty, empty, 0)], [MEASUREMENTS["length"]])
    assert found["chosen_tokens"][0] == 0
    assert np.isnan(found["edit_distance"][0])
