"""Which rows the measurements of a plan miss, in shards of fixed membership."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from curate.plan.step import SHARD_ROWS, Block

if TYPE_CHECKING:
    from curate.plan.lengths import Lengths
    from curate.plan.step import Task
    from curate.store import Store


class Rows:
    """The rows of the recipe's sources: how many, and which of them each task misses.

    The store is asked once for all tasks, and what several steps miss alike is worked out once: their blocks share their lists of row ids.
    """

    def __init__(self, store: Store, sources: list[str], kind: str, tasks: Sequence[Task]):
        coverage = store.coverage([task.fingerprint for task in tasks], sources, kind=kind)
        self.n, self.positions, self._lacking = coverage.n, coverage.positions, coverage.lacking
        self.row_ids = coverage.row_ids
        self._blocks: dict[tuple[int, ...], list[tuple[int, list[str], tuple[int, ...]]]] = {}
        self._indices: dict[tuple[int, ...], np.ndarray] = {}

    def blocks(self, tasks: Sequence[Task], reads: str) -> tuple[Block, ...]:
        """What a pass has to run for these tasks, of one checkpoint. Rows of one shard that miss different things are measured apart."""
        lacking = [self._lacking[task.fingerprint] for task in tasks]
        key = (SHARD_ROWS[reads], *map(id, lacking))
        if key not in self._blocks:
            self._blocks[key] = self._split(lacking, SHARD_ROWS[reads])
        return tuple((number, rows, tuple(tasks[i] for i in which)) for number, rows, which in self._blocks[key])

    def indices(self, tasks: Sequence[Task], lengths: Lengths) -> np.ndarray:
        """(rows,) int: where the rows that miss one of these tasks stand in `lengths`."""
        lacking = [self._lacking[task.fingerprint] for task in tasks]
        key = (id(lengths), *sorted({id(one) for one in lacking}))
        if key not in self._indices:
            self._indices[key] = lengths.indices(self.row_ids[np.logical_or.reduce(lacking)])
        return self._indices[key]

    def _split(self, lacking: Sequence[np.ndarray], size: int) -> list[tuple[int, list[str], tuple[int, ...]]]:
        """(shard's number, row ids, which of the tasks they miss), in the order of their first rows. lacking: of each task."""
        at = np.flatnonzero(np.logical_or.reduce(lacking))
        if not len(at):
            return []
        shard = self.positions[at] // size
        group = shard  # a number for all rows of a shard that miss the same
        for one in {id(one): one for one in lacking}.values():
            group = np.unique(2 * group + one[at], return_inverse=True)[1]
        _, first = np.unique(group, return_index=True)
        order = np.argsort(group, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
        blocks = []
        for start, part in sorted(zip(first.tolist(), parts, strict=True), key=lambda entry: entry[0]):
            which = tuple(i for i, one in enumerate(lacking) if one[at[start]])
            blocks.append((int(shard[start]), self.row_ids[at[part]].tolist(), which))
        return blocks
