"""Attention of a packed row, branch by branch: what the kernels are proved against, and what runs where none serves or under a gradient.

Branch 1 attends causally over prefix + branch 1, every further branch over prefix + itself; some queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from curate.passes.layout import Layout

QUERY_BLOCK = 64  # queries per attention call on the CPU, whose kernel does not skip the upper triangle by itself
current: ContextVar[Layout] = ContextVar("packed_layout")


def by_loop(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras) -> torch.Tensor:
    """Attention (1, N, heads, dv) of the packed row whose layout is `current`, computed branch by branch."""
    layout = current.get()
    if query.shape[1] != key.shape[1] and (extras.pattern is not None or extras.softcap or extras.sinks is not None):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    pieces: list[torch.Tensor] = []  # (1, n, heads, dv) each, in the row's order
    for offset, p, branches in layout.segments:
        at = offset + p
        for i, n in enumerate(branches):
            if i == 0:  # prefix and first branch lie side by side
                own = slice(offset, at + n)
                k, v = key[:, :, own], value[:, :, own]
            elif p:
                own = slice(at, at + n)
                k = torch.cat([key[:, :, offset : offset + p], key[:, :, own]], 2)
                v = torch.cat([value[:, :, offset : offset + p], value[:, :, own]], 2)
            else:
                own = slice(at, at + n)
                k, v = key[:, :, own], value[:, :, own]
            if own.stop > own.start:
                pieces += _tail(query[:, :, own], k, v, extras)
            at += n
    return torch.cat(pieces, 1)


@dataclass(frozen=True, slots=True)
class Extras:
    """What attention takes beside queries, keys and values. masks: those that were built already for this row."""

    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None  # (heads,)
    pattern: torch.Tensor | None  # (longest, longest) bool
    masks: dict[Any, Any]


def _tail(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras) -> Iterator[torch.Tensor]:
    """Causal attention of the last q.shape[2] positions of a sequence over all its k.shape[2] positions: (1, n, heads, dv), some queries at
    a time.
    """
    n, total = q.shape[2], k.shape[2]
    before = total - n
    manual = extras.softcap is not None or extras.sinks is not None
    if q.is_cuda and extras.pattern is None and not manual:
        yield _tail_on_cuda(q, k, v, extras.scaling).transpose(1, 2)
        return
    gqa = q.shape[1] != k.shape[1]
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        end = before + stop  # keys beyond the last query of the block are all masked
        if extras.pattern is None:
            mask = _causal_band(before + start, stop - start, end, q, extras.masks)
        else:
            mask = _additive(extras.pattern[before + start : end, :end], q)
        block = q[:, :, start:stop], k[:, :, :end], v[:, :, :end]
        if manual:
            output = _eager_attention(*block, mask, extras)
        else:
            output = scaled_dot_product_attention(*block, attn_mask=mask, scale=extras.scaling, enable_gqa=gqa)
        yield output.transpose(1, 2)


def _causal_band(start: int, n: int, end: int, like: torch.Tensor, masks: dict[Any, Any]) -> torch.Tensor:
    """(n, end), 0 or −∞: query i, at position start + i, sees keys 0..start + i. A window of one band kept per row, not
    built each time.
    """
    band = masks.get(("band", like.dtype))
    if band is None or band.shape[1] - QUERY_BLOCK < start:
        width = max(start, current.get().longest)
        at = torch.arange(width + QUERY_BLOCK, device=like.device)
        band = masks["band", like.dtype] = _additive(at[None, :] <= at[width:, None], like)
    width = band.shape[1] - QUERY_BLOCK
    return band[:n, width - start : width - start + end]


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask that is added to scores: 0 where a key is seen, −∞ elsewhere. torch would turn a bool mask into this at every call."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, float("-inf"))


def _tail_on_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """`_tail` on CUDA, in one call: torch's kernels skip there what a causal mask hides."""
    gqa = q.shape[1] != k.shape[1]
    if q.shape[2] == k.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
    from torch.nn.attention.bias import causal_lower_right

    mask: Any = causal_lower_right(q.shape[2], k.shape[2])
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=gqa)


def _eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, extras: Extras
) -> torch.Tensor:
    """What transformers' eager attention computes, with soft-cap and sinks; softmax in float32 or wider."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if extras.scaling is None else extras.scaling)
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    scores = scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    if extras.sinks is not None:
        sinks = extras.sinks.reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1).to(scores.dtype)
        weights = torch.softmax(torch.cat([scores, sinks], -1).to(wide), -1)[..., :-1]
    else:
        weights = torch.softmax(scores.to(wide), -1)
    return weights.to(v.dtype) @ v
