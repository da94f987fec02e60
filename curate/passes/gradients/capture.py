"""Catching what inner products need while one backward runs: a layer's inputs, and the gradients at its outputs. Weights get no gradient.

Every sequence of a batch has its own copy of the prompt in the graph, since the gradient of another scalar arrives there: the backward of
logp+ and that of logp− are one backward. What depends on tokens alone is not done twice: a linear layer is applied once to what sequences
share, and its result copied.

    linear layers, P prompt and C, R response tokens:  forward P + C + R,  backward 2P + C + R,  products 2P + C + R at most
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from curate.errors import ModelError
from curate.passes.gradients.graph_memory import Arena
from curate.passes.gradients.layer_rules import Embedding, Linear, Norm, Rules
from curate.passes.gradients.products import wide
from curate.passes.kernels.cpu_products import linear, product


@dataclass
class Shared:
    """Linear layers that read one input: their outputs together, how many are left to come, and what their taker keeps of it meanwhile."""

    outputs: int = 0
    left: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)


class Taker(Protocol):
    """What is made of the parts of a gradient as they come by, layer after layer; the tensors belong to the backward and are not to be kept."""

    def linear(
        self, rule: Linear, shared: Shared, rows: torch.Tensor, line: torch.Tensor | None, g: torch.Tensor
    ) -> None:
        """rows[line] (N, i): the layer's inputs, rows themselves where line is None; g (N, o): gradients at its outputs."""

    def norm(self, rule: Norm, x: torch.Tensor, g: torch.Tensor) -> None:
        """x, g: the norm's input and its output's gradient, tokens first, then any, then the weight's shape."""

    def embedding(self, rule: Embedding, ids: torch.Tensor, g: torch.Tensor) -> None:
        """ids (N,), g (N, d): gradients of the lines themselves, scale included."""


