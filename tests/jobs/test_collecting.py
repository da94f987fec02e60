"""What is collected next: nothing twice, nothing known, nearest by turns, groups in their shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from curate.errors import UsageError
from curate.jobs.collect.pick import Candidate, by_function, by_group, fresh, nearest, normalised
from curate.rows import Example


def test_texts_that_read_the_same_are_the_same():
    alike = ["Eva has 4 nuts.", "eva  has 4\nnuts", "“Eva” has: 4 nuts!", "Ｅva has 4 nuts"]
    assert len({normalised(text) for text in alike}) == 1
    different = ["Eva has 4 nuts.", "Eva has 40 nuts.", "3 - 2", "3 + 2", "3 * 2", "x = -2", "x = 2", ""]
    assert len({normalised(text) for text in different}) == len(different)
    assert normalised(({"role": "user", "content": "Hi, you"},)) == normalised("hi you")


def test_nothing_known_and_nothing_twice():
    rows = [
        Example("What is 2 + 2?", "4", "4"),  # known by content
        Example("what is 2 + 2", "four", "4"),  # its prompt is known
        Example("What is 2 - 2?", "0", "0"),
        Example("WHAT IS 2 - 2", "nought", "0"),  # the one before
        Example("What is 9?", None, "9"),
        Example("What is 8?", "  ", "8"),
        Example("held out?", "yes"),
    ]
    kept, why = fresh([Candidate(row) for row in rows], [rows[0], Example("Held out", "no")])
    assert [candidate.row for candidate in kept] == [rows[2]]
    assert why == {"known": 1, "with a known prompt": 3, "without a completion": 2}


def test_every_hard_row_takes_its_nearest_free_one():
    """Directions on a circle about the pool's mean: two hard rows at 0° and 180°, five pool rows."""
    degrees = np.array([0, 90, 180, 270, 10, 190])
    pool = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)
    hard = np.array([[1.0, 0.02], [-1.0, -0.02]])
    for seed in range(4):
        taken = nearest(hard, pool, 4, seed=seed)
        assert set(taken[:2]) == {0, 2} or set(taken[:2]) == {4, 5}
        assert set(taken) == {0, 2, 4, 5}  # each hard row has two, though one of them would be the nearest to four
    assert sorted(nearest(hard, pool, 99, seed=0)) == list(range(6))
    assert nearest(hard, pool, 3, seed=1) == nearest(hard, pool, 3, seed=1)


def test_the_pool_s_mean_does_not_count_and_unknown_states_neither():
    pool = np.array([[1.0, 0], [0, 1], [np.nan, 0]])
    for shift in (0.0, 1000.0):
        assert nearest(np.array([[0.9, 0.1], [np.nan, 1]]) + shift, pool + shift, 1, seed=0) == [0]
    assert nearest(np.full((1, 2), np.nan), pool, 1, seed=0) == []


def test_groups_come_as_often_as_among_the_hard_rows():
    hard, pool = ["a"] * 6 + ["b"] * 3 + ["nowhere"], ["a"] * 50 + ["b"] * 50 + ["c"] * 50
    counts = Counter(pool[at] for at in by_group(hard, pool, 30, seed=0))
    assert counts == {"a": 20, "b": 10}
    few = ["a"] * 4 + ["b"] * 50  # what a lacks comes from b
    assert Counter(few[at] for at in by_group(hard, few, 30, seed=0)) == {"a": 4, "b": 26}
    assert len(by_group(hard, ["a", "c"], 5, seed=0)) == 1
    assert by_group(hard, pool, 30, seed=0) != by_group(hard, pool, 30, seed=1)


def test_a_function_of_the_user_s_own_is_checked():
    rows = [Candidate(Example(str(i), "x", "1"), {"level": i}) for i in range(5)]

    def hardest(hard, pool, take, seed):
        assert hard[0] == {"prompt": "4", "completion": "x", "answer": "1", "level": 4}
        return sorted(range(len(pool)), key=lambda at: -pool[at]["level"])[:take]

    assert by_function(hardest, rows[4:], rows, 2, seed=0, name="mine") == [4, 3]
    for wrong in ([5], [1, 1], [0, 1, 2], ["x"], None, [-1]):
        with pytest.raises(UsageError, match="mine"):
            by_function(lambda *_, found=wrong: found, rows, rows, 2, seed=0, name="mine")
