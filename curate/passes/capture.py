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
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from curate.errors import ModelError
from curate.passes import inner_products
from curate.passes.graph_memory import Arena
from curate.passes.inner_products import wide
from curate.passes.layer_rules import Embedding, Linear, Norm, Rules


@dataclass
class _Shared:
    """Linear layers that read one input: their outputs together, how many are left, and per row of the batch the tiles of AAᵀ meanwhile."""

    outputs: int = 0
    left: int = 0
    grams: dict[int, list[torch.Tensor]] = field(default_factory=dict)


@dataclass
class Capture:
    """One batch. spans: per row of the batch, where its first sequence starts, its second, and where it ends, among the N tokens of the
    graph. first (U,), line (N,): the first of the tokens that share everything, and each token's number among those; None where none do.

    found (rows, 3) float64 gathers first·first, first·second, second·second over all wanted parameters.
    """

    rules: Rules
    spans: list[tuple[int, int, int]]
    n_tokens: int
    device: torch.device
    first: torch.Tensor | None = None
    line: torch.Tensor | None = None
    checkpointed: bool = False
    arena: Arena | None = None
    around: Callable[[], Any] | None = None  # context of a layer that is run again by a checkpoint
    on_embedding: Callable[[torch.Tensor, torch.Tensor], None] | None = (
        None  # the tied head's cross terms: (ids, gradients)
    )

    def __post_init__(self) -> None:
        self.found = torch.zeros(len(self.spans), 3, dtype=torch.float64, device=self.device)
        self._last: tuple[torch.Tensor, int, torch.Tensor, _Shared] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While inside, the model's modules hand over what they see."""
        with ExitStack() as stack:
            for rule in self.rules.linears:
                _patch(stack, rule.module, lambda x, rule=rule: self._linear(rule, x))
            for norm in self.rules.norms:
                plain = norm.module.forward
                _patch(
                    stack,
                    norm.module,
                    lambda x, *a, norm=norm, plain=plain, **k: self._norm(norm, x, plain(x, *a, **k)),
                )
            for table in self.rules.embeddings:
                plain = table.module.forward
                _patch(
                    stack,
                    table.module,
                    lambda ids, *a, table=table, plain=plain, **k: self._embedding(table, ids, plain(ids, *a, **k)),
                )
            if not self.rules.embeddings and self.rules.layers:
                stack.enter_context(begun_at(self.rules.layers[self.rules.first or 0]))
            for layer in self.rules.layers[self.rules.first or 0 :] if self.checkpointed else ():
                plain = layer.forward
                _patch(
                    stack,
                    layer,
                    lambda *a, plain=plain, **k: checkpoint(
                        self._again(plain), *a, use_reentrant=False, preserve_rng_state=False, **k
                    ),
                )
            yield

    def _again(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.around is None:
                return plain(*args, **kwargs)
            with self.around():
                return plain(*args, **kwargs)

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
        if rule.wanted:
            shared.outputs += rule.weight.shape[0]
            shared.left += 1
        return _Linear.apply(x, rows, rule, shared, self)

    def _shared(self, x: torch.Tensor) -> tuple[torch.Tensor, _Shared]:
        """The (U, i) different rows of x, and one record for all layers that get this very tensor. Only the graph keeps the rows."""
        if self._last is not None and self._last[0] is x and self._last[1] == x._version:
            return self._last[2:]
        with torch.no_grad():
            rows = x.detach().reshape(-1, x.shape[-1])
            if self.arena is not None:
                rows = self.arena.distinct(rows)
            elif self.first is not None:
                rows = rows[self.first]
        self._last = x, x._version, rows, _Shared()
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

    def linear_done(self, rule: Linear, shared: _Shared, rows: torch.Tensor, g: torch.Tensor) -> None:
        """rows (U, i), g (N, o): this layer's part of the inner products."""
        for k, (start, middle, stop) in enumerate(self.spans):
            b, m = wide(g[start:stop]), middle - start
            n = stop - start
            if rule.wanted:
                if inner_products.prefers_tokens(n, rows.shape[1], shared.outputs):
                    if k not in shared.grams:
                        shared.grams[k] = inner_products.gram(self._own(rows, start, stop), m)
                    self.found[k] += inner_products.weigh(shared.grams[k], inner_products.gram(b, m), n, m)
                else:
                    self.found[k] += inner_products.matrix_products(self._own(rows, start, stop), b, m)
            if rule.bias_wanted:
                self.found[k] += inner_products.vector_products(b[:m].sum(0), b[m:].sum(0))
        if rule.wanted:
            shared.left -= 1
            if not shared.left:
                shared.grams.clear()

    def _own(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return wide(rows[start:stop] if self.line is None else rows[self.line[start:stop]])

    def norm_done(self, rule: Norm, x: torch.Tensor, g: torch.Tensor) -> None:
        """x, g: the norm's input and its output's gradient, tokens first, then any, then the weight's shape."""
        g, extra = wide(g), tuple(range(1, x.ndim - len(rule.shape)))
        of_weight = g * rule.normal(x)
        for parts in (of_weight, g) if rule.bias else (of_weight,):
            parts = parts.sum(extra) if extra else parts
            for k, (start, middle, stop) in enumerate(self.spans):
                self.found[k] += inner_products.vector_products(parts[start:middle].sum(0), parts[middle:stop].sum(0))

    def _embedded(self, rule: Embedding, ids: torch.Tensor, g: torch.Tensor) -> None:
        with torch.no_grad():
            g = wide(g) * rule.scale
            if rule.tied and self.on_embedding is not None:
                self.on_embedding(ids, g)
            for k, (start, middle, stop) in enumerate(self.spans):
                _, a, b = inner_products.embedding_sums(ids[start:stop], g[start:stop], middle - start)
                self.found[k] += inner_products.vector_products(a, b)


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
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, rule: Linear, shared: _Shared, capture: Capture
    ) -> torch.Tensor:
        ctx.rule, ctx.shared, ctx.capture, ctx.shape = rule, shared, capture, x.shape
        if rule.wanted:
            ctx.save_for_backward(rows)
        y = linear(rows, rule.weight, rule.bias)  # (U, o)
        if capture.line is not None:
            y = y[capture.line]  # (N, o)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        g = g.reshape(-1, g.shape[-1])
        if ctx.rule.wanted or ctx.rule.bias_wanted:
            rows = ctx.saved_tensors[0] if ctx.rule.wanted else g[:0]
            ctx.capture.linear_done(ctx.rule, ctx.shared, rows, g)
        below = (g @ ctx.rule.weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
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
        ctx.capture.norm_done(ctx.rule, *(t.reshape(-1, *t.shape[2:]) for t in given))
        return g, None, None, None, None