@dataclass
class Capture:
    """One batch of n_tokens tokens in the graph. first (U,), line (N,): the first of the tokens that share everything, and each token's number
    among those; None where none do. taker: gets every wanted layer's part.
    """

    rules: Rules
    taker: Taker
    n_tokens: int
    first: torch.Tensor | None = None
    line: torch.Tensor | None = None
    checkpointed: bool = False
    arena: Arena | None = None
    around: Callable[[], Any] | None = None  # context of a layer that is run again by a checkpoint

    def __post_init__(self) -> None:
        self._last: tuple[torch.Tensor, int, torch.Tensor, Shared] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While inside, the model's modules hand over what they see."""
        with ExitStack() as stack:
            stack.callback(self.forward_done)  # a layer that was run again and this would hold each other for ever
            for rule in self.rules.linears:
                _patch(stack, rule.module, lambda x, rule=rule: self._linear(rule, x))
            for norm in self.rules.norms:
                original = norm.module.forward
                _patch(
                    stack,
                    norm.module,
                    lambda x, *a, norm=norm, original=original, **k: self._norm(norm, x, original(x, *a, **k)),
                )
            for table in self.rules.embeddings:
                original = table.module.forward
                _patch(
                    stack,
                    table.module,
                    lambda ids, *a, table=table, original=original, **k: self._embedding(
                        table, ids, original(ids, *a, **k)
                    ),
                )
            if not self.rules.embeddings and self.rules.layers:
                stack.enter_context(begun_at(self.rules.layers[self.rules.first or 0]))
            for layer in self.rules.layers[self.rules.first or 0 :] if self.checkpointed else ():
                original = layer.forward
                _patch(
                    stack,
                    layer,
                    lambda *a, original=original, **k: checkpoint(
                        self._again(original), *a, use_reentrant=False, preserve_rng_state=False, **k
                    ),
                )
            yield

    def _again(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.around is None:
                return original(*args, **kwargs)
            with self.around():
                return original(*args, **kwargs)

        return run

    def forward_done(self) -> None:
        """Let go of everything but what the graph itself keeps."""
        self._last = None
        if self.arena is not None:
            self.arena.close()

    def _linear(self, rule: Linear, x: torch.Tensor) -> torch.Tensor:
        self._check(rule.module, x, x.numel() // x.shape[-1])
        rows, shared = self._shared(x)
        if not (x.requires_grad and torch.is_grad_enabled()):
            y = linear(rows, rule.weight, rule.bias)
            return (y if self.line is None else y[self.line]).view(*x.shape[:-1], -1)
        if rule.needs_weight:
            shared.outputs += rule.weight.shape[0]
            shared.left += 1
        return _Linear.apply(x, rows, rule, shared, self)

    def _shared(self, x: torch.Tensor) -> tuple[torch.Tensor, Shared]:
        """The (U, i) different rows of x, and one record for all layers that get this very tensor. Only the graph keeps the rows."""
        if self._last is not None and self._last[0] is x and self._last[1] == x._version:
            return self._last[2:]
        with torch.no_grad():
            rows = x.detach().reshape(-1, x.shape[-1])
            if self.arena is not None:
                rows = self.arena.distinct(rows)
            elif self.first is not None:
                rows = rows[self.first]
        self._last = x, x._version, rows, Shared()
        return self._last[2:]

    def _norm(self, rule: Norm, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return y
        turned = x.ndim == 4 and self._by_heads(rule.module, x)
        tokens = x.shape[2] * x.shape[0] if turned else x.shape[0] * x.shape[1]
        self._check(rule.module, x, tokens)
        return _Norm.apply(y, x, rule, turned, self)

    def _by_heads(self, module: torch.nn.Module, x: torch.Tensor) -> bool:
        """Whether a norm of queries or keys gets (batch, heads, n, ·) rather than (batch, n, heads, ·). Where both lengths fit, as it was before."""
        n = self.n_tokens // x.shape[0]
        if x.shape[1] == n and x.shape[2] == n:
            return self.rules.by_heads.get(type(module), False)
        return self.rules.by_heads.setdefault(type(module), x.shape[1] != n and x.shape[2] == n)

    def _embedding(self, rule: Embedding, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self._check(rule.module, y, ids.numel())
        y = y.detach().requires_grad_()
        y.register_hook(lambda g: self._embedded(rule, ids.reshape(-1), g.reshape(-1, g.shape[-1])))
        return y * 1  # a model may write into its embeddings; a leaf must not be written into

    def _check(self, module: torch.nn.Module, x: torch.Tensor, tokens: int) -> None:
        if tokens != self.n_tokens:
            raise ModelError(
                f"{type(module).__name__}: wanted a layer that sees each of the batch's {self.n_tokens} tokens once, found one that sees {tokens} "
                f"(shape {tuple(x.shape)}); its gradient has no rule."
            )

    def linear_done(self, rule: Linear, shared: Shared, rows: torch.Tensor, g: torch.Tensor) -> None:
        self.taker.linear(rule, shared, rows, self.line, g)
        if rule.needs_weight:
            shared.left -= 1
            if not shared.left:
                shared.kept.clear()

    def _embedded(self, rule: Embedding, ids: torch.Tensor, g: torch.Tensor) -> None:
        with torch.no_grad():
            self.taker.embedding(rule, ids, wide(g) * rule.scale)


@contextmanager
def begun_at(layer: torch.nn.Module) -> Iterator[None]:
    """While inside, the graph begins at this layer's input: nothing before it gets a gradient."""

    def begin(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    handle = layer.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _patch(stack: ExitStack, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Replace one module's forward until the stack is closed."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def back() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    stack.callback(back)


class _Linear(torch.autograd.Function):
    """y = xWᵀ + b on the different rows alone; backward hands (A, B) over and passes the gradient on."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, rule: Linear, shared: Shared, capture: Capture
    ) -> torch.Tensor:
        ctx.rule, ctx.shared, ctx.capture, ctx.shape = rule, shared, capture, x.shape
        if rule.needs_weight:
            ctx.save_for_backward(rows)
        y = linear(rows, rule.weight, rule.bias)  # (U, o)
        if capture.line is not None:
            y = y[capture.line]  # (N, o)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        g = g.reshape(-1, g.shape[-1])
        if ctx.rule.needs_weight or ctx.rule.needs_bias:
            rows = ctx.saved_tensors[0] if ctx.rule.needs_weight else g[:0]
            ctx.capture.linear_done(ctx.rule, ctx.shared, rows, g)
        below = product(g, ctx.rule.weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return below, None, None, None, None


class _Norm(torch.autograd.Function):
    """The identity on a norm's output; backward hands over its input and the gradient."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, rule: Norm, turned: bool, capture: Capture) -> torch.Tensor:
        ctx.rule, ctx.turned, ctx.capture = rule, turned, capture
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        given = [t.transpose(1, 2) if ctx.turned else t for t in (x, g)]
        ctx.capture.taker.norm(ctx.rule, *(t.reshape(-1, *t.shape[2:]) for t in given))
        return g, None, None, None, None
