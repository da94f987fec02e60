"""One backward for many rows, a scalar for each: every layer's part of every row's gradient is handed over once, and then freed.

    f = logp(completion)     logp(chosen)     logp(rejected)     logp(chosen) − logp(rejected), the margin         g = ∇_θ f

Rows are packed side by side. A margin's two responses share their prompt in the graph, since one scalar sends one gradient there:

    linear layers, P prompt and C, R response tokens:  forward P + C + R,  backward P + C + R
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.bundles import check_lengths, items_of
from curate.passes.gradients.backward import checked_rules
from curate.passes.gradients.capture import Shared
from curate.passes.gradients.graph import APART, Graph, check_angles
from curate.passes.gradients.head import head_gradient
from curate.passes.gradients.layer_rules import Embedding, Linear, Norm, Parameters, Rules
from curate.passes.gradients.memory import Footprint
from curate.passes.gradients.products import wide
from curate.passes.halving import halving, list_halves
from curate.passes.layout import Group, Item
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair, common_prefix

Scalar = Literal["margin", "chosen", "rejected"]  # of a pair; an SFT row has its completion
Span = tuple[int, int]
TOKENS_ON_CPU = 1024  # in one graph; more cost memory there and gain nothing


@dataclass(frozen=True)
class HeadTokens:
    """The LM head's tokens of a batch. states: (n, d), float32 or wider, that predict tokens (n,). signs: (n,), +1 or −1, with which their
    log-probabilities count in f. logp, lse: (n,) float64. spans: where each row's tokens begin and end.
    """

    states: torch.Tensor
    tokens: torch.Tensor
    signs: torch.Tensor
    logp: torch.Tensor
    lse: torch.Tensor
    spans: list[Span]


Name = tuple[str, int]  # ("weight", 3): of the fourth linear layer


@dataclass(frozen=True)
class WeightPart:
    """A part of the gradients of a weight (o, i): its output lines `columns`, for the batch's rows `rows`. A row's part is b[span]ᵀ a[span].

    a: (n, i), b: (n, width), float32 or wider; a sink must neither keep nor change them. kept: what the sink made of a, shared with the layers that
    read the same a.
    """

    name: Name
    a: torch.Tensor
    b: torch.Tensor
    columns: slice
    rows: slice
    spans: list[Span]
    kept: dict[Any, Any]


class Sink(Protocol):
    """Receives the gradients of a batch of R rows, part by part. A `begin` without an `end` before it means that the last batch failed for want of
    memory, and its rows come again.
    """

    def begin(self, numbers: Sequence[int]) -> None:
        """Before a batch. numbers: (R,) of its rows."""

    def matrix(self, part: WeightPart) -> None:
        """A part of the gradient of a weight."""

    def vector(self, name: Name, x: torch.Tensor, columns: slice, size: int, rows: slice) -> None:
        """The entries `columns` of the gradient of a vector of `size`, (rows, width) float64."""

    def lines(self, name: Name, x: Lines) -> None:
        """The gradient of an embedding; name ("head", 0) where the LM head is the same matrix."""

    def head_done(self, tokens: HeadTokens) -> None:
        """After all parts of the head, before any layer's."""

    def end(self) -> None:
        """After all parts of a batch."""


