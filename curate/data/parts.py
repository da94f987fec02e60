"""An export's two parts, the kept rows and the dropped ones, as Arrow tables of one schema each: what `write_export` writes, wherever they come from.

spool.py makes them from rows that a program gives, one by one; the export of a store has them as its database gives them, many at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import pyarrow as pa


class Part(Protocol):
    """Rows of one schema. own: the user's columns; called: what the export calls those of them whose names it has itself."""

    @property
    def n_rows(self) -> int: ...
    @property
    def own(self) -> Collection[str]: ...
    @property
    def called(self) -> Mapping[str, str]: ...

    def schema(self) -> pa.Schema:
        """Of all rows. A column that never held a value is text."""

    def tables(self) -> Iterator[pa.Table]:
        """The rows, some thousands at a time."""

    def texts_of_several(self) -> list[str]:
        """The columns that had to become text, since their values have several types, as the export calls them."""

    def without_bytes(self) -> Collection[str]:
        """The user's columns with the store's words for bytes in them, once all rows have been read."""


@dataclass(frozen=True)
class Parts:
    """kind: of the rows. layout: of the kept ones, such as "trl preference, standard". total: the sum of their weights, 0 where they have none."""

    kept: Part
    dropped: Part
    kind: str
    layout: str
    total: float = 0.0


def resampled(tables: Iterator[pa.Table], n_rows: int, n_wanted: int, total: float, seed: int) -> Iterator[pa.Table]:
    """Systematic resampling: row i occurs floor or ceil of n_wanted * w_i / sum(w) times, n_wanted rows in all (Kitagawa 1996)."""
    import numpy as np

    offset, reached, given, number = random.Random(seed).random(), 0.0, 0, 0
    for table in tables:
        sums = np.cumsum([reached, *(table["weight"].to_numpy() / total)])
        upto = [min(n_wanted, math.floor(n_wanted * one + offset)) for one in sums[1:].tolist()]
        number += len(upto)
        if number == n_rows:
            upto[-1] = n_wanted
        until = np.maximum.accumulate([given, *upto])
        yield table.take(np.repeat(np.arange(len(upto)), np.diff(until)))
        reached, given = float(sums[-1]), int(until[-1])
