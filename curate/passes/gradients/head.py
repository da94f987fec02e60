"""The LM head's backward by blocks of the vocabulary: log-probabilities, their gradients at the states, and the head's own inner products.

    q = π − onehot(y), times the head's scale and the soft-cap's slope          per token, over the vocabulary
    ∂ log π(y)/∂h = −q W          ∂ log π(y)/∂W = −q hᵀ          ∂ log π(y)/∂b = −q

Where tokens × vocabulary is small, the logits are computed once and kept; otherwise twice, a block of the vocabulary in memory at a time. 1 − π
is computed from log π, so that the residual of a memorised token (π near 1) keeps its digits.
Source: the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import softplus

from curate.passes.gradients import products as inner_products
from curate.passes.gradients.products import wide
from curate.passes.head import ROWS, Head
from curate.passes.kernels.cpu_products import product

KEEP = 96 << 20  # bytes of logits kept between the two sweeps
KEEP_ON_GPU = 1 << 30


@dataclass(frozen=True)
class HeadGradient:
    """logp, lse: (N,) float64, log π(y) and log Σ exp z of each token. slope: (N, d), ∂ log π(y)/∂h. products: (rows, 3) float64, ⟨g1, g1⟩, ⟨g1, g2⟩,
    ⟨g2, g2⟩ of the head's own gradients of a row's two responses.
    """

    logp: torch.Tensor
    lse: torch.Tensor
    slope: torch.Tensor
    products: torch.Tensor


Each = Callable[[tuple[int, int], slice, torch.Tensor], None]


def head_gradient(
    head: Head,
    states: torch.Tensor,
    tokens: torch.Tensor,
    spans: list[tuple[int, int, int]],
    *,
    products: bool = True,
    each: Each | None = None,
) -> HeadGradient:
    """states (N, d) that predict tokens (N,). spans: per row, first token of its first response, of its second, and the end; they cover N
    in order. products=False leaves the head's own gradients out (zeros). each: gets (first token, end), a block of the vocabulary and q there,
    for whole rows at a time; q is overwritten afterwards.
    """
    limit = (KEEP_ON_GPU if states.is_cuda else KEEP) // (len(head.weight) * wide(states[:0]).element_size())
    parts, group = [], list(spans[:1])
    for span in spans[1:]:  # rows together while their logits can be kept: the weights are read once for all of them
        if span[2] - group[0][0] > limit:
            parts.append(_gradient_of_rows(head, states, tokens, group, products, limit, each))
            group = []
        group.append(span)
    parts.append(_gradient_of_rows(head, states, tokens, group, products, limit, each))
    return HeadGradient(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("logp", "lse", "slope", "products"))
    )


def head_backward(
    head: Head,
    states: torch.Tensor,
    tokens: torch.Tensor,
    ends: list[int],
    weigh: Callable[[int, int, torch.Tensor], torch.Tensor],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    slope: bool = True,
) -> torch.Tensor:
    """The head's part of the backward of Σ_t w_t log π(y_t): its own gradient is added to weight (V, d) and bias (V,), where they are given; what
    comes back is ∂/∂h, (N, d), or (0, d) without slope.

    states (N, d) predict tokens (N,). ends: where each row's tokens end; rows stay together. weigh(first, stop, logp) gives the weights (n,) of
    the tokens of rows first..stop, from their log-probabilities, both float64.
    """
    limit = (KEEP_ON_GPU if states.is_cuda else KEEP) // (len(head.weight) * wide(states[:0]).element_size())
    slopes = [wide(states[:0])]
    row = start = 0
    while row < len(ends):
        stop_row = row + 1
        while stop_row < len(ends) and ends[stop_row] - start <= limit:
            stop_row += 1
        stop = ends[stop_row - 1]
        h, y = states[start:stop], tokens[start:stop]
        room = (
            torch.empty(len(h) * len(head.weight), dtype=slopes[0].dtype, device=h.device) if len(h) <= limit else None
        )
        logp, lse = _log_probabilities(head, h, y, room)
        w = weigh(row, stop_row, logp)[:, None].to(slopes[0].dtype)  # (n, 1)
        row_slopes = torch.zeros_like(wide(h)) if slope else slopes[0]
        for block in head.blocks():
            z = _logits(head, h, block) if room is None else _place(room, len(h), block)
            q = _residuals(head, z, y, logp, lse, block).mul_(w)
            if weight is not None:
                weight[block].addmm_(q.T, wide(h).to(q.dtype), alpha=-1)
            if bias is not None:
                bias[block] -= q.sum(0)
            for i in range(0, len(h) if slope else 0, ROWS):
                row_slopes[i : i + ROWS] -= product(q[i : i + ROWS].to(head.weight.dtype), head.weight[block])
        slopes.append(row_slopes)
        row, start = stop_row, stop
    return torch.cat(slopes)


def _gradient_of_rows(
    head: Head,
    states: torch.Tensor,
    tokens: torch.Tensor,
    spans: list[tuple[int, int, int]],
    products: bool,
    limit: int,
    each: Each | None,
) -> HeadGradient:
    """`head_gradient` of rows that are processed together: their logits are kept where their tokens are at most `limit`."""
    start, stop = spans[0][0], spans[-1][2]
    h, y = states[start:stop], tokens[start:stop]
    size = len(head.weight)
    kept = torch.empty(len(h) * size, dtype=wide(h[:0]).dtype, device=h.device) if len(h) <= limit else None
    logp, lse = _log_probabilities(head, h, y, kept)
    slope = torch.zeros_like(wide(h))
    sums = [_Row(head, h, a - start, b - start, c - start) for a, b, c in spans] if products else []
    for block in head.blocks():
        z = _logits(head, h, block) if kept is None else _place(kept, len(h), block)
        q = _residuals(head, z, y, logp, lse, block)
        weight = head.weight[block]
        for i in range(0, len(h), ROWS):
            slope[i : i + ROWS] -= product(q[i : i + ROWS].to(weight.dtype), weight)
        for row in sums:
            row.add(q)
        if each is not None:
            each((start, stop), block, q)
    del kept
    row_products = (
        torch.stack([row.products() for row in sums]) if sums else slope.new_zeros(len(spans), 3, dtype=torch.float64)
    )
    return HeadGradient(logp, lse, slope, row_products)


def _place(kept: torch.Tensor, n: int, block: slice) -> torch.Tensor:
    """(n, width) view of a block's logits in `kept`, the flat buffer of all logits of n tokens."""
    return kept[n * block.start : n * block.stop].view(n, -1)


