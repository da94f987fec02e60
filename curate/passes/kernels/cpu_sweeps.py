"""RMS norms, rotary angles and gated units of a pass on a CPU in one sweep each, not torch's five, seven and two (cpu_kernels.c).

Norm modules are known by their shape, MLPs by their parts' names, rotary functions by their name and arguments; each kind is then tried on the
spot and taken only where the kernel gives its own numbers. Around passes without gradients; what else comes to them meanwhile (other dtypes,
batches, devices) runs as it did.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from curate.passes.kernels.cpu_kernels import Kernels
from curate.passes.kernels.cpu_products import NARROW

ROTARY = "apply_rotary_pos_emb"
CLOSE = 1e-5  # relative to the norm of each row


class Sweeps:
    """The parts of a model that run in one sweep. norms, gates: by module. rotary: the Python modules whose `apply_rotary_pos_emb` is replaced."""

    def __init__(self, module: nn.Module, kernels: Kernels) -> None:
        self.kernels = kernels
        candidates = [Norm(part, kernels) for part in module.modules() if _looks_like_a_norm(part)]
        self.norms = [norm for norm in candidates if norm.one is not None]
        self.gates = _gates(module, kernels)
        homes = {id(home): home for part in module.modules() if hasattr(home := _home(part), ROTARY)}
        self.rotary = [home for home in homes.values() if _turns_halves(getattr(home, ROTARY), kernels)]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While inside, these parts run through the kernels. Not for passes with gradients."""
        own: list[Norm | Gate] = [*self.norms, *self.gates]
        parts = [part for part in own if not _altered(part.module)]
        functions = [(home, f) for home in self.rotary if not isinstance(f := getattr(home, ROTARY), Rotary)]
        try:
            for part in parts:
                part.module.forward = part
            for home, function in functions:
                setattr(home, ROTARY, Rotary(function, self.kernels))
            yield
        finally:
            for part in parts:
                part.module.__dict__.pop("forward", None)
            for home, function in functions:
                setattr(home, ROTARY, function)


class Norm:
    """The forward of an RMS norm. one: 1 where it multiplies with 1 + weight (Gemma), else 0; None: it is no RMS norm."""

    def __init__(self, module: nn.Module, kernels: Kernels) -> None:
        self.module, self.original, self.kernels = module, module.forward, kernels
        names = ("variance_epsilon", "eps", "norm_eps", "epsilon")
        self.eps = float(next((e for name in names if (e := getattr(module, name, None)) is not None), 0.0))
        self.one: float | None = None
        for one in (0.0, 1.0):
            if self._gives_its_numbers(one):
                self.one = one

    def __call__(self, x: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        module: Any = self.module
        weight = module.weight.float() + self.one  # its own gradient may be asked for, too
        fits = _is_plain_float32(x) and _is_plain_float32(weight) and x.is_contiguous() and x.shape[-1:] == weight.shape
        if others or more or not fits:
            return self.original(x, *others, **more)
        return self.kernels.rms_norm(x, weight, self.eps)

    @torch.no_grad()
    def _gives_its_numbers(self, one: float) -> bool:
        """Whether the kernel gives this module's numbers, tried on a copy with random weights. The module's hooks are not called."""
        generator = torch.Generator().manual_seed(0)
        try:
            twin: Any = copy.copy(self.module)
            weight = torch.randn(twin.weight.shape, generator=generator).to(twin.weight)
            twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
            x = torch.randn(6, len(weight), generator=generator)
            x = x * torch.logspace(-4, 3, 6)[:, None]  # small ones, where eps matters
            theirs = twin.forward(x)
            return _close(self.kernels.rms_norm(x, weight.float() + one, self.eps), theirs)
        except Exception:  # whatever a module with one vector of weights does with other things than its own
            return False


class Gate:
    """The forward of an MLP W_down (silu(W_gate x) ∘ W_up x), whatever its three parts do of their own (adapters, hooks)."""

    def __init__(self, module: Any, kernels: Kernels) -> None:
        self.module, self.original, self.kernels = module, module.forward, kernels

    def __call__(self, x: torch.Tensor, *others: Any, **more: Any) -> Any:
        hooks = self.module.gate_proj._forward_hooks  # which may keep what would be written over
        if others or more or hooks or torch.is_grad_enabled():
            return self.original(x, *others, **more)
        gate, up = self.module.gate_proj(x), self.module.up_proj(x)
        if not (
            _is_plain_float32(gate)
            and _is_plain_float32(up)
            and gate.is_contiguous()
            and up.is_contiguous()
            and gate.shape == up.shape
        ):
            return self.module.down_proj(self.module.act_fn(gate) * up)
        return self.module.down_proj(self.kernels.silu_times(gate, up))

    def gives_its_numbers(self) -> bool:
        """Whether the kernel gives this module's numbers, tried on random inputs."""
        x = torch.randn(6, self.module.gate_proj.weight.shape[1], generator=torch.Generator().manual_seed(0))
        x = (x * torch.logspace(-2, 2, 6)[:, None]).to(self.module.gate_proj.weight.dtype)
        try:
            return _close(self(x), self.original(x))
        except Exception:  # whatever a module with parts of these names does
            return False


class Rotary:
    """A model's own function of queries and keys, with theirs turned by the kernel."""

    def __init__(self, original: Callable[..., Any], kernels: Kernels) -> None:
        self.original, self.kernels = original, kernels

    def __call__(self, q: Any, k: Any, cos: Any, sin: Any, *others: Any, **more: Any) -> Any:
        angles = (
            _is_plain_float32(cos)
            and _is_plain_float32(sin)
            and cos.ndim == 3
            and cos.shape[0] == 1
            and sin.shape == cos.shape
        )
        q, k = (
            x.float() if angles and x.dtype in NARROW else x for x in (q, k)
        )  # as torch multiplies them with these angles
        if others or more or not (angles and all(_fits(x, cos) for x in (q, k))):
            return self.original(q, k, cos, sin, *others, **more)
        return tuple(self.kernels.rotate(x, cos.contiguous(), sin.contiguous()) for x in (q, k))


def _is_plain_float32(x: Any) -> bool:
    """Whether a kernel takes this: float32 on the CPU, no subclass, and no gradient asked of it."""
    if type(x) is not torch.Tensor or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)


