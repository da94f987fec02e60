"""Inner products of rows' gradients with one vector v in weight space, exactly: one backward for many rows, and no gradient is made.

    ⟨g, v⟩ = Σ_layers Σ_t b_tᵀ V a_t        A (n, i) a layer's inputs, B (n, o) gradients at its outputs, V (o, i) its part of v

A linear layer costs what it costs forward. Source: the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from curate.passes.backward import check_angles, understood
from curate.passes.bundles import check_lengths
from curate.passes.cpu_products import product
from curate.passes.inner_products import wide
from curate.passes.layer_rules import Parameters, Rules
from curate.passes.model import Model
from curate.passes.row_gradients import HEAD, HeadTokens, Lines, Name, Of, Span, rows_of, take
from curate.tokens import Encoded, EncodedPair

TOKENS_ON_CPU = 1024  # in one graph; more cost memory there and gain nothing


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
    ModelError where one of these has no rule, or a row does not fit.
    """
    sides: tuple[Of, ...] = ("chosen", "rejected") if isinstance(encoded[0], EncodedPair) else ("chosen",)
    items = {i * len(sides) + k: own for k, of in enumerate(sides) for i, own in rows_of(encoded, of).items()}
    found = np.full(len(encoded) * len(sides), np.nan)
    if items:
        check_lengths(model, items)
        check_angles(model, items)
        rules, memory = understood(model, parameters)
        limit = memory.check(model, items, token_budget)
        if model.device.type == "cpu":
            limit = min(limit, TOKENS_ON_CPU)
        sink = _Meeting(model, rules, v, len(found))
        with torch.no_grad():
            take(model, rules, memory, items, limit, sink)
        found[list(items)] = sink.products[list(items)].cpu().numpy()
    return found.reshape(-1, len(sides))


class _Meeting:
    """A sink (passes/row_gradients.py) in which every part of a gradient meets its part of v. products (count,) float64."""

    def __init__(self, model: Model, rules: Rules, v: dict[str, torch.Tensor], count: int) -> None:
        names = {id(p): name for name, p in model.module.named_parameters()}
        self.products = torch.zeros(count, dtype=torch.float64, device=model.device)
        self.parts: dict[Name, torch.Tensor] = {}

        def own(name: Name, p: Any, *, turned: bool = False) -> None:
            part = v.get(names.get(id(p), ""))
            if part is not None:
                part = wide(part).to(model.device)
                self.parts[name] = part.T if turned else part

        head = model.module.get_output_embeddings()
        own(HEAD, head.weight)
        own(("head bias", 0), getattr(head, "bias", None))
        for k, linear in enumerate(rules.linears):
            weight: Any = linear.module.weight
            own(("weight", k), weight, turned=linear.weight.stride() != weight.stride())
            own(("bias", k), linear.bias)
        for k, norm in enumerate(rules.norms):
            own(("scale", k), norm.module.weight)
            own(("shift", k), getattr(norm.module, "bias", None))
        for k, table in enumerate(rules.embeddings):
            own(("embedding", k), table.module.weight)

    def begin(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers)
        self._found = self.products.new_zeros(len(numbers))

    def matrix(
        self,
        name: Name,
        a: torch.Tensor,
        b: torch.Tensor,
        columns: slice,
        rows: slice,
        spans: list[Span],
        kept: dict[Any, Any],
    ) -> None:
        if name in self.parts:
            per_token = product(a, self.parts[name][columns].T.to(a.dtype)).mul_(b).sum(1).double()  # (n,)
            self._found[rows] += torch.stack([per_token[start:stop].sum() for start, stop in spans])

    def vector(self, name: Name, x: torch.Tensor, columns: slice, size: int, rows: slice) -> None:
        if name in self.parts:
            self._found[rows] += x @ self.parts[name].flatten()[columns].double()

    def lines(self, name: Name, x: Lines) -> None:
        if name in self.parts:
            self._found.index_add_(0, x.row, (x.x * self.parts[name][x.id]).sum(1).double())

    def head_done(self, tokens: HeadTokens) -> None:
        pass

    def end(self) -> None:
        self.products[self._numbers] = self._found
