"""Packed rows: many sequences in one row of tokens, a shared prefix encoded once, attention that keeps them apart.

    one row   [prompt | chosen | rejected | prompt | branch | branch | branch | ...]

Positions restart at the prefix's end for each branch. Linear layers see every token once and no 4-D mask is built;
only attention is told the layout: branch 1 attends causally over prefix + branch 1, every further branch over prefix +
itself. Registered with transformers' attention interface, so it serves every model that uses it. Which keys a query
may see (full, sliding window, chunked) is asked of the mask function that the model itself hands to the mask
interface, in each sequence's own positions. Logit soft-caps (Gemma 2) and attention sinks (GPT-OSS) are computed; any
other extra argument is refused by name (NotPackable), and the model then runs padded.

The whole row is one kernel on CUDA (passes/kernels/block_mask.py), and on a CPU with a C compiler (passes/kernels/cpu_kernels.py), proved
against the loop (passes/kernels/attention_loop.py) before its first use. Where it cannot serve, the loop runs, and `Layout.loop_reason` says
why. Elsewhere, and under a gradient, the loop is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from curate.passes.descriptions import first_line
from curate.passes.kernels import block_mask, cpu_kernels
from curate.passes.kernels.attention_loop import Extras, by_loop, current
from curate.passes.layout import Group, Item, Layout

NAME = "curate_packed"

# Arguments of the attention interface that are read, or that do not change what attention computes.
KNOWN = {
    "dropout",
    "scaling",
    "softcap",
    "s_aux",
    "sliding_window",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
}


class NotPackable(Exception):
    """This model's attention does something the packed layout does not know; the message says what."""


@contextmanager
def packed(layout: Layout) -> Iterator[None]:
    """While inside, attention registered here follows this layout."""
    token = current.set(layout)
    try:
        yield
    finally:
        current.reset(token)
        layout.masks.clear()


