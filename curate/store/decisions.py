"""What a selection decided, as data: for every row whether it is kept, its rank, and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa


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


class Reasons(Sequence[Reason]):
    """A reason for every row, as codes and values; a `Reason` is made when somebody reads it. Rows that nobody set have `kinds[0]`.

    kinds: (rule, text) of each code. codes: (rows,) int32. value, cut: (rows,) float64, where has_value, has_cut say so.
    """

    def __init__(self, n: int, rest: tuple[str, str]):
        self.kinds: list[tuple[str, str]] = [rest]
        self._known = {rest: 0}
        self.codes = np.zeros(n, np.int32)
        self.value, self.cut = np.full(n, np.nan), np.full(n, np.nan)
        self.has_value, self.has_cut = np.zeros(n, bool), np.zeros(n, bool)

    def set(self, rows: np.ndarray, rule: str, text: str, value: Any = None, cut: Any = None) -> None:
        """The reason of these rows (numbers, or a mask). value, cut: of each of them, or one for all; None where there is none."""
        kind = rule, text
        if kind not in self._known:
            self._known[kind] = len(self.kinds)
            self.kinds.append(kind)
        self.codes[rows] = self._known[kind]
        for given, values, has in ((value, self.value, self.has_value), (cut, self.cut, self.has_cut)):
            has[rows] = given is not None
            values[rows] = np.nan if given is None else given

    def note_numbers(self, rows: np.ndarray, value: np.ma.MaskedArray, cut: np.ma.MaskedArray) -> None:
        """The numbers of these rows, each of which may have none."""
        for given, values, has in ((value, self.value, self.has_value), (cut, self.cut, self.has_cut)):
            has[rows], values[rows] = ~np.ma.getmaskarray(given), np.ma.getdata(given)

    def columns(self) -> dict[str, pa.Array]:
        """rule, reason, value, cut as Arrow columns, NULL where there is none."""
        codes = pa.array(self.codes)
        columns = {name: [kind[i] for kind in self.kinds] for i, name in enumerate(("rule", "reason"))}
        texts = {
            name: pa.DictionaryArray.from_arrays(codes, pa.array(words, pa.string())) for name, words in columns.items()
        }
        return texts | {
            "value": pa.array(self.value, mask=~self.has_value),
            "cut": pa.array(self.cut, mask=~self.has_cut),
        }

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, at: int) -> Reason: ...
    @overload
    def __getitem__(self, at: slice) -> list[Reason]: ...
    def __getitem__(self, at: int | slice) -> Reason | list[Reason]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        value = float(self.value[at]) if self.has_value[at] else None
        rule, text = self.kinds[self.codes[at]]
        return Reason(rule, text, value, float(self.cut[at]) if self.has_cut[at] else None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Decisions:
    """What was decided, aligned to row_ids. rank: 1 is first in its group, 0 for a row dropped before ranking.

    counts: rows, kept, dropped, dropped_by (rule -> rows), notes (what is likely not meant), and by group and in tokens where asked.
    """

    row_ids: list[str]
    kept: np.ndarray  # (rows,) bool
    rank: np.ndarray  # (rows,) int64
    reasons: Sequence[Reason]
    counts: dict[str, Any]
