"""The inner products of two sequences' gradients, gathered layer by layer while one backward runs; nothing of the gradients is kept.

    values (rows, 3) float64:   first·first, first·second, second·second      summed over all layers with a rule

Forms of a linear layer's products, and which is cheaper: passes/gradients/products.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from curate.passes.gradients import products
from curate.passes.gradients.capture import Shared
from curate.passes.gradients.layer_rules import Embedding, Linear, Norm
from curate.passes.gradients.products import wide


class PairProducts:
    """A taker (capture.py) of the inner products of each row's two sequences.

    spans: for each row where its first sequence starts, where its second one does, and where that ends, among the N tokens of the graph.
    """

    def __init__(self, spans: list[tuple[int, int, int]], device: torch.device) -> None:
        self.spans = spans
        self.values = torch.zeros(len(spans), 3, dtype=torch.float64, device=device)
        # what a head that is the embedding too adds when the embedding's gradient arrives: (ids, gradients)
        self.on_tied: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def linear(
        self, rule: Linear, shared: Shared, rows: torch.Tensor, line: torch.Tensor | None, g: torch.Tensor
    ) -> None:
        for k, (start, middle, stop) in enumerate(self.spans):
            b, m = wide(g[start:stop]), middle - start
            n = stop - start
            if rule.needs_weight:
                if products.prefers_tokens(n, rows.shape[1], shared.outputs):
                    if k not in shared.kept:
                        shared.kept[k] = products.gram(_own(rows, line, start, stop), m)
                    self.values[k] += products.weigh(shared.kept[k], products.gram(b, m), n, m)
                else:
                    self.values[k] += products.matrix_products(_own(rows, line, start, stop), b, m)
            if rule.needs_bias:
                self.values[k] += products.vector_products(b[:m].sum(0), b[m:].sum(0))

    def norm(self, rule: Norm, x: torch.Tensor, g: torch.Tensor) -> None:
        for parts in rule.gradients(x, g):
            for k, (start, middle, stop) in enumerate(self.spans):
                self.values[k] += products.vector_products(parts[start:middle].sum(0), parts[middle:stop].sum(0))

    def embedding(self, rule: Embedding, ids: torch.Tensor, g: torch.Tensor) -> None:
        if rule.tied and self.on_tied is not None:
            self.on_tied(ids, g)
        for k, (start, middle, stop) in enumerate(self.spans):
            _, a, b = products.embedding_sums(ids[start:stop], g[start:stop], middle - start)
            self.values[k] += products.vector_products(a, b)


def _own(rows: torch.Tensor, line: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    """(n, i) a row's own inputs: its tokens' lines of `rows`, in float32 or wider."""
    return wide(rows[start:stop] if line is None else rows[line[start:stop]])
