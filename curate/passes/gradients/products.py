"""Inner products of two sequences' weight gradients, from a layer's inputs and its outputs' gradients. No gradient is kept.

    A (n, i)  inputs of a linear layer        B (n, o)  gradients of logp at its outputs        W's gradient is BᵀA
    ⟨B1ᵀA1, B2ᵀA2⟩ = Σ_{t,t'} ⟨a_t, a_t'⟩⟨b_t, b_t'⟩

The n rows are two sequences, one after the other: `middle` of the first, the rest of the second. Every function gives (3,) float64, the
products first·first, first·second, second·second. Two forms, the cheaper one per layer:

    token products       tiles of AAᵀ and BBᵀ above the diagonal     n²/2·(i + o) multiplications, AAᵀ once for layers that share A
    the layer's matrix   BᵀA for blocks of outputs                   n·i·o

Products are float32 or wider; sums beyond one tile or one line are float64.
Source: Goodfellow 2015, arXiv:1510.01799 (the first form for one example).
"""

from __future__ import annotations

from itertools import pairwise

import torch

from curate.passes.kernels.cpu_products import product

TILE = 96  # rows of a tile: small enough that half of the products is really saved, large enough for the matrix kernel
BLOCK = 1 << 19  # numbers of one block of a layer's matrix: two blocks stay in the processor's cache
PER_PAIR = 32  # what weighing one pair of tokens costs, in multiplications of a matrix product
PER_ENTRY = 24  # what the three dot products cost per entry of the matrix


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def prefers_tokens(n: int, inputs: int, outputs: int) -> bool:
    """Whether token products are cheaper than matrices, for layers of one input with `outputs` outputs together."""
    pairs = n * n / 2 + n * TILE / 2
    return pairs * (inputs + outputs + PER_PAIR) < n * inputs * outputs + PER_ENTRY * inputs * outputs


def tiles(n: int, middle: int) -> list[tuple[int, int]]:
    """Ranges (first, end) of about TILE tokens, none of them across the middle, where the second sequence begins."""
    cuts = []
    for start, stop in ((0, middle), (middle, n)):
        if stop > start:
            count = max(1, round((stop - start) / TILE))
            cuts += [start + (stop - start) * k // count for k in range(count)]
    cuts.append(n)
    return list(pairwise(cuts))


def gram(x: torch.Tensor, middle: int) -> list[torch.Tensor]:
    """(n, k) -> the tiles of xxᵀ from the diagonal rightwards, (rows, n − first row) each."""
    return [product(x[start:stop], x[start:].T) for start, stop in tiles(len(x), middle)]


def weigh(a: list[torch.Tensor], b: list[torch.Tensor], n: int, middle: int) -> torch.Tensor:
    """(3,) float64 from the tiles of two grams: Σ a∘b over each of the three blocks."""
    sums = torch.zeros(3, dtype=torch.float64, device=a[0].device)
    for (start, stop), x, y in zip(tiles(n, middle), a, b):
        lines = (x * y).sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).double()  # (n − start,)
        own, end = stop - start, (middle if start < middle else n) - start
        sums[0 if start < middle else 2] += lines[:own].sum() + 2 * lines[own:end].sum()
        sums[1] += lines[end:].sum()
    return sums


def matrix_products(a: torch.Tensor, b: torch.Tensor, middle: int) -> torch.Tensor:
    """(n, i) and (n, o) -> (3,) float64, by the layer's matrix, a block of outputs at a time."""
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    step = max(1, BLOCK // a.shape[1])
    for start in range(0, b.shape[1], step):
        part = b[:, start : start + step]
        first = product(part[:middle].T, a[:middle])  # (step, i)
        sums[0] += dot(first, first)
        if middle < len(a):
            second = product(part[middle:].T, a[middle:])
            sums[1] += dot(first, second)
            sums[2] += dot(second, second)
    return sums


def vector_products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(3,) float64 from the two sequences' gradients themselves, of any shape (norms, biases)."""
    x, y = first.double().flatten(), second.double().flatten()
    return torch.stack([x @ x, x @ y, y @ y])


def embedding_sums(ids: torch.Tensor, b: torch.Tensor, middle: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n,) ids, (n, d) -> the k different ids, and each sequence's sum of gradients per id, (k, d) twice, in b's own dtype."""
    distinct, line = torch.unique(ids, return_inverse=True)
    sums = [b.new_zeros(len(distinct), b.shape[1]) for _ in range(2)]
    sums[0].index_add_(0, line[:middle], b[:middle])
    sums[1].index_add_(0, line[middle:], b[middle:])
    return distinct, sums[0], sums[1]


def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Σ x∘y of two matrices: a line in float32 or wider, then float64."""
    return (x * y).sum(1).double().sum()
