"""Batches on short memory: every row once and in order, down to single rows; sums begin anew."""

from __future__ import annotations

import pytest
import torch

from curate.errors import ModelError
from curate.passes.halving import halving, list_halves

SHORT = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def too_long(rows):
    return ModelError(f"row {rows[0]} does not fit")


def upto(most, seen, problem=SHORT[0]):
    """A pass that takes `most` rows at a time; of a larger batch it has taken one row when it fails."""

    def run(rows):
        seen.extend(rows[:1])
        if len(rows) > most:
            raise problem
        seen.extend(rows[1:])

    return run


@pytest.mark.parametrize("problem", SHORT, ids=lambda problem: type(problem).__name__)
def test_what_does_not_fit_is_halved_until_it_does(problem):
    done = []

    def run(rows):
        if len(rows) > 2:
            raise problem
        done.append(rows)

    halving([[0, 1, 2, 3, 4], [5], [6, 7, 8]], run, list_halves, too_long)
    assert done == [[0, 1], [2], [3, 4], [5], [6], [7, 8]]


def test_a_single_row_that_does_not_fit_is_named():
    with pytest.raises(ModelError, match="row 0 does not fit"):
        halving([[0, 1, 2]], upto(0, []), list_halves, too_long)
    with pytest.raises(ModelError, match="row 0 does not fit"):
        halving([[0, 1, 2]], upto(0, []), list_halves, too_long, anew=lambda: None)


def test_other_errors_are_not_short_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        halving([[0, 1]], upto(1, [], RuntimeError("shapes differ")), list_halves, too_long)


def test_sums_begin_anew_and_have_each_row_once():
    """The half-run batch leaves its first row in the sum, which is thrown away; a batch that fitted is run again too."""
    seen, begun = [], []
    anew = lambda: (begun.append(len(seen)), seen.clear())  # noqa: E731
    halving([[0, 1], [2, 3, 4, 5, 6]], upto(2, seen), list_halves, too_long, anew=anew)
    assert seen == [0, 1, 2, 3, 4, 5, 6] and begun == [0, 3, 5]


def test_batches_come_one_by_one():
    """A batch is made when the one before has run."""
    order = []

    def batches():
        for rows in ([0], [1]):
            order.append(("made", rows))
            yield rows

    halving(batches(), lambda rows: order.append(("run", rows)), list_halves, too_long)
    assert order == [("made", [0]), ("run", [0]), ("made", [1]), ("run", [1])]
