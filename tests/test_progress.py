"""Lines of progress: counts of one are singular, what is left is told from what was measured."""

from __future__ import annotations

import pytest

from curate import console
from curate.console import Progress


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 rows, 1 new to the store", "1 row, 1 new to the store"),
        ("21 rows at 1 checkpoints", "21 rows at 1 checkpoint"),
        ("1,001 rows, 0.1 rows a second, 11 pairs", "1,001 rows, 0.1 rows a second, 11 pairs"),
    ],
)
def test_one_row_is_no_rows(text, expected, capsys):
    Progress().say(text)
    assert capsys.readouterr().err == expected + "\n"


def test_what_is_left_is_not_told_from_the_first_batch(capsys, monkeypatch):
    """100 batches of ten rows, 2 s each, the first one 60 s: silence about the rest until two more batches, then the truth."""
    clock = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    with Progress(every=1).bar("forward", 1500, done=500) as count:
        for at in range(100):
            clock += 2 if at else 60
            count(10)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["forward: 510 of 1,500 rows", "forward: 520 of 1,500 rows"]
    assert said[2] == "forward: 530 of 1,500 rows, about 3 min 14 s left"  # 97 batches
    assert said[98] == "forward: 1,490 of 1,500 rows, about 2.0 s left"
    assert said[99] == "forward: 1,500 of 1,500 rows in 4 min 18 s"


def test_a_bar_tells_what_is_left_of_a_slow_pass():
    """Batches of 40 s after a first of 200 s: known from the second on."""
    clock, shown = 0.0, Progress()
    shown.terminal = True
    with shown.bar("backward", 100) as count:
        shown._bars.get_time = lambda: clock
        (task,) = shown._bars.tasks
        left = []
        for at in range(4):
            clock += 40 if at else 200
            count(10)
            left.append(task.time_remaining)
    assert left == [None, 8 * 40, 7 * 40, 6 * 40]


def test_rows_that_are_done_again_leave_no_nonsense(capsys, monkeypatch):
    """A pass that runs out of memory takes back what it counted and begins anew."""
    clock = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    with Progress(every=1).bar("gradient", 100) as count:
        for n in (10, 10, -20, 5, 5):
            clock += 2
            count(n)
    said = capsys.readouterr().err
    assert "gradient: 0 of 100 rows\n" in said and "-" not in said
