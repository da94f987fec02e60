"""What one forward pass gives to measurements: token by token, all rows of a batch side by side.

    batch.chosen, batch.rejected                a pair's responses          (batch.completion for SFT rows)
    side.logp, side.entropy, …                  (N,) float64, one per response token, of all rows one after another
    side.states                                 (N, d) the final state that predicts each token
    side.sum(x), side.mean(x), side.last(x)     (N,) or (N, d) -> (rows,) or (rows, d), float64

A measurement is a function of a batch that returns {column: (rows,)}. Nothing is computed that no measurement asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from curate.errors import CurateError
from curate.passes.head import SECOND_SWEEP, STATISTICS, Head
from curate.passes.layout import Item
from curate.passes.tokens import Encoded, EncodedPair

if TYPE_CHECKING:
    from curate.passes.contract import Measurement

CHUNK = 1024  # states per float64 copy while summing


class Side:
    """The responses of one kind ("chosen", "rejected", "completion", "…_alone") of every row of a batch; N tokens in
    all.

    `tokens` (N,) the response tokens, `row` (N,) their row's number in the batch, `lengths` (rows,) float64 their
    count T. Head statistics (`logp`, `entropy`, …; passes/head.py lists them) are attributes, if the measurement
    declared them in `head=`.
    """

    def __init__(self, batch: Batch, items: Sequence[Item], where: Sequence[np.ndarray]) -> None:
        self._batch = batch
        device = batch.all_states.device
        positions = [item.targets for item in items]
        counts = np.asarray([len(own) for own in positions])
        at = np.concatenate([w[own - 1] for own, w in zip(positions, where)])
        targets = np.concatenate([item.ids[own] for item, own in zip(items, positions)]).astype(np.int64)
        self._where = where
        self.tokens = torch.from_numpy(targets).to(device)
        self.at = torch.from_numpy(at).to(device)  # (N,) the predicting position of each, in all_states
        self.row = torch.from_numpy(np.repeat(np.arange(len(items)), counts)).to(device)
        self.lengths = torch.from_numpy(counts.astype(np.float64)).to(device)
        self._ends = torch.from_numpy(np.cumsum(counts) - 1).to(device)
        self._final = torch.from_numpy(np.asarray([w[-1] for w in where])).to(device)
        self.entry: torch.Tensor  # (N,) each token's line in the batch's head statistics

    @property
    def states(self) -> torch.Tensor:
        """(N, d) final hidden states, after the final norm, at the positions that predict each response token."""
        return self._batch.all_states[self.at]

    @property
    def end_states(self) -> torch.Tensor:
        """(rows, d) the state at the last response token itself (at EOS), which predicts nothing."""
        return self._batch.all_states[self._final]

    def states_of(self, row: int, start: int, stop: int) -> torch.Tensor:
        """(stop − start, d) final states at positions start..stop of one row's own sequence, prompt included."""
        at = torch.from_numpy(self._where[row][start:stop]).to(self._batch.all_states.device)
        return self._batch.all_states[at]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over each row's tokens, in float64: (N,) -> (rows,), (N, d) -> (rows, d)."""
        out = torch.zeros(len(self.lengths), *values.shape[1:], dtype=torch.float64, device=values.device)
        for i in range(0, len(values), CHUNK):  # a float64 copy of all states at once would be twice their size
            out.index_add_(0, self.row[i : i + CHUNK], values[i : i + CHUNK].double())
        return out

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over each row's tokens, in float64."""
        return self.sum(values) / self.lengths.reshape(-1, *[1] * (values.ndim - 1))

    def last(self, values: torch.Tensor) -> torch.Tensor:
        """The value at each row's last token."""
        return values[self._ends]

    def __getattr__(self, name: str) -> torch.Tensor:
        if name in SECOND_SWEEP:
            self._batch.check(name)
            first = {needed: getattr(self, needed) for needed in SECOND_SWEEP[name]}
            second: torch.Tensor = getattr(self._batch.head, name)(
                self._batch.all_states, self.tokens, first, at=self.at
            )
            return second
        if name in STATISTICS:
            values = self._batch.statistics(name)  # fills in self.entry
            return values[self.entry]
        raise AttributeError(f"a side has no '{name}'; statistics of the head are {', '.join(STATISTICS)}")


class Batch:
    """The rows of one forward pass. `rows`: their indices in what was measured; `all_states` (positions, d): every
    state that was run.
    """

    def __init__(
        self,
        head: Head,
        rows: Sequence[int],
        encoded: Sequence[Encoded | EncodedPair],
        items: Sequence[Item],
        where: Sequence[np.ndarray],
        all_states: torch.Tensor,
        statistics: Iterable[str],
    ) -> None:
        self.head = head
        self.rows = tuple(rows)
        self.encoded = tuple(encoded)
        self.all_states = all_states
        requested = set(statistics)
        self._requested = frozenset(requested.union(*(SECOND_SWEEP[name] for name in requested & SECOND_SWEEP.keys())))
        by_side: dict[str, dict[int, tuple[Item, np.ndarray]]] = {}
        for item, w in zip(items, where):
            by_side.setdefault(item.side, {})[item.row] = item, w
        self.sides = {name: Side(self, *zip(*(members[row] for row in self.rows))) for name, members in by_side.items()}

    def __getattr__(self, name: str) -> Side:
        sides = self.__dict__.get("sides", {})
        if name in sides:
            return sides[name]
        raise AttributeError(f"this batch has no '{name}'; its sides are {', '.join(sides)}")

    def check(self, name: str) -> None:
        """CurateError where a measurement reads a statistic of the head that none declared."""
        if name not in self._requested:
            raise CurateError(f"a measurement reads '{name}' without declaring it: add head=(\"{name}\", …) to it.")

    def statistics(self, name: str) -> torch.Tensor:
        """One head statistic of every distinct (state, token) of the batch; `Side` picks its own."""
        self.check(name)
        return self._statistics[name]

    @cached_property
    def _statistics(self) -> dict[str, torch.Tensor]:
        return self._sweep()

    def _sweep(self) -> dict[str, torch.Tensor]:
        """One sweep for all sides: a state whose token both sides share (a common beginning of the responses) is read
        once.
        """
        sides = list(self.sides.values())
        at, tokens = torch.cat([s.at for s in sides]), torch.cat([s.tokens for s in sides])
        size = len(self.head.weight)
        unique, entry = torch.unique(at * size + tokens, return_inverse=True)
        for side, own in zip(sides, entry.split([len(s.at) for s in sides])):
            side.entry = own
        return self.head.statistics(
            self.all_states, unique % size, self._requested - SECOND_SWEEP.keys(), at=unique // size
        )


def write_columns(m: Measurement, batch: Batch, out: dict[str, np.ndarray]) -> None:
    """Take one measurement of a batch and write its columns of `out` at the batch's rows. CurateError where it returns
    other columns than it declared, or not one number per row.
    """
    columns = m.function(batch)
    if set(columns) != set(m.columns):
        raise CurateError(
            f"measurement {m.name}: declared the columns {', '.join(m.columns)}, returned {', '.join(columns) or 'none'}."
        )
    for column, values in columns.items():
        if tuple(values.shape) != (len(batch.rows),):
            raise CurateError(
                f"measurement {m.name}: {column} has shape {tuple(values.shape)}, expected one number per row: "
                f"({len(batch.rows)},). `batch.chosen.sum(values)` and `.mean(values)` turn tokens into rows."
            )
        out[column][list(batch.rows)] = values.double().cpu().numpy()