def _fits(x: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether x is (1, heads, n, d) for angles (1, n, d), each head's numbers side by side."""
    fits = _is_plain_float32(x) and x.ndim == 4 and (x.shape[0], *x.shape[2:]) == tuple(cos.shape)
    return fits and x.stride(3) == 1 and x.shape[3] % 2 == 0


def _looks_like_a_norm(part: nn.Module) -> bool:
    """Whether a module has one vector of weights and no parts, as RMS norms do; whether it is one is tried afterwards."""
    own = dict(part.named_parameters(recurse=False))
    alone = own.keys() == {"weight"} and own["weight"].ndim == 1 and not list(part.children())
    return alone and not isinstance(part, nn.LayerNorm) and not _altered(part)


@torch.inference_mode()
def _gates(module: nn.Module, kernels: Kernels) -> list[Gate]:
    """The gated MLPs that run through the kernel. One of each class, activation and settings is tried (some models clamp in some layers), not every
    one: a try takes a pass over the weights.
    """
    gates: list[Gate] = []
    tried: dict[Any, bool] = {}
    for part in module.modules():
        names = {name for name, _ in part.named_children()}
        if names != {"gate_proj", "up_proj", "down_proj", "act_fn"} or _altered(part):
            continue
        if any(own._forward_hooks or own._forward_pre_hooks for own in part.modules()):
            continue  # not ours to call
        settings = {
            name: value for name, value in vars(part).items() if isinstance(value, (int, float, str, type(None)))
        }
        gate, kind = Gate(part, kernels), (type(part), type(part.act_fn), repr(settings))
        if kind not in tried:
            tried[kind] = gate.gives_its_numbers()
        if tried[kind]:
            gates.append(gate)
    return gates


def _altered(module: nn.Module) -> bool:
    """Whether somebody has put a forward of their own there already."""
    return "forward" in module.__dict__


def _home(part: nn.Module) -> Any:
    """The Python module that a part's class comes from."""
    return sys.modules.get(type(part).__module__)


@torch.inference_mode()
def _turns_halves(function: Callable[..., Any], kernels: Kernels) -> bool:
    """Whether a function rotates as most models do: channel c together with c + d/2, by angles (1, n, d)."""
    try:
        if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
            return False
        generator = torch.Generator().manual_seed(0)
        q, k, angles = (torch.randn(1, *shape, generator=generator) for shape in ((3, 5, 8), (1, 5, 8), (5, 8)))
        inputs = q, k, angles.cos(), angles.sin()
        return all(
            _close(ours, theirs)
            for ours, theirs in zip(Rotary(function, kernels)(*inputs), function(*inputs), strict=True)
        )
    except Exception:  # whatever a function of that name does with other things than its own
        return False


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two results have one shape and dtype, and differ by rounding alone."""
    same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same and bool(((ours - theirs).norm(dim=-1) <= CLOSE * theirs.norm(dim=-1)).all())