@dataclass(frozen=True)
class Lines:
    """Gradients of an embedding's table: x (K, d), one line for each row of the batch and token id that occurs in it; row (K,) ascending, id (K,)."""

    row: torch.Tensor
    id: torch.Tensor
    x: torch.Tensor

    def ends(self, rows: int) -> list[Span]:
        """Where each row's lines begin and end."""
        edges = torch.searchsorted(self.row, torch.arange(rows + 1, device=self.row.device)).tolist()
        return list(pairwise(edges))

    @staticmethod
    def of(ids: torch.Tensor, g: torch.Tensor, spans: list[Span]) -> Lines:
        """Sums the gradients g (N, d) of the tokens ids (N,) by row and id. spans: where each row's tokens begin and end."""
        lengths = torch.tensor([stop - start for start, stop in spans], device=ids.device)
        row = torch.repeat_interleave(torch.arange(len(spans), device=ids.device), lengths)
        size = int(ids.max()) + 1
        distinct, line = torch.unique(row * size + ids, return_inverse=True)
        return Lines(distinct // size, distinct % size, g.new_zeros(len(distinct), g.shape[1]).index_add_(0, line, g))


HEAD: Name = ("head", 0)


class _Sorter:
    """A taker (passes/gradients/capture.py) that hands each layer's part to a sink: weights, vectors and embeddings by their own methods."""

    def __init__(self, rules: Rules, sink: Sink, spans: list[Span]) -> None:
        self.sink, self.spans = sink, spans
        self.all = slice(0, len(spans))
        self.number = {
            id(rule): k for rules in (rules.linears, rules.norms, rules.embeddings) for k, rule in enumerate(rules)
        }

    def linear(
        self, rule: Linear, shared: Shared, rows: torch.Tensor, line: torch.Tensor | None, g: torch.Tensor
    ) -> None:
        b, k = wide(g), self.number[id(rule)]
        if rule.needs_weight:
            a = wide(rows if line is None else rows[line])
            self.sink.matrix(WeightPart(("weight", k), a, b, slice(0, b.shape[1]), self.all, self.spans, shared.kept))
        if rule.needs_bias:
            self._vector(("bias", k), b)

    def norm(self, rule: Norm, x: torch.Tensor, g: torch.Tensor) -> None:
        for kind, parts in zip(("scale", "shift"), rule.gradients(x, g)):
            self._vector((kind, self.number[id(rule)]), parts)

    def _vector(self, name: Name, parts: torch.Tensor) -> None:
        x = torch.stack([parts[start:stop].sum(0).double().flatten() for start, stop in self.spans])
        self.sink.vector(name, x, slice(0, x.shape[1]), x.shape[1], self.all)

    def embedding(self, rule: Embedding, ids: torch.Tensor, g: torch.Tensor) -> None:
        name = HEAD if rule.tied else ("embedding", self.number[id(rule)])
        self.sink.lines(name, Lines.of(ids, g, self.spans))


def rows_of(rows: Sequence[Encoded | EncodedPair], scalar: Scalar) -> dict[int, list[Item]]:
    """{row: its sequences} of the rows without a problem: one, or both responses of a pair whose margin is differentiated."""
    sequences = {}
    for i, row in enumerate(rows):
        if row.problem is None:
            items = items_of(i, row, False, None)
            sequences[i] = (
                items if len(items) == 1 or scalar == "margin" else [item for item in items if item.side == scalar]
            )
    return sequences


def parts_of(model: Model, rules: Rules, v: dict[str, torch.Tensor]) -> dict[Name, torch.Tensor]:
    """v, {parameter: tensor of its shape}, by the names that sinks use, on the model's device, float32 or wider: weights (o, i), vectors flat. A
    matrix that is head and embedding has the head's name. ModelError where they do not fit into memory.
    """
    names = {id(p): name for name, p in model.module.named_parameters()}
    parts: dict[Name, torch.Tensor] = {}

    def own(name: Name, p: Any, *, turned: bool = False) -> None:
        part = v.get(names.get(id(p), ""))
        if part is not None:
            try:
                part = wide(part).to(model.device)
            except torch.OutOfMemoryError:
                raise ModelError(
                    f"{model.path}: the model and a direction in it do not fit into the memory of {model.device}.\n"
                    "  Take directions over the last layers alone: `--set gradients.parameters=2`."
                ) from None
            part = part.T if turned else part
            parts[name] = part if name[0] in ("weight", "head", "embedding") else part.flatten()

    head = model.module.get_output_embeddings()
    own(HEAD, head.weight)
    own(("head bias", 0), getattr(head, "bias", None))
    for k, linear in enumerate(rules.linears):
        weight: Any = linear.module.weight
        own(("weight", k), weight, turned=linear.weight.stride() != weight.stride())
        own(("bias", k), linear.bias)
    for k, norm in enumerate(rules.norms):
        own(("scale", k), norm.module.weight)
        own(("shift", k), getattr(norm.module, "bias", None))
    for k, table in enumerate(rules.embeddings):
        if not table.tied:
            own(("embedding", k), table.module.weight)
    return parts


def prepared(
    model: Model, items: dict[int, list[Item]], parameters: Parameters, token_budget: int
) -> tuple[Rules, Footprint, int]:
    """The model's rules, what a token costs in memory, and how many tokens may run at a time. ModelError where a parameter has no rule or a row is
    too long.
    """
    check_lengths(model, items)
    check_angles(model, items)
    rules, memory = checked_rules(model, parameters)
    limit = memory.check(model, items, token_budget)
    return rules, memory, min(limit, TOKENS_ON_CPU) if model.device.type == "cpu" else limit


def batches(model: Model, items: dict[int, list[Item]], limit: int) -> Iterator[list[int]]:
    """Rows in their order, by length in the padded layout, at most `limit` tokens of the graph at a time; a longer row alone."""
    padded = model.layout == "padded"
    order = sorted(items, key=lambda row: -max(len(item.ids) for item in items[row])) if padded else list(items)
    batch: list[int] = []
    for row in order:
        if batch and _tokens([items[r] for r in (*batch, row)], padded) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _tokens(rows: Sequence[list[Item]], padded: bool) -> int:
    if padded:
        return sum(len(row) for row in rows) * max(len(item.ids) for row in rows for item in row)
    return sum(_group(row).n_tokens for row in rows)


def _group(row: list[Item]) -> Group:
    return Group(tuple(row), common_prefix(row[0].ids, row[1].ids) if len(row) == 2 else 0)


def take(model: Model, rules: Rules, memory: Footprint, items: dict[int, list[Item]], limit: int, sink: Sink) -> None:
    """Run all rows, batch by batch, and hand their gradients to the sink. Where memory is short a batch is halved and run again."""
    halving(
        batches(model, items, limit),
        lambda numbers: take_batch(model, rules, memory, numbers, [items[row] for row in numbers], sink),
        list_halves,
        lambda numbers: memory.too_long(model, items[numbers[0]]),
    )


def take_batch(
    model: Model, rules: Rules, memory: Footprint, numbers: list[int], rows: list[list[Item]], sink: Sink
) -> None:
    """Run one batch of rows, and hand their gradients to the sink between its `begin` and `end`. numbers: of the rows, which the sink gets."""
    checkpointed = memory.checkpointed(rows, model)
    graph = Graph.of(model, [_group(row) for row in rows])
    firsts = np.cumsum([0] + [len(row) for row in rows])[:-1]
    edges = [*(graph.starts[i] for i in firsts), graph.n_tokens]
    sink.begin(numbers)
    graph.backward(
        rules,
        _Sorter(rules, sink, list(pairwise(edges))),
        lambda states: _head(model, rules, rows, states, graph.at, graph.tokens, sink),
        checkpointed=checkpointed,
        apart=not checkpointed and model.device.type == "cpu" and memory.graph(rows) > APART,
    )
    sink.end()


def _head(
    model: Model,
    rules: Rules,
    rows: list[list[Item]],
    states: torch.Tensor,
    at: torch.Tensor,
    tokens: torch.Tensor,
    sink: Sink,
) -> torch.Tensor:
    """(N, d) gradients of f at the final states. The LM head's own parts go to the sink."""
    lengths = [[len(item.targets) for item in row] for row in rows]
    ends = np.cumsum([0] + [sum(row) for row in lengths]).tolist()
    spans = list(pairwise(ends))
    predicting = states[at]
    h = wide(predicting)  # (n, d)
    signs = torch.cat([torch.full((n,), 1.0 - 2 * k) for row in lengths for k, n in enumerate(row)]).to(h)  # (n,)
    a = h * -signs[:, None]  # ∂logp/∂W = −q hᵀ
    number = {start: i for i, start in enumerate(ends)}
    kept: dict[int, dict[Any, Any]] = {}

    def each(span: Span, block: slice, q: torch.Tensor) -> None:
        some = slice(number[span[0]], number[span[1]])
        own = [(start - span[0], stop - span[0]) for start, stop in spans[some]]
        sink.matrix(WeightPart(HEAD, a[slice(*span)], q, block, some, own, kept.setdefault(span[0], {})))
        if model.head.bias is not None:
            parts = q * -signs[slice(*span), None]
            x = torch.stack([parts[start:stop].sum(0).double() for start, stop in own])
            sink.vector(("head bias", 0), x, block, len(model.head.weight), some)

    gradient = head_gradient(
        model.head,
        predicting,
        tokens,
        [(start, stop, stop) for start, stop in spans],
        products=False,
        each=each if rules.head else None,
    )
    sink.head_done(HeadTokens(h, tokens, signs, gradient.logp, gradient.lse, spans))
    slope = torch.zeros_like(states)
    return slope.index_add_(0, at, (gradient.slope * signs[:, None]).to(states.dtype))
