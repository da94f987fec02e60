"""Attention of a packed row in one kernel on CUDA: torch's flex_attention with a block mask, compiled once.

Token q of a packed row (passes/kernels/attention.py) sees at most two stretches of the row, both ending at or before q:

    first[q] <= k < end[q]      its group's prefix, as far back as its window reaches   (empty in a first branch, which
    own[q] <= k <= q            its own branch                                           lies right behind its prefix)

Three numbers a token say it all, window included: which blocks of 128 × 128 are empty, full or partial is read off
them, an N × N mask is never built. The mask is made once per layout and kind of layer. Rows are filled up to whole
blocks, at least two, and the number of blocks is the one dynamic size: a kernel is compiled once per model, not per
batch. Grouped key heads, soft-caps (score_mod) and sinks (from the log-sum-exp) are in the kernel.

Why not torch.nn.attention.varlen: half precision only, no soft-caps, and every branch would need its own copy of the
prefix's keys. What this kernel cannot serve runs through the loop of passes/kernels/attention_loop.py, and says so.

Checked on the CPU against that loop, uncompiled; that one program serves all batches is checked up to the code
generator (torch 2.13's for the CPU compiles it with static sizes, and rightly, but not with a dynamic one). It has never
run on CUDA: no GPU was at hand. Therefore each kind of attention is compared with the loop on the spot before its first use there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from curate.passes.layout import Layout

BLOCK = 128
SMALLEST_HEAD = 16  # of flex_attention on CUDA

Mask = tuple[torch.Tensor, ...]  # (M,) first, end, own; then number and indices of partial and of full key blocks


def serves(device: torch.device | str) -> bool:
    """Whether this device runs packed rows through the block mask."""
    return torch.device(device).type == "cuda"


def refusal(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why this attention cannot run here whatever the mask; None when it may."""
    if query.dtype == torch.float64:
        return "float64"
    if query.is_cuda and min(query.shape[-1], value.shape[-1]) < SMALLEST_HEAD:
        return f"head size {min(query.shape[-1], value.shape[-1])} is below {SMALLEST_HEAD}"
    return None


def window(
    mask_function: Callable[..., Any], longest: int, device: torch.device | str, *, rows: int = 1024
) -> torch.Tensor | None:
    """(longest,) int64: the lowest position that each position sees, where every position sees all from there to
    itself (full, sliding and chunked attention do). None where the pattern is another. Read in bands of `rows`.
    """
    at = torch.arange(longest, device=device)
    low = []
    for own in at.split(rows):
        allowed = torch.as_tensor(mask_function(0, 0, own[:, None], at[None, :]), device=device)
        allowed = allowed.expand(len(own), longest)
        low.append(allowed.int().argmax(1))  # the first that is seen
        if not torch.equal(allowed, (at[None, :] >= low[-1][:, None]) & (at[None, :] <= own[:, None])):
            return None
    return torch.cat(low)


def build(layout: Layout, low: torch.Tensor | None, device: torch.device) -> Mask:
    """The mask of one packed row on `device`; `low` is what `window` returned, None for full attention."""
    ranges = key_ranges(layout, None if low is None else low.cpu().numpy())
    keys = [torch.from_numpy(numbers).to(device) for numbers in ranges]  # not views of one: the compiler takes none
    partial, full = key_blocks(*keys)
    return (*keys, *_listed(partial), *_listed(full))


