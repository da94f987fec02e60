"""Rows' gradients with one side of each weight's gradient projected: inner products are unbiased estimates of the gradients' own.

    W's gradient BᵀA (o, i)   ->   Bᵀ(A Q)  (o, k)   or   (B P)ᵀA  (k, i)        Q (i, k), P (o, k): random signs / √k
    E⟨Bᵀ(A Q), B'ᵀ(A'Q)⟩ = ⟨BᵀA, B'ᵀA'⟩,  variance at most 2/k of (|BᵀA| |B'ᵀA'|)², less where the gradient has many directions

The wider side is projected, the input where both are alike: once for all layers that read it. Both sides at k (LoGra's way, Choe et al. 2024,
arXiv:2405.13954) cost as much and have twice the variance. No gradient is made: T·k·(i + o) multiplications for T·i·o. A side of at most k stays as
it is. Norms and biases stay exact. An embedding is a layer whose B is one-hot; one that is the head too has a single sketch for both.
Source: random projections, Johnson & Lindenstrauss; Achlioptas 2003 (signs).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from curate.passes.gradients.rows import HeadTokens, Lines, Name, Sink, WeightPart


@dataclass
class Projections:
    """The P and Q of a model's weights. shapes: (o, i) of each; an embedding of n lines of d has (n, d)."""

    shapes: dict[Name, tuple[int, int]]
    k: int
    seed: int
    inputs: dict[Name, Name] = field(default_factory=dict)  # weight -> the first weight that reads the same input
    _made: dict[tuple[str, Name], torch.Tensor | None] = field(default_factory=dict)

    def shape(self, name: Name) -> tuple[int, int]:
        """Shape of a weight's projected gradient."""
        o, i = self.shapes[name]
        return (min(o, self.k), i) if o > i else (o, min(i, self.k))

    def outputs(self, name: Name, like: torch.Tensor) -> torch.Tensor | None:
        """P (o, k), in the dtype and on the device of `like`; None where the outputs' side is not projected."""
        o, i = self.shapes[name]
        return self._signs("P", name, o, like) if o > i else None

    def input(self, name: Name, kept: dict[Any, Any], a: torch.Tensor) -> torch.Tensor:
        """A Q (n, k), computed once for the layers that share `kept`; a itself where the inputs' side is not projected."""
        o, i = self.shapes[name]
        if o > i:
            return a
        if "AQ" not in kept:
            kept["by"] = self.inputs.setdefault(name, name)
            signs = self._signs("Q", kept["by"], a.shape[1], a)
            kept["AQ"] = a if signs is None else a @ signs
        self.inputs.setdefault(name, kept["by"])
        projected: torch.Tensor = kept["AQ"]
        return projected

    def _signs(self, side: str, name: Name, size: int, like: torch.Tensor) -> torch.Tensor | None:
        """Random signs / √k, (size, k), the same for the same seed, side and weight; None where size is at most k."""
        if (side, name) not in self._made:
            made = None
            if size > self.k:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {side} {name}".encode()))
                signs = torch.randint(0, 2, (size, self.k), generator=generator, dtype=torch.int8) * 2 - 1
                made = signs.to(like) / self.k**0.5
            self._made[side, name] = made
        return self._made[side, name]


class Sketches:
    """A sink (passes/gradients/rows.py) of projected gradients.

    For targets (theirs: None) it keeps them: parts, name -> (count, …). For other rows (theirs: the targets' sketches) it has products (count, M)
    and squares (count,) float64, estimates of ⟨g_i, g_m⟩ and ‖g_i‖², filled in as batches end.
    """

    def __init__(self, projections: Projections, count: int, device: torch.device, theirs: Sketches | None) -> None:
        self.projections, self.count, self.theirs = projections, count, theirs
        self.parts: dict[Name, torch.Tensor] = {}
        self.squares = torch.zeros(count, dtype=torch.float64, device=device)
        self.products = self.squares.new_zeros(count, theirs.count if theirs else 0)

    def begin(self, numbers: Sequence[int]) -> None:
        self._numbers = torch.tensor(list(numbers), device=self.squares.device)
        self._parts: dict[Name, torch.Tensor] = {}

    def end(self) -> None:
        products = self.products.new_zeros(len(self._numbers), self.products.shape[1])
        squares = self.squares.new_zeros(len(self._numbers))
        for name, part in self._parts.items():
            squares += part.double().square().flatten(1).sum(1)
            if self.theirs is not None:
                products += (part.flatten(1) @ self.theirs.parts[name].flatten(1).T).double()
            else:
                self.parts.setdefault(name, part.new_zeros(self.count, *part.shape[1:]))[self._numbers] = part
        self.products[self._numbers], self.squares[self._numbers] = products, squares

    def matrix(self, part: WeightPart) -> None:
        x, y = self.projections.input(part.name, part.kept, part.a), part.b
        out, signs = self._part(part.name, x)[part.rows], self.projections.outputs(part.name, y)
        if signs is None:
            out = out[:, part.columns]
        else:
            y = y @ signs[part.columns]
        for r, (start, stop) in enumerate(part.spans):
            out[r].addmm_(y[start:stop].T, x[start:stop])

    def vector(self, name: Name, x: torch.Tensor, columns: slice, size: int, rows: slice) -> None:
        if name not in self._parts:
            self._parts[name] = x.new_zeros(len(self._numbers), size)
        self._parts[name][rows, columns] = x

    def lines(self, name: Name, x: Lines) -> None:
        z = self.projections.input(name, {}, x.x)  # (K, d), or (K, k)
        signs = self.projections.outputs(name, z)
        if signs is None:
            signs = torch.eye(self.projections.shapes[name][0]).to(z)
        out, ends = self._part(name, z), x.ends(len(self._numbers))
        for r, (start, stop) in enumerate(ends):
            out[r].addmm_(signs[x.id[start:stop]].T, z[start:stop])

    def head_done(self, tokens: HeadTokens) -> None:
        pass

    def _part(self, name: Name, x: torch.Tensor) -> torch.Tensor:
        """The sketches of this batch's R rows, (R, k, i) or (R, o, k), made empty at their first use."""
        if name not in self._parts:
            self._parts[name] = x.new_zeros(len(self._numbers), *self.projections.shape(name))
        return self._parts[name]


class Both:
    """A sink that hands everything to two sinks."""

    def __init__(self, one: Sink, other: Sink) -> None:
        self.one, self.other = one, other

    def begin(self, numbers: Sequence[int]) -> None:
        self.one.begin(numbers)
        self.other.begin(numbers)

    def matrix(self, part: WeightPart) -> None:
        self.one.matrix(replace(part, kept=part.kept.setdefault("one", {})))
        self.other.matrix(replace(part, kept=part.kept.setdefault("other", {})))

    def vector(self, name: Name, x: torch.Tensor, columns: slice, size: int, rows: slice) -> None:
        self.one.vector(name, x, columns, size, rows)
        self.other.vector(name, x, columns, size, rows)

    def lines(self, name: Name, x: Lines) -> None:
        self.one.lines(name, x)
        self.other.lines(name, x)

    def head_done(self, tokens: HeadTokens) -> None:
        self.one.head_done(tokens)
        self.other.head_done(tokens)

    def end(self) -> None:
        self.one.end()
        self.other.end()
