"""Lines of progress: counts of one are singular."""

from __future__ import annotations

import pytest

from curate.progress import Progress


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
