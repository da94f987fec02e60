"""What a selection decided, as data: for every row whether it is kept, its rank, and the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a row is kept or dropped. rule: the key that decided. text: a sentence without the row's own numbers, so that reasons can be counted.

    value, cut: the row's number and the one that it was compared with, where there are such.
    """

    rule: str
    text: str
    value: float | None = None
    cut: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return self.text
        return f"{self.text} ({self.value:.6g}" + (")" if self.cut is None else f" against {self.cut:.6g})")


@dataclass(frozen=True)
class Decisions:
    """What was decided, aligned to row_ids. rank: 1 is first in its group, 0 for a row dropped before ranking.

    counts: rows, kept, dropped, dropped_by (rule -> rows), notes (what is likely not meant), and by group and in tokens where asked.
    """

    row_ids: list[str]
    kept: np.ndarray  # (rows,) bool
    rank: np.ndarray  # (rows,) int64
    reasons: list[Reason]
    counts: dict[str, Any]
