"""Which rows a measurement misses, in shards of fixed membership."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curate.identity import Task
    from curate.store import Store

# Rows of a shard, fixed for ever: a row's shard is its position in the store // SHARD_ROWS, whatever is missing of it.
SHARD_ROWS = {"tokens": 8192, "forward": 512, "backward": 128, "sample": 256, "direction": 512, "neighbours": 512}
Block = tuple[int, list[str], "tuple[Task, ...]"]  # shard's number, row ids by position, the tasks that these rows miss


class Rows:
    """The rows of the recipe's sources: how many, and which of them a task misses. Lists that are alike are kept once."""

    def __init__(self, store: Store, sources: list[str], kind: str):
        self.store, self.sources, self.kind = store, sources, kind
        self.n = len(store.row_ids_of(sources, kind=kind))
        self._seen: list[list[tuple[int, str]]] = []

    def missing(self, task: Task) -> list[tuple[int, str]]:
        """(position, row id) by position."""
        found = self.store.missing(task.fingerprint, self.sources, kind=self.kind)
        for known in self._seen:
            if known == found:
                return known
        self._seen.append(found)
        return found

    def blocks(self, tasks: Sequence[Task], reads: str) -> tuple[Block, ...]:
        """What a pass has to run for these tasks, of one subject."""
        return tuple(_blocks([(task, self.missing(task)) for task in tasks], SHARD_ROWS[reads]))


def _blocks(missing: list[tuple[Task, list[tuple[int, str]]]], size: int) -> Iterator[Block]:
    """Shards of fixed membership; rows of one shard that miss different things are measured apart."""
    alike: dict[
        int, tuple[list[tuple[int, str]], list[Task]]
    ] = {}  # tasks that miss the same rows (`Rows` keeps such lists once)
    for task, rows in missing:
        alike.setdefault(id(rows), (rows, []))[1].append(task)
    if len(alike) == 1:
        rows, tasks = next(iter(alike.values()))
        for number, block in groupby(rows, lambda row: row[0] // size):
            yield number, [row_id for _, row_id in block], tuple(tasks)
        return
    of: dict[tuple[int, str], list[Task]] = {}
    for rows, tasks in alike.values():
        for place in rows:
            of.setdefault(place, []).extend(tasks)
    groups: dict[tuple[int, tuple[str, ...]], tuple[list[str], tuple[Task, ...]]] = {}
    for (position, row_id), missed in sorted(of.items()):
        key = (position // size, tuple(t.fingerprint for t in missed))
        groups.setdefault(key, ([], tuple(missed)))[0].append(row_id)
    for (number, _), (row_ids, missed_by) in groups.items():
        yield number, row_ids, missed_by
