"""Matrix products of a pass on a CPU, where torch's own way is slow or coarse.

float32     MKL runs AVX2 kernels on processors of other makers than its own; oneDNN, which torch ships too, has AVX-512 ones:
            2.2 times as fast on a Zen 5 core, the same numbers to rounding. A shape that it has not met costs it 0.3 to 0.8 ms once.
bfloat16    products in bfloat16, everything between them in float32: residual stream, norms, attention. A residual stream that is rounded
            at every layer is what disorders close pairs (benchmarks/README.md); to keep it costs about 8% more time.

Installed around a pass, over whatever calls the model makes (`F.linear`, embeddings, norms); the model itself is left as it is. Whether a
model takes float32 between its products is tried on the spot (loading/model.py). Passes with a backward of their own (gradients/capture.py)
call `linear` and `product` themselves. Under autograd `linear` has a first derivative, and no second one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FEW = 16  # rows; below it a product is memory traffic, and any kernel will do
SMALL = 1 << 22  # multiplications; below it oneDNN's calls cost more than its kernels save
NARROW = (torch.bfloat16, torch.float16)


class CpuProducts(TorchFunctionMode):
    """While inside, float32 `F.linear` goes through oneDNN; with `wide`, a bfloat16 model's activations are float32 and
    its products bfloat16.
    """

    def __init__(self, *, wide: bool) -> None:
        super().__init__()
        self.wide = wide

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return linear(*args, **kwargs)
        if self.wide and func in _WIDE:
            return _WIDE[func](func, *args, **kwargs)
        return func(*args, **kwargs)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(…, i) activations, (o, i) weight -> (…, o), in the weight's dtype."""
    x = x.to(weight.dtype)
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """`linear` for autograd, which does not see through oneDNN's own operator: both gradients are products as well."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        lines, (for_x, for_weight, for_bias) = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        return (
            product(lines, weight).view_as(x) if for_x else None,
            product(lines.T, x.reshape(-1, x.shape[-1])) if for_weight else None,
            lines.sum(0) if for_bias else None,
        )


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n, k) and (k, o) -> a @ b (n, o), without a gradient of its own."""
    if _suits(a, b.T) and _is_matrix(a) and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return a @ b


def _suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN is the faster one for x (…, i) times weight (o, i)ᵀ: float32 on the CPU, large enough, on such a processor."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= max(FEW * x.shape[-1], SMALL // max(1, len(weight)))
        and _is_matrix(weight)
        and one_dnn_is_faster()
    )


def _is_matrix(a: torch.Tensor) -> bool:
    """Whether (n, k) numbers lie line by line, or column by column, without overlap."""
    (n, k), (by_line, by_column) = a.shape, a.stride()
    return (by_column == 1 and by_line >= k) or (by_line == 1 and by_column >= n)


@cache
def one_dnn_is_faster() -> bool:
    """Whether this processor has AVX-512 that MKL leaves unused, and torch's oneDNN gives MKL's numbers."""
    processor = Path("/proc/cpuinfo")
    if not processor.exists() or "AuthenticAMD" not in processor.read_text():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(FEW, n, generator=generator) for n in (32, 32))
    try:
        values = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):  # an inner operator of torch: absent from some builds
        return False
    return torch.allclose(values, F.linear(x, weight), rtol=1e-4, atol=1e-4)


def _embedding(func: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    """An embedding's output, in float32 where its weights are narrow."""
    values: torch.Tensor = func(*args, **kwargs)
    return values.float() if values.dtype in NARROW else values


def _product(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A product of float32 activations with bfloat16 or float16 weights, computed in the weights' dtype."""
    kinds = {a.dtype for a in args if isinstance(a, torch.Tensor)}
    if torch.float32 in kinds and (narrow := kinds & set(NARROW)):
        to = narrow.pop()
        args = tuple(a.to(to) if isinstance(a, torch.Tensor) else a for a in args)
    return func(*args, **kwargs)


def _widest(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A norm or attention, with all its bfloat16 or float16 tensors in float32."""
    args = tuple(_wide(a) for a in args)
    return func(*args, **{name: _wide(a) for name, a in kwargs.items()})


def _wide(a: Any) -> Any:
    return a.float() if isinstance(a, torch.Tensor) and a.dtype in NARROW else a


_WIDE: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.layer_norm: _widest,
    F.rms_norm: _widest,
    F.scaled_dot_product_attention: _widest,
    torch.addmm: _product,
    torch.mm: _product,
    torch.bmm: _product,
    torch.matmul: _product,
    torch.Tensor.matmul: _product,
    torch.Tensor.__matmul__: _product,
}
