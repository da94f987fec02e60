"""Inner products of rows' gradients with one vector v in weight space, exactly: one backward for many rows, and no gradient is made.

    ⟨g, v⟩ = Σ_layers Σ_t b_tᵀ V a_t        A (n, i) a layer's inputs, B (n, o) gradients at its outputs, V (o, i) its part of v

A linear layer costs what it costs forward. Source: the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from curate.passes.gradients.layer_rules import Parameters
from curate.passes.gradients.rows import HeadTokens, Lines, Name, Scalar, WeightPart, parts_of, prepared, rows_of, take
from curate.passes.kernels.cpu_products import product
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair


def vector_products(
    model: Model,
    encoded: Sequence[Encoded | EncodedPair],
    v: dict[str, torch.Tensor],
    *,
    parameters: Parameters = "all",
    token_budget: int = 16384,
) -> np.ndarray:
    """(rows, sides) float64 ⟨∇ log π(y), v⟩, nats per unit of v; NaN where a row has a problem. sides: chosen and rejected of pairs, the
    completion of SFT rows.

    v: parameters' names -> tensors of their shapes; a parameter that it lacks adds nothing. parameters: among which v's are, as in backward.measure.
    ModelError where one of these has no rule, or v or a row does not fit into memory.
    """
    sides: tuple[Scalar, ...] = (
        ("chosen", "rejected") if any(isinstance(row, EncodedPair) for row in encoded) else ("chosen",)
    )
    items = {i * len(sides) + k: own for k, side in enumerate(sides) for i, own in rows_of(encoded, side).items()}
    values = np.full(len(encoded) * len(sides), np.nan)
    if items:
        rules, memory, limit = prepared(model, items, parameters, token_budget)
        sink = _VectorProducts(parts_of(model, rules, v), len(values), model.device)
        with torch.no_grad():
            take(model, rules, memory, items, limit, sink)
        values[list(items)] = sink.products[list(items)].cpu().numpy()
    return values.reshape(-1, len(sides))


class _VectorProducts:
    """A sink (passes/gradients/rows.py) that multiplies every part of a row's gradient with the same part of v.

    products: (count,) float64, ⟨g_i, v⟩ of row number i, filled in as batches end.
    """

    def __init__(self, parts: dict[Name, torch.Tensor], count: int, device: torch.device) -> None:
        self.parts = parts
        self.products = torch.zeros(count, dtype=torch.float64, device=device)

    def begin(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers)
        self._batch_products = self.products.new_zeros(len(numbers))

    def matrix(self, part: WeightPart) -> None:
        if part.name in self.parts:
            v = self.parts[part.name][part.columns].to(part.a.dtype)
            per_token = product(part.a, v.T).mul_(part.b).sum(1).double()  # (n,)
            self._batch_products[part.rows] += torch.stack([per_token[start:stop].sum() for start, stop in part.spans])

    def vector(self, name: Name, x: torch.Tensor, columns: slice, size: int, rows: slice) -> None:
        if name in self.parts:
            self._batch_products[rows] += x @ self.parts[name][columns].double()

    def lines(self, name: Name, x: Lines) -> None:
        if name in self.parts:
            self._batch_products.index_add_(0, x.row, (x.x * self.parts[name][x.id]).sum(1).double())

    def head_done(self, tokens: HeadTokens) -> None:
        pass

    def end(self) -> None:
        self.products[self._numbers] = self._batch_products
