"""Inner products of residual–state products, RᵀH, without storing anything of tokens × vocabulary.

    ⟨RᵀH, R'ᵀH'⟩ = Σ_v ⟨(RᵀH)_v, (R'ᵀH')_v⟩ = Σ_{t,t'} ⟨r_t, r'_t'⟩ ⟨h_t, h'_t'⟩

The vocabulary goes by in blocks. Per block either the (width, d) product is made, or the (T, T') products of residuals are gathered: the
second is cheaper while T+ < d. Blocks are float32 or wider, sums over blocks float64.
"""

from __future__ import annotations

import torch

from curate.passes.batch import Side
from curate.passes.head import Head
from curate.passes.kernels.cpu_products import product


def residual_products(head: Head, chosen: Side, rejected: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows,) ‖R+ᵀH+‖² and (rows,) ⟨R+ᵀH+, R−ᵀH−⟩, float64. Needs the sides' `logp` and `lse`."""
    rows = []
    c_states, r_states = _wide(chosen.states), _wide(rejected.states)
    c_ends, r_ends = chosen.lengths.long().cumsum(0).tolist(), rejected.lengths.long().cumsum(0).tolist()
    c_stats, r_stats = (chosen.logp, chosen.lse), (rejected.logp, rejected.lse)
    c0 = r0 = 0
    for c1, r1 in zip(c_ends, r_ends):
        states = torch.cat([c_states[c0:c1], r_states[r0:r1]])  # (n, d)
        tokens = torch.cat([chosen.tokens[c0:c1], rejected.tokens[r0:r1]])
        logp, lse = (torch.cat([c[c0:c1], r[r0:r1]]) for c, r in zip(c_stats, r_stats))
        rows.append(_one_pair(head, states, tokens, logp, lse, c1 - c0))
        c0, r0 = c1, r1
    products = torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64)
    return products[:, 0], products[:, 1]


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _one_pair(
    head: Head, states: torch.Tensor, tokens: torch.Tensor, logp: torch.Tensor, lse: torch.Tensor, n_chosen: int
) -> torch.Tensor:
    """(2,) float64 of one pair: ‖R+ᵀH+‖² and ⟨R+ᵀH+, R−ᵀH−⟩. states: (n, d), the chosen response's n_chosen first, then the rejected one's."""
    n, d = states.shape
    gather = n_chosen < d
    products = states.new_zeros(n_chosen, n, dtype=torch.float64)  # Σ_v r r'
    sums = states.new_zeros(2, dtype=torch.float64)
    for block in head.blocks():
        r = residuals(head, states, tokens, logp, lse, block)  # (n, width)
        if gather:
            products += product(r[:n_chosen], r.T).double()
        else:
            c = product(r[:n_chosen].T, states[:n_chosen])  # (width, d)
            o = product(r[n_chosen:].T, states[n_chosen:])
            sums += torch.stack([_dot(c, c), _dot(c, o)])
            if head.bias is not None:
                c, o = r[:n_chosen].sum(0), r[n_chosen:].sum(0)
                sums += torch.stack([_dot(c, c), _dot(c, o)])
    if gather:
        overlap = (states[:n_chosen] @ states.T).double() + (head.bias is not None)  # ⟨h, h'⟩, and the bias' input of 1
        weighted = products * overlap
        return torch.stack([weighted[:, :n_chosen].sum(), weighted[:, n_chosen:].sum()])
    return sums


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(dtype=torch.float64)


def residuals(
    head: Head, states: torch.Tensor, tokens: torch.Tensor, logp: torch.Tensor, lse: torch.Tensor, block: slice
) -> torch.Tensor:
    """(n, width) ∂ log π(y) / ∂(W h) over one block of the vocabulary: onehot − π, times scale and the soft-cap's slope."""
    z = head.logits(states, block)
    pi = torch.exp(z - lse[:, None].to(z.dtype))
    inside = ((tokens >= block.start) & (tokens < block.stop)).nonzero()[:, 0]
    pi[inside, tokens[inside] - block.start] = torch.expm1(logp[inside]).to(z.dtype)  # π − 1, exact where π is near 1
    r = pi.neg_()
    if head.cap is not None:
        r = r * (1 - (z / head.cap) ** 2)
    return r.mul_(head.scale) if head.scale != 1.0 else r
