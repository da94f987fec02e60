"""Where a graph keeps its activations: what sequences share is kept once, and apart from what comes and goes.

Tensors that a backward needs outlive those of the forward between which they were made; side by side in one heap they leave holes that no later
tensor fits, half as much again as the graph. Here they are copied into chunks that the system takes back whole, at most one line per different
token (a prompt that two responses share is computed for each, since gradients differ, but its values do not). What comes and goes leaves holes of
its own, since an aligned tensor does not fit the hole of its like: they are given back with every chunk, at about an eighth of the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

CHUNK = 96 << 20  # bytes; beyond what an allocator keeps for itself
SMALL = 1 << 16  # bytes; smaller tensors stay where they are
REMEMBERED = 3  # tensors of which one step after another keeps a copy


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, which returns freed memory to the system; None where the process uses another allocator."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return None


def give_back() -> None:
    """Return freed memory to the system, which the allocator would otherwise keep for later."""
    if trim := _malloc_trim():
        trim(0)


class Arena:
    """The memory in which one graph keeps its activations, in large chunks. first (U,), line (N,): as in Capture; None where no tokens are shared."""

    def __init__(self, n_tokens: int, first: torch.Tensor | None, line: torch.Tensor | None) -> None:
        self.n_tokens, self.first, self.line = n_tokens, first, line
        self._chunks: dict[torch.dtype, torch.Tensor] = {}
        self._recent: list[tuple[torch.Tensor, int, torch.Tensor]] = []

    def keeping(self) -> AbstractContextManager[Any]:
        """While inside, the large (1, N, …) tensors that autograd saves for the backward are copied into the arena, a line per different token."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def distinct(self, x: torch.Tensor) -> torch.Tensor:
        """The (U, k) different rows of x (N, k), copied into a chunk."""
        rows = len(x) if self.first is None else len(self.first)
        kept = self._take((rows, *x.shape[1:]), x.dtype, x.device)
        return kept.copy_(x) if self.first is None else torch.index_select(x, 0, self.first, out=kept)

    def _pack(self, x: torch.Tensor) -> Any:
        """What autograd saves of a tensor: its copy in the arena, or the tensor itself where it is small or of another shape."""
        if x.ndim < 3 or x.shape[:2] != (1, self.n_tokens) or not x.is_contiguous() or x.nbytes < SMALL:
            return x
        for source, version, kept in self._recent:
            if source.data_ptr() == x.data_ptr() and source.shape == x.shape and version == x._version:
                return self, kept
        with torch.no_grad():
            kept = self.distinct(x.detach()[0])
        self._recent = [*self._recent[-REMEMBERED + 1 :], (x, x._version, kept)]
        return self, kept

    def _unpack(self, packed: Any) -> torch.Tensor:
        """The tensor that `_pack` was given, shared lines repeated again."""
        if isinstance(packed, torch.Tensor):
            return packed
        kept: torch.Tensor = packed[1]
        return (kept if self.line is None else kept[self.line])[None]

    def close(self) -> None:
        """Drop the arena's own references, so that each chunk is freed with the last saved tensor in it."""
        self._chunks.clear()
        self._recent.clear()
        give_back()

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An empty tensor of this shape from the current chunk, or from a new one where it does not fit."""
        size = 1
        for n in shape:
            size *= n
        step = -(-size // 64) * 64
        left = self._chunks.get(dtype)
        if left is None or len(left) < size:
            give_back()
            left = torch.empty(max(step, CHUNK // dtype.itemsize), dtype=dtype, device=device)
        self._chunks[dtype] = left[step:]
        return left[:size].view(shape)