def register() -> None:
    """Make the packed attention known to transformers under NAME. Doing it twice does no harm."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, pattern)


def pattern(*args: Any, mask_function: Any, device: Any = "cpu", **kwargs: Any) -> torch.Tensor | None:
    """Which keys a query may see, in a sequence's own positions: None for plain causal, else (1, 1, longest, longest)
    bool; where a kernel serves, (1, 1, longest, 1) int64, the lowest position that each sees.

    `mask_function(batch, head, query, key)` is the model's own; it is evaluated on one sequence's positions, not on
    the packed row's.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return None
    longest = current.get().longest
    if _kernel(device) and (low := block_mask.window(mask_function, longest, device)) is not None:
        return low[None, None, :, None] if low.any() else None
    at = torch.arange(longest, device=device)
    allowed = torch.as_tensor(mask_function(0, 0, at[:, None], at[None, :]), device=device).expand(longest, longest)
    causal = at[:, None] >= at[None, :]
    if bool((allowed & ~causal).any()):
        raise NotPackable("attention is not causal")
    return None if bool((allowed == causal).all()) else allowed[None, None]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, N, d)
    key: torch.Tensor,  # (1, kv heads, N, d)
    value: torch.Tensor,  # (1, kv heads, N, dv)
    attention_mask: torch.Tensor | None,  # what `pattern` returned
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row, (1, N, heads, dv)."""
    layout = current.get()
    key, value = key.to(query.dtype), value.to(query.dtype)  # rotary angles in float32 make wide queries of narrow ones
    for name, argument in kwargs.items():
        if name not in KNOWN and argument is not None and not isinstance(argument, (bool, int, float, str)):
            raise NotPackable(f"attention takes '{name}'")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise NotPackable("attention is not causal")
    if query.shape[2] != len(layout.ids) or key.shape[2] != len(layout.ids):
        raise NotPackable("attention sees other tokens than the row's")
    extras = Extras(scaling, softcap, s_aux, None, layout.masks)
    low = None
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        low = attention_mask[0, 0, :, 0]
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        extras = replace(extras, pattern=attention_mask[0, 0])
    elif attention_mask is not None:
        raise NotPackable("attention has a mask of its own")
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if not graded and (kernel := _kernel(query.device)):
        reason = "its mask is no window" if extras.pattern is not None else _refusal(kernel, query, key, value, extras)
        if reason is None:
            try:
                return kernel.run(query, key, value, low, extras), None
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as problem:  # torch's compiler and Triton fail in ways of their own
                _refusals[_kind(kernel, query, key, value, extras)] = reason = (
                    f"{type(problem).__name__}: {first_line(problem)}"
                )
        layout.loop_reason = reason
    if low is not None:
        extras = replace(extras, pattern=_dense(low, layout.masks))
    return by_loop(query, key, value, extras), None


def _by_block_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, low: torch.Tensor | None, extras: Extras
) -> torch.Tensor:
    """Attention (1, N, heads, dv) on CUDA. One block mask serves every layer with the same `low`."""
    layout = current.get()
    entry = "block mask", None if low is None else low.data_ptr()
    if entry not in layout.masks:
        layout.masks[entry] = block_mask.build(layout, low, query.device), low  # low is kept: its address is the name
    mask = layout.masks[entry][0]
    output = block_mask.attend(
        query, key, value, mask, scaling=extras.scaling, softcap=extras.softcap, sinks=extras.sinks
    )
    return output.transpose(1, 2)


def _by_cpu_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, low: torch.Tensor | None, extras: Extras
) -> torch.Tensor:
    """Attention (1, N, heads, dv) on a CPU."""
    layout, kernels = current.get(), cpu_kernels.kernels()
    assert kernels is not None
    if "stretches" not in layout.masks:
        layout.masks["stretches"] = cpu_kernels.stretches_of(layout)
    scaling = query.shape[-1] ** -0.5 if extras.scaling is None else extras.scaling
    return kernels.attend(query, key, value, layout.masks["stretches"], low, scaling)


class _Kernel(NamedTuple):
    """run(query, key, value, low, extras) -> (1, N, heads, dv); refuses(query, value, extras): why not, whatever the mask."""

    run: Callable[..., torch.Tensor]
    refuses: Callable[[torch.Tensor, torch.Tensor, Extras], str | None]


_ON_CUDA = _Kernel(_by_block_mask, lambda query, value, extras: block_mask.refusal(query, value))
_ON_CPU = _Kernel(
    _by_cpu_kernel,
    lambda query, value, extras: cpu_kernels.refuses(
        query, value, extras.softcap is not None, extras.sinks is not None
    ),
)


def _kernel(device: torch.device | str) -> _Kernel | None:
    """What runs a whole packed row in one call on this device; None where there is nothing but the loop."""
    if block_mask.serves(device):
        return _ON_CUDA
    return _ON_CPU if cpu_kernels.serves(device) else None


_refusals: dict[Any, str | None] = {}  # kind of attention -> why it runs by the loop; None: the kernel was proved


def _kind(kernel: _Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras) -> Any:
    """A key for attention that behaves alike: device, dtype, shapes, scaling, soft-cap, sinks."""
    heads = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    return kernel, query.device, query.dtype, *heads, extras.scaling, extras.softcap, extras.sinks is not None


def _refusal(
    kernel: _Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras
) -> str | None:
    """Why this kind of attention runs by the loop; None when the kernel gives the loop's numbers. Tried once per
    kind, on a row of several blocks, branches and a window.
    """
    kind = _kind(kernel, query, key, value, extras)
    if kind not in _refusals:
        _refusals[kind] = kernel.refuses(query, value, extras) or _difference(kernel, query, key, value, extras)
    return _refusals[kind]


def _difference(
    kernel: _Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras
) -> str | None:
    """How far the kernel is from the loop on a row of several blocks, branches and a window, in words; None where they agree."""
    shared, alone = (np.zeros(n, np.int32) for n in (210, 330))
    trial = Layout.of([Group((Item(0, "", shared, 1),) * 3, 150), Group((Item(1, "", alone, 1),), 0)])
    generator = torch.Generator(query.device).manual_seed(0)
    q, k, v = (
        torch.randn(1, x.shape[1], len(trial.ids), x.shape[3], dtype=x.dtype, device=x.device, generator=generator)
        for x in (query, key, value)
    )
    low = (torch.arange(trial.longest, device=query.device) - 100).clamp_min(0)
    extras = replace(extras, masks=trial.masks)
    with packed(trial):
        try:
            ours = kernel.run(q, k, v, low, extras).double()
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as problem:
            return f"{type(problem).__name__}: {first_line(problem)}"
        theirs = by_loop(q, k, v, replace(extras, pattern=_dense(low, trial.masks))).double()
    error = float((ours - theirs).norm() / theirs.norm())
    close = error <= (0.02 if query.dtype in (torch.bfloat16, torch.float16) else 1e-3)  # False for NaN
    return None if close else f"the kernel differs from the loop by {error:.1e}"


def _dense(low: torch.Tensor, masks: dict[Any, Any]) -> torch.Tensor:
    """(longest, longest) bool, which keys each position sees, from `low`, the lowest one: the loop takes a mask."""
    entry = "dense", low.data_ptr()
    if entry not in masks:
        at = torch.arange(len(low), device=low.device)
        masks[entry] = (at >= low[:, None]) & (at <= at[:, None]), low
    dense: torch.Tensor = masks[entry][0]
    return dense
