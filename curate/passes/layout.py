"""What is run in one row of tokens: sequences, groups that share a prefix, and where each of them lies in the row.

    one row   [prompt | chosen | rejected | prompt | branch | branch | branch | ...]

Positions restart at the prefix's end for each branch. Plain data: what attends by it is passes/kernels/attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence to run: `ids[start:]` are the tokens to predict, or those at `counted`. `side` names it within its row ("chosen",
    "completion", ...).
    """

    row: int
    side: str
    ids: np.ndarray  # (length,) int32
    start: int
    counted: np.ndarray | None = None  # (n,) ascending positions in ids, each 1 or more

    @property
    def targets(self) -> np.ndarray:
        """(n,) the positions in ids of the tokens to predict; the state at the position before each predicts it."""
        return np.arange(self.start, len(self.ids)) if self.counted is None else self.counted


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences whose first `prefix` tokens are the same and are encoded once."""

    items: tuple[Item, ...]
    prefix: int

    @property
    def n_tokens(self) -> int:
        return self.prefix + sum(len(item.ids) - self.prefix for item in self.items)


@dataclass
class Layout:
    """One packed row. `where[i]` gives, for item i, the index in the row of each of its sequence positions."""

    items: list[Item]
    ids: np.ndarray  # (N,) int64
    positions: np.ndarray  # (N,) int64
    segments: list[tuple[int, int, tuple[int, ...]]]  # offset in the row, prefix length, branch lengths
    where: list[np.ndarray]
    longest: int
    masks: dict[Any, Any] = field(default_factory=dict)  # causal bands and block masks already built for this row
    loop_reason: str | None = None  # why attention that should have run in one kernel ran by the loop

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Layout:
        ids: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        items, where, segments, at, longest = [], [], [], 0, 0
        for group in groups:
            p, offset = group.prefix, at
            ids.append(group.items[0].ids[:p])
            positions.append(np.arange(p))
            at += p
            for item in group.items:
                n = len(item.ids)
                ids.append(item.ids[p:])
                positions.append(np.arange(p, n))
                where.append(np.concatenate([np.arange(offset, offset + p), np.arange(at, at + n - p)]))
                items.append(item)
                at += n - p
                longest = max(longest, n)
            segments.append((offset, p, tuple(len(item.ids) - p for item in group.items)))
        return cls(items, np.concatenate(ids).astype(np.int64), np.concatenate(positions), segments, where, longest)
