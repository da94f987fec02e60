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
    """A record for the linear layers that read the same input (q, k and v, for example).

    outputs: the sum of their output widths. left: how many of them the backward has still to reach. kept: what the taker made of the common input,
    emptied after the last of them.
    """

    outputs: int = 0
    left: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)


class Taker(Protocol):
    """Receives the parts of a gradient during the backward, layer after layer. The tensors belong to the backward: a taker must not keep them."""

    def linear(
        self, rule: Linear, shared: Shared, rows: torch.Tensor, line: torch.Tensor | None, g: torch.Tensor
    ) -> None:
        """One linear layer. Its inputs are rows[line] (N, i), or rows themselves where line is None; g (N, o): the gradients at its outputs."""

    def norm(self, rule: Norm, x: torch.Tensor, g: torch.Tensor) -> None:
        """One norm. x: its input, g: the gradient at its output, both (N, …, *shape of the weight), a token a line."""

    def embedding(self, rule: Embedding, ids: torch.Tensor, g: torch.Tensor) -> None:
        """One embedding. ids (N,): the tokens; g (N, d): the gradients of the table's lines that they read, the embedding's scale included."""


@dataclass
class Capture:
    """Hands the parts of one batch's gradients to a taker. n_tokens: N, the tokens in the graph.

    Tokens of a shared prompt have the same states: first (U,) is the position of the first of each such group, line (N,) the number of each
    token's group; None where no tokens are shared. checkpointed: layers are run again on the way back.
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
        """While inside, the forward methods of the layers with a rule are replaced by ones that hand their inputs and gradients over."""
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
        """A layer's forward as its checkpoint runs it again: inside the context `around`, where there is one."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.around is None:
                return original(*args, **kwargs)
            with self.around():
                return original(*args, **kwargs)

        return run

    def forward_done(self) -> None:
        """Frees what was needed during the forward alone; what the graph keeps for the backward stays."""
        self._last = None
        if self.arena is not None:
            self.arena.close()

    def _linear(self, rule: Linear, x: torch.Tensor) -> torch.Tensor:
        """y (…, o) of a linear layer for x (…, i); where a gradient is taken, the backward hands this layer's part to the taker."""
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
        """The (U, i) different rows of x (…, i), and one record for all layers that read this very tensor. Only the graph keeps the rows alive."""
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
        """y, a norm's output as the model computed it, with a hook that hands the norm's part to the taker on the way back."""
        if not torch.is_grad_enabled():
            return y
        turned = x.ndim == 4 and self._by_heads(rule.module, x)
        tokens = x.shape[2] * x.shape[0] if turned else x.shape[0] * x.shape[1]
        self._check(rule.module, x, tokens)
        return _Norm.apply(y, x, rule, turned, self)

    def _by_heads(self, module: torch.nn.Module, x: torch.Tensor) -> bool:
        """Whether a norm of queries or keys gets (batch, heads, n, ·) rather than (batch, n, heads, ·). Where both lengths are n, the layout that
        this kind of norm had before is assumed.
        """
        n = self.n_tokens // x.shape[0]
        if x.shape[1] == n and x.shape[2] == n:
            return self.rules.by_heads.get(type(module), False)
        return self.rules.by_heads.setdefault(type(module), x.shape[1] != n and x.shape[2] == n)

    def _embedding(self, rule: Embedding, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y, the embedded tokens, as a new leaf of the graph: its gradient goes to the taker."""
        self._check(rule.module, y, ids.numel())
        y = y.detach().requires_grad_()
        y.register_hook(lambda g: self._embedded(rule, ids.reshape(-1), g.reshape(-1, g.shape[-1])))
        return y * 1  # a model may write into its embeddings; a leaf must not be written into

    def _check(self, module: torch.nn.Module, x: torch.Tensor, tokens: int) -> None:
        """ModelError where a layer does not see each of the batch's tokens exactly once (as in a mixture of experts)."""
        if tokens != self.n_tokens:
            raise ModelError(
                f"{type(module).__name__}: wanted a layer that sees each of the batch's {self.n_tokens} tokens once, found one that sees {tokens} "
                f"(shape {tuple(x.shape)}); its gradient has no rule."
            )

    def linear_done(self, rule: Linear, shared: Shared, rows: torch.Tensor, g: torch.Tensor) -> None:
        """Hands a linear layer's inputs and output gradients to the taker; after the last layer of this input, what was kept of it is dropped."""
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
    """While inside, the graph begins at this layer's input: the layers before it get no gradient, and keep no activations."""

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
    """y = xWᵀ + b, multiplied once per different row of x. Its backward hands inputs and output gradients to the capture, and gives x's gradient."""

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
