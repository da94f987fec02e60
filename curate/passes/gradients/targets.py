"""Exact inner products of many rows' gradients with those of M targets: the targets' are kept, the rows' are computed layer by layer and freed.

    ⟨g_i, g_m⟩, a sum over layers, each in one of two forms:
        matrices   every target's BᵀA is kept, (M, o, i); a row's own is made block by block and multiplied with all of them
        tokens     the targets' A and B are kept; Σ_{t,t'} ⟨a_t, a_t'⟩⟨b_t, b_t'⟩ with all of their tokens

A head that is the embedding too has the embedding's part in its kept matrix, which the rows' embedding parts then meet as well. Products are float32
or wider, sums beyond a block float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from curate.passes.gradients import products
from curate.passes.gradients.head import residuals_at
from curate.passes.gradients.rows import HEAD, HeadTokens, Lines, Name, Span, WeightPart
from curate.passes.head import Head
from curate.passes.kernels.cpu_products import product

BLOCK = (
    1 << 20
)  # numbers of the rows' matrices at a time: few calls, and they are multiplied before they leave the cache
MEETINGS = 1 << 22  # numbers of embedding lines that are multiplied at a time


@dataclass
class Tokens:
    """A batch of targets' inputs and output gradients of one layer, a (n, i), b (n, o); each target's number and span."""

    a: torch.Tensor
    b: torch.Tensor
    numbers: list[int]
    spans: list[Span]


class Targets:
    """A sink (passes/gradients/rows.py) that keeps the gradients of M targets.

    shapes: of every weight. by_tokens: the linear layers whose tokens are kept; of all others the matrices are.
    matrices: weight -> (M, o, i). tokens: weight -> batches. vectors: name -> (M, size) float64.
    """

    def __init__(
        self, count: int, shapes: dict[Name, tuple[int, int]], by_tokens: frozenset[Name], device: torch.device
    ) -> None:
        self.count, self.shapes, self.by_tokens, self.device = count, shapes, by_tokens, device
        self.matrices: dict[Name, torch.Tensor] = {}
        self.tokens: dict[Name, list[Tokens]] = {}
        self.vectors: dict[Name, torch.Tensor] = {}
        self._lines: dict[Name, list[Lines]] = {}

    @staticmethod
    def of(vectors: Iterable[dict[Name, torch.Tensor]], count: int, device: torch.device) -> Targets:
        """`count` vectors by the names of `parts_of`, read one after another, all of the same names; an embedding as its whole table."""
        kept = Targets(count, {}, frozenset(), device)
        for m, parts in enumerate(vectors):
            for name, part in parts.items():
                home = kept.matrices if part.ndim == 2 else kept.vectors
                part = part if part.ndim == 2 else part.double()
                if not m:
                    home[name] = part.new_empty(count, *part.shape)
                home[name][m] = part
        return kept

    def begin(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers)
        self._new_tokens: dict[Name, Tokens] = {}
        self._new_lines: dict[Name, Lines] = {}

    def matrix(self, part: WeightPart) -> None:
        name, a, b = part.name, part.a, part.b
        if name in self.by_tokens:
            if "a" not in part.kept:
                part.kept["a"] = a.clone()
            self._new_tokens[name] = Tokens(part.kept["a"], b.clone(), self._numbers, part.spans)
            return
        if name not in self.matrices:
            self.matrices[name] = a.new_empty(self.count, *self.shapes[name])
        for m, (start, stop) in zip(self._numbers[part.rows], part.spans):
            torch.mm(b[start:stop].T, a[start:stop], out=self.matrices[name][m, part.columns])

    def vector(self, name: Name, x: torch.Tensor, columns: slice, size: int, rows: slice) -> None:
        if name not in self.vectors:
            self.vectors[name] = x.new_empty(self.count, size)
        self.vectors[name][self._numbers[rows], columns] = x

    def head_done(self, tokens: HeadTokens) -> None:
        pass

    def lines(self, name: Name, x: Lines) -> None:
        x = replace(x, row=torch.tensor(self._numbers, device=x.row.device)[x.row])
        if name == HEAD:
            self.matrices[HEAD].index_put_((x.row, x.id), x.x, accumulate=True)
        else:
            self._new_lines[name] = x

    def end(self) -> None:
        for name, tokens in self._new_tokens.items():
            self.tokens.setdefault(name, []).append(tokens)
        for name, lines in self._new_lines.items():
            self._lines.setdefault(name, []).append(lines)

    def tables(self) -> dict[Name, Lines]:
        """For each embedding that is not the head too, the lines of all targets' gradients, sorted by token id; row: the target's number."""
        tables = {}
        for name, parts in self._lines.items():
            row, ids, x = (torch.cat([getattr(part, key) for part in parts]) for key in ("row", "id", "x"))
            order = ids.argsort(stable=True)
            tables[name] = Lines(row[order], ids[order], x[order])
        return tables

    def squares(self) -> torch.Tensor:
        """(M,) float64 ‖g_m‖²."""
        total = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        for x in self.vectors.values():
            total += x.square().sum(1)
        for x in self.matrices.values():
            for m in range(self.count):
                total[m] += _square(x[m])
        for batches in self.tokens.values():
            for part in batches:
                for m, (start, stop) in zip(part.numbers, part.spans):
                    total[m] += _own(part.a[start:stop], part.b[start:stop])
        for lines in self._lines.values():
            for some in lines:
                total.index_add_(0, some.row, some.x.double().square().sum(1))
        return total


class Crossing:
    """A sink that multiplies rows' gradients with those of the targets, over the parameters that the targets have.

    products (N, M) and squares (N,) float64, ⟨P g_i, g_m⟩ and ‖P g_i‖², filled in as batches end. scale: P's diagonal by the names of `parts_of`, for
    targets of whole vectors; None: 1.
    """

    def __init__(self, head: Head, targets: Targets, count: int, scale: dict[Name, torch.Tensor] | None = None) -> None:
        self.head, self.targets, self.tables, self.scale = head, targets, targets.tables(), scale
        self.products = torch.zeros(count, targets.count, dtype=torch.float64, device=targets.device)
        self.squares = torch.zeros(count, dtype=torch.float64, device=targets.device)

    def begin(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers)
        self._products = self.products.new_zeros(len(numbers), self.targets.count)
        self._squares = self.squares.new_zeros(len(numbers))

    def end(self) -> None:
        self.products[self._numbers], self.squares[self._numbers] = self._products, self._squares

    def matrix(self, part: WeightPart) -> None:
        name, a, b, spans = part.name, part.a, part.b, part.spans
        sums, squares = self._products[part.rows], self._squares[part.rows]
        if name in self.targets.tokens:
            for k, other in enumerate(self.targets.tokens[name]):
                if k not in part.kept:
                    part.kept[k] = product(a, other.a.T)
                both = product(b, other.b.T).mul_(part.kept[k])  # (n, K)
                lines = torch.stack([both[start:stop].sum(0) for start, stop in spans]).double()
                sums[:, other.numbers] += torch.stack([lines[:, start:stop].sum(1) for start, stop in other.spans], 1)
            for r, (start, stop) in enumerate(spans):
                squares[r] += _own(a[start:stop], b[start:stop])
            return
        if name not in self.targets.matrices:
            return
        theirs = self.targets.matrices[name][:, part.columns]  # (M, width, i)
        scale = None if self.scale is None else self.scale[name][part.columns]  # (width, i)
        width = max(1, BLOCK // (a.shape[1] * len(spans)))
        room = a.new_empty(len(spans) * min(width, b.shape[1]) * a.shape[1])
        for at in range(0, b.shape[1], width):
            some = b[:, at : at + width]
            own = room[: len(spans) * some.shape[1] * a.shape[1]].view(len(spans), some.shape[1], a.shape[1])
            for r, (start, stop) in enumerate(spans):
                torch.mm(some[start:stop].T, a[start:stop], out=own[r])
            if scale is not None:
                own *= scale[at : at + width]
            sums += (own.flatten(1) @ theirs[:, at : at + width].flatten(1).T).double()
            squares += torch.linalg.vector_norm(own, dim=2).double().square().sum(1)

    def vector(self, name: Name, x: torch.Tensor, columns: slice, size: int, rows: slice) -> None:
        if name not in self.targets.vectors:
            return
        if self.scale is not None:
            x = x * self.scale[name][columns]
        self._products[rows] += x @ self.targets.vectors[name][:, columns].T
        self._squares[rows] += x.square().sum(1)

    def head_done(self, tokens: HeadTokens) -> None:
        self._tokens = tokens

    def lines(self, name: Name, x: Lines) -> None:
        whole = name in self.targets.matrices
        if not whole and name not in self.tables:
            return
        if self.scale is not None:
            x = replace(x, x=x.x * self.scale[name][x.id])
        self._squares.index_add_(0, x.row, x.x.double().square().sum(1))
        if whole:
            self._meet(self.targets.matrices[name], x)
            if name == HEAD:
                self._tied(x)
            return
        theirs = self.tables[name]
        low = torch.searchsorted(theirs.id, x.id)
        count = torch.searchsorted(theirs.id, x.id, right=True) - low
        mine = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)  # (pairs,)
        other = torch.arange(len(mine), device=mine.device) - (count.cumsum(0) - count - low)[mine]
        step = max(1, MEETINGS // x.x.shape[1])
        for k in range(0, len(mine), step):
            i, m = mine[k : k + step], other[k : k + step]
            self._products.index_put_(
                (x.row[i], theirs.row[m]), (x.x[i] * theirs.x[m]).sum(1).double(), accumulate=True
            )

    def _meet(self, theirs: torch.Tensor, x: Lines) -> None:
        """Adds the products of the targets' whole tables (M, n, d) with the rows' lines."""
        step = max(1, MEETINGS // (x.x.shape[1] * self.targets.count))
        for k in range(0, len(x.id), step):
            some = slice(k, k + step)
            self._products.index_add_(0, x.row[some], (theirs[:, x.id[some]] * x.x[some]).sum(2).T.double())

    def _tied(self, x: Lines) -> None:
        """Adds to the rows' squares the product of their head part with their embedding part, where one matrix is both."""
        t = self._tokens
        if self.scale is not None:
            x = replace(x, x=x.x * self.scale[HEAD][x.id])
        for r, (start, stop) in enumerate(t.spans):
            own, h = x.row == r, t.states[start:stop]
            q = residuals_at(self.head, h, t.tokens[start:stop], t.logp[start:stop], t.lse[start:stop], x.id[own])
            meet = (h @ x.x[own].T * q).sum(1) * -t.signs[start:stop]  # (n,)
            self._squares[r] += 2 * meet.double().sum()


def _own(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """‖bᵀa‖², a float64 scalar, in the cheaper of the two forms: the square of one row's gradient of a linear layer."""
    n = len(a)
    if products.prefers_tokens(n, a.shape[1], b.shape[1]):
        return products.weigh(products.gram(a, n), products.gram(b, n), n, n)[0]
    return products.matrix_products(a, b, n)[0]


def _square(x: torch.Tensor) -> torch.Tensor:
    """‖x‖² of a matrix, a float64 scalar."""
    return torch.linalg.vector_norm(x, dim=1).double().square().sum()
