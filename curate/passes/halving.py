"""Batches that are cut in two where memory is short, and run again: a batch's size changes its time, never its numbers beyond rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def halving(
    batches: Iterable[T],
    run: Callable[[T], object],
    halves: Callable[[T], Sequence[T]],
    too_long: Callable[[T], Exception],
    *,
    anew: Callable[[], object] | None = None,
) -> None:
    """Run every batch; one for which memory is short is cut in two, and both halves are run in its place, down to single rows.

    halves: the two halves of a batch, none of a single row. too_long: the error for a single row that does not fit. anew: for passes that sum over
    batches, where a failed batch leaves part of itself in the sums; it empties them. It is called before the first batch; after a failure
    every batch is halved and all are run again.
    """
    if anew is not None:
        _all_or_nothing(list(batches), run, halves, too_long, anew)
        return
    for batch in batches:
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            if not _fits(run, part):
                waiting += reversed(_cut(part, halves, too_long))


def _all_or_nothing(
    batches: list[T],
    run: Callable[[T], object],
    halves: Callable[[T], Sequence[T]],
    too_long: Callable[[T], Exception],
    anew: Callable[[], object],
) -> None:
    anew()
    while (failed := next((batch for batch in batches if not _fits(run, batch)), None)) is not None:
        _cut(failed, halves, too_long)  # says where it is a single row
        batches = [part for batch in batches for part in (halves(batch) or [batch])]
        anew()


def _cut(batch: T, halves: Callable[[T], Sequence[T]], too_long: Callable[[T], Exception]) -> Sequence[T]:
    parts = halves(batch)
    if not parts:
        raise too_long(batch)
    return parts


def _fits(run: Callable[[T], object], batch: T) -> bool:
    """Whether a batch ran; False where memory was short, with what it took given back."""
    try:
        run(batch)
        return True
    except (MemoryError, RuntimeError) as problem:
        if not is_short_of_memory(problem):
            raise
    torch.cuda.empty_cache()  # nothing where no GPU was used
    return False


def is_short_of_memory(problem: BaseException) -> bool:
    """Whether an error says that memory is short: a GPU's, Python's, or torch's on a CPU, which is a plain RuntimeError."""
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or (
        type(problem) is RuntimeError and "can't allocate memory" in str(problem)
    )


def list_halves(rows: list[T]) -> list[list[T]]:
    """The halves of a batch that is a list of rows."""
    middle = len(rows) // 2
    return [rows[:middle], rows[middle:]] if middle else []