def _logits(head: Head, h: torch.Tensor, block: slice) -> torch.Tensor:
    """(N, width) logits of a block of the vocabulary, computed ROWS states at a time so that they stay in the processor's cache."""
    pieces = [head.logits(h[i : i + ROWS], block) for i in range(0, len(h), ROWS)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _log_probabilities(
    head: Head, h: torch.Tensor, y: torch.Tensor, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(y) and log Σ exp z, (N,) float64 each. As in passes/head.py the target's logit is kept apart from the others. kept: a flat buffer that is
    filled with all logits, or None.
    """
    own = head.target(h, y)
    best = torch.full_like(own, float("-inf"))
    total = torch.zeros_like(own)  # Σ_{v≠y} exp(z_v − best)
    for block in head.blocks():
        for i in range(0, len(h), ROWS):
            rows = slice(i, i + ROWS)
            z = head.logits(h[rows], block)
            if kept is not None:
                _place(kept, len(h), block)[rows] = z
            inside = ((y[rows] >= block.start) & (y[rows] < block.stop)).nonzero()[:, 0]
            z[inside, y[rows][inside] - block.start] = float("-inf")
            new = torch.maximum(best[rows], z.amax(1).double())
            shift = new.clamp_min(torch.finfo(z.dtype).min).to(z.dtype)
            shrink = torch.where(total[rows] > 0, torch.exp(best[rows] - new), torch.zeros_like(new))
            total[rows] = total[rows] * shrink + z.sub_(shift[:, None]).exp_().sum(1).double()
            best[rows] = new
    others = best + total.log()
    return -softplus(others - own), torch.logaddexp(others, own)


def _residuals(
    head: Head, z: torch.Tensor, y: torch.Tensor, logp: torch.Tensor, lse: torch.Tensor, block: slice
) -> torch.Tensor:
    """(N, width) q = π − onehot(y) of a block of the vocabulary, times scale and soft-cap's slope. z: the block's logits, which are overwritten."""
    slope = None if head.cap is None else 1 - (z / head.cap) ** 2
    q = z.sub_(lse[:, None].to(z.dtype)).exp_()
    inside = ((y >= block.start) & (y < block.stop)).nonzero()[:, 0]
    q[inside, y[inside] - block.start] = torch.expm1(logp[inside]).to(q.dtype)
    if slope is not None:
        q *= slope
    return q.mul_(head.scale) if head.scale != 1.0 else q


class _Row:
    """The head's inner products of one row's two responses, summed block by block of the vocabulary in the cheaper of the two forms (products.py)."""

    def __init__(self, head: Head, h: torch.Tensor, start: int, middle: int, stop: int) -> None:
        self.span, self.middle = slice(start, stop), middle - start
        self.states = wide(h[start:stop])
        self.bias = head.bias is not None
        self.by_tokens = inner_products.prefers_tokens(len(self.states), h.shape[1], len(head.weight))
        self.tiles: list[torch.Tensor] = []
        self.sums = torch.zeros(3, dtype=torch.float64, device=h.device)

    def add(self, q: torch.Tensor) -> None:
        """Add a block of the vocabulary. q: (N, width), of all rows."""
        q = q[self.span]
        if not self.by_tokens:
            self.sums += inner_products.matrix_products(self.states, q, self.middle)
            if self.bias:
                self.sums += inner_products.vector_products(q[: self.middle].sum(0), q[self.middle :].sum(0))
            return
        gram = [tile.double() for tile in inner_products.gram(q, self.middle)]
        self.tiles = [a.add_(b) for a, b in zip(self.tiles, gram)] if self.tiles else gram

    def products(self) -> torch.Tensor:
        """(3,) float64 ⟨g1, g1⟩, ⟨g1, g2⟩, ⟨g2, g2⟩, after the last block."""
        if not self.by_tokens:
            return self.sums
        overlap = [tile.double() + self.bias for tile in inner_products.gram(self.states, self.middle)]
        return inner_products.weigh(overlap, self.tiles, len(self.states), self.middle)


def tied_products(
    head: Head,
    states: torch.Tensor,
    tokens: torch.Tensor,
    logp: torch.Tensor,
    lse: torch.Tensor,
    middle: int,
    ids: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """(3,) float64: for a matrix that is head and embedding at once, the cross terms between its two uses, of one row.

    states (n, d) predict tokens (n,), the first `middle` of the first sequence; sums: each sequence's gradients per embedded id, (k, d).
    """
    q = -residuals_at(head, states, tokens, logp, lse, ids)  # (n, k)
    meet = [(wide(states) @ wide(s).T * q).double().sum(1) for s in sums]  # each (n,)
    sums_by_part = [[part.sum() for part in (m[:middle], m[middle:])] for m in meet]  # [embedded in][head of]
    return torch.stack([2 * sums_by_part[0][0], sums_by_part[1][0] + sums_by_part[0][1], 2 * sums_by_part[1][1]])


def residuals_at(
    head: Head,
    states: torch.Tensor,
    tokens: torch.Tensor,
    logp: torch.Tensor,
    lse: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """(n, k) q of (n, d) states at k different ids of the vocabulary."""
    some = replace(head, weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids])
    q = some.logits(states)
    slope = None if head.cap is None else 1 - (q / head.cap) ** 2
    q = (q - lse[:, None].to(q.dtype)).exp()
    q = torch.where(tokens[:, None] == ids[None, :], torch.expm1(logp)[:, None].to(q.dtype), q)
    return q * head.scale if slope is None else q * slope * head.scale