def key_ranges(layout: Layout, low: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """(M,) int32 each, M whole blocks: first, end and own of every token. Tokens that fill up the row see themselves."""
    n_tokens = len(layout.positions)
    blocks = max(2, -(-n_tokens // BLOCK))  # one block alone would be compiled as a size of its own
    first, end = np.zeros((2, blocks * BLOCK), np.int32)
    own = np.arange(blocks * BLOCK, dtype=np.int32)
    behind = np.zeros(n_tokens, np.int64) if low is None else low[layout.positions]
    for offset, p, branches in layout.segments:
        at = offset + p + branches[0]
        own[offset:at] = offset + behind[offset:at]
        for n in branches[1:]:
            branch = slice(at, at + n)
            first[branch], end[branch] = offset + behind[branch], offset + p
            own[branch] = at + np.maximum(behind[branch] - p, 0)
            at += n
    return first, end, own


def key_blocks(first: torch.Tensor, end: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(query blocks, key blocks) bool, twice: seen in part, and seen wholly by every query of the block."""
    first, end, own = first[:, None], end[:, None], own[:, None]  # (M, 1)
    stop = torch.arange(1, len(own) + 1, device=own.device)[:, None]
    a = torch.arange(0, len(own), BLOCK, device=own.device)  # (key blocks,): keys a to b - 1
    b = a + BLOCK
    some = (torch.maximum(first, a) < torch.minimum(end, b)) | (torch.maximum(own, a) < torch.minimum(stop, b))
    whole = ((first <= a) & (end >= b)) | ((own <= a) & (stop >= b))
    some, whole = (seen.unflatten(0, (-1, BLOCK)) for seen in (some, whole))
    full = whole.all(1)
    return some.any(1) & ~full, full


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row has, and which come first: (1, 1, n) and (1, 1, n, n) int32, as flex_attention wants."""
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()


def attend(
    query: torch.Tensor,  # (1, heads, N, d)
    key: torch.Tensor,  # (1, kv heads, N, d)
    value: torch.Tensor,  # (1, kv heads, N, dv)
    mask: Mask,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # (heads,)
) -> torch.Tensor:
    """Attention of one packed row, (1, heads, N, dv); compiled where the tensors are on CUDA."""
    missing = mask[0].shape[0] - query.shape[2]
    # contiguous whether filled up or not: other strides would be another program
    inputs = [torch.nn.functional.pad(x, (0, 0, 0, missing)).contiguous() for x in (query, key, value)]
    kernel = _kernel(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks is not None, query.is_cuda)
    out, lse = kernel(*inputs, *mask)
    if sinks is not None:  # one more term in the softmax's denominator, and nothing to add to its numerator
        out = out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)
    return out[:, :, : query.shape[2]]


@functools.cache
def _kernel(scaling: float, softcap: float | None, with_lse: bool, compiled: bool) -> Callable[..., Any]:
    """flex_attention over one kind of layer: (out, log-sum-exp or None). Its mask comes as tensors alone, so that a new
    batch is no new program.
    """
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    def cap(score: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    def attention(
        query: torch.Tensor,  # (1, heads, M, d)
        key: torch.Tensor,
        value: torch.Tensor,
        first: torch.Tensor,  # (M,)
        end: torch.Tensor,
        own: torch.Tensor,
        n_partial: torch.Tensor,  # (1, 1, blocks), then (1, 1, blocks, blocks)
        partial: torch.Tensor,
        n_full: torch.Tensor,
        full: torch.Tensor,
    ) -> Any:
        def seen(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
            return ((k >= first[q]) & (k < end[q])) | ((k >= own[q]) & (k <= q))

        size = query.shape[2]
        mask = BlockMask.from_kv_blocks(
            n_partial, partial, n_full, full, BLOCK, seen, seq_lengths=(size, size), compute_q_blocks=False
        )
        result: Any = flex_attention(
            query,
            key,
            value,
            score_mod=cap if softcap else None,
            block_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True) if with_lse else None,
        )
        return (result[0], result[1].lse) if with_lse else (result, None)

    if not compiled:
        return attention
    program = torch.compile(attention, fullgraph=True)  # fullgraph: an error rather than a silent N × N fallback

    def run(*tensors: torch.Tensor) -> Any:
        for tensor, sizes in zip(tensors, (2, 2, 2, 0, 0, 0, 2, (2, 3), 2, (2, 3)), strict=True):
            torch._dynamo.mark_dynamic(tensor, sizes)
        return program(*tensors)

    return run
