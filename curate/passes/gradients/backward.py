"""The backward pass: how a row's log-probabilities would move each other, exactly, without a gradient of any weight.

    g± = ∇_θ logp(y±)      K++ = ⟨g+, g+⟩   K+− = ⟨g+, g−⟩   K−− = ⟨g−, g−⟩        over all parameters, or those asked for

One forward and one backward per batch; the forward's own measurements are read off the same states. A linear layer sees a shared prompt once
on the way forward and once per response on the way back (passes/gradients/capture.py); the head goes by blocks of the vocabulary
(passes/gradients/head.py); which parameters are understood is passes/gradients/layer_rules.py. A model is measured only after ‖g+ + g−/2‖² of a few
tokens has agreed with the gradients of autograd itself. Memory: passes/gradients/memory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes import forward
from curate.passes.batch import Batch, write_columns
from curate.passes.bundles import NO_LIMIT, bundle_rows, check_lengths, items_of, join
from curate.passes.gradients.capture import begun_at
from curate.passes.gradients.graph import APART, Graph, check_angles
from curate.passes.gradients.head import HeadGradient, head_gradient, tied_products
from curate.passes.gradients.layer_rules import Parameters, Rules, find_rules, probe_ids
from curate.passes.gradients.memory import Footprint, footprint
from curate.passes.gradients.pairs import PairProducts
from curate.passes.gradients.products import embedding_sums
from curate.passes.halving import halving, list_halves
from curate.passes.layout import Group, Item, Layout
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair

if TYPE_CHECKING:
    from curate.passes.contract import Measurement

__all__ = ["GradientBatch", "Parameters", "measure"]

TOKENS_ON_CPU = 512  # more tokens at a time cost memory there and gain nothing


class GradientBatch(Batch):
    """A batch of the forward pass that also has `products` (rows, 3) float64: ⟨g1, g1⟩, ⟨g1, g2⟩, ⟨g2, g2⟩ of each row's two responses, of
    their summed log-probabilities. SFT rows have one response: the other two are 0.
    """

    products: torch.Tensor
    of_head: HeadGradient

    def _sweep(self) -> dict[str, torch.Tensor]:
        """{statistic of the head: (tokens,) float64}. Log-probabilities were computed with the gradients; others take the forward pass's sweep."""
        if not self._requested <= {"logp", "lse"}:
            return super()._sweep()
        at, sides = 0, list(self.sides.values())
        entries: list[list[torch.Tensor]] = [[] for _ in sides]
        for row in range(len(self.rows)):
            for side, entry in zip(sides, entries):
                n = int(side.lengths[row])
                entry.append(torch.arange(at, at + n, device=side.at.device))
                at += n
        for side, entry in zip(sides, entries):
            side.entry = torch.cat(entry)
        return {"logp": self.of_head.logp, "lse": self.of_head.lse}


def measure(
    model: Model,
    encoded: Sequence[Encoded | EncodedPair],
    measurements: Sequence[Measurement],
    *,
    token_budget: int = 16384,
    parameters: Parameters = "all",
) -> dict[str, np.ndarray]:
    """Run forward and backward over the rows and read off every measurement, of the backward and of the forward pass alike:
    {column: (len(encoded),) float64}, in the rows' order.

    parameters: "all" (with an adapter on: of the whole model that the two make), "lora" (the A and B matrices of a model that was loaded from an
    adapter's folder, or of PEFT's: Model(peft_model.get_base_model())), or a number k: the last k decoder layers, the final norm and the LM
    head. NaN where a row has a `problem` or is of another kind. ModelError where a wanted parameter has no rule (MoE experts, state-space layers),
    and before anything runs where the longest row does not fit into memory.
    """
    out = {column: np.full(len(encoded), np.nan) for m in measurements for column in m.columns}
    apart = [m for m in measurements if m.reads == "forward" and (m.without_prompt or m.prompt_only)]
    if apart:  # other sequences than the rows' own: nothing to share
        out |= forward.measure(model, encoded, apart, token_budget=token_budget)
    for kind, name in ((EncodedPair, "preference"), (Encoded, "sft")):
        requested = [m for m in measurements if m.kind in (name, "any") and m not in apart]
        rows = [i for i, row in enumerate(encoded) if isinstance(row, kind) and row.problem is None]
        if requested and rows:
            _measure_rows(model, encoded, rows, requested, token_budget, parameters, out)
    return out


def _measure_rows(
    model: Model,
    encoded: Sequence[Encoded | EncodedPair],
    indices: list[int],
    measurements: list[Measurement],
    token_budget: int,
    parameters: Parameters,
    out: dict[str, np.ndarray],
) -> None:
    """Measures rows of one kind (pairs or SFT rows), given by their indices, and writes their columns into `out`, (rows,) float64 each."""
    items = {i: items_of(i, encoded[i], False, None) for i in indices}
    check_lengths(model, items)
    check_angles(model, items)
    rules, memory = checked_rules(model, parameters)
    limit = memory.check(model, items, token_budget)
    if model.device.type == "cpu":
        limit = min(limit, TOKENS_ON_CPU)

    def run_rows(rows: list[int]) -> None:
        part = {row: items[row] for row in rows}
        sequences = list(part.values())
        again = memory.checkpointed(sequences, model)
        apart = not again and model.device.type == "cpu" and memory.graph(sequences) > APART
        batch = run(model, rules, part, encoded, measurements, checkpointed=again, apart=apart)
        with torch.no_grad():
            for m in measurements:
                write_columns(m, batch, out)

    too_long = lambda rows: memory.too_long(model, items[rows[0]])  # noqa: E731
    halving(_batches(model, items, limit), run_rows, list_halves, too_long)


def _batches(model: Model, items: dict[int, list[Item]], limit: int) -> Iterator[list[int]]:
    """Batches of row indices: rows with the same prompt stand side by side; a batch has at most `limit` tokens in the graph, or is one longer row."""
    together: dict[object, list[int]] = {}
    for row, own in items.items():
        together.setdefault(own[0].ids[: own[0].start].tobytes(), []).append(row)
    order = [row for rows in together.values() for row in rows]
    if model.layout == "padded":
        order.sort(key=lambda row: -max(len(item.ids) for item in items[row]))
    batch: list[int] = []
    for row in order:
        size = tokens_of([items[r] for r in (*batch, row)], model.layout)
        if batch and size > limit:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def tokens_of(rows: Sequence[list[Item]], layout: str) -> int:
    """How many tokens a batch has in the graph: every sequence counts whole (shared prompts too), in the padded layout with its padding."""
    lengths = [len(item.ids) for row in rows for item in row]
    return len(lengths) * max(lengths) if layout == "padded" else sum(lengths)


def run(
    model: Model,
    rules: Rules,
    items: dict[int, list[Item]],
    encoded: Sequence[Encoded | EncodedPair],
    measurements: Sequence[Measurement] = (),
    *,
    checkpointed: bool = False,
    apart: bool = False,
) -> GradientBatch:
    """One batch of rows, forward and backward: the forward pass's batch with the inner products of each row's gradients.

    items: row -> its sequences. checkpointed: each decoder layer is run again on the way back, to save memory. apart: activations are kept as in
    passes/gradients/graph_memory.py.
    """
    bundle = join(bundle_rows(items, NO_LIMIT))
    shared = Layout.of(bundle.groups)
    graph = Graph.of(model, [Group((item,), 0) for item in bundle.items])
    per_row = len(graph.sequences) // len(bundle.rows)
    ends = [*graph.starts[per_row::per_row], graph.n_tokens]
    owned = [graph.starts[i : i + per_row] for i in range(0, len(graph.starts), per_row)]
    spans = [(own[0], own[1] if per_row == 2 else end, end) for own, end in zip(owned, ends)]
    counts = np.cumsum([0] + [len(item.targets) for item in graph.sequences]).tolist()
    responses = [(counts[i], counts[i + 1], counts[i + per_row]) for i in range(0, len(graph.sequences), per_row)]
    first = line = None
    if not graph.padded and len(shared.ids) < graph.n_tokens:
        shared_index = np.concatenate(shared.where)
        line = torch.from_numpy(shared_index).to(model.device)
        first = torch.from_numpy(np.unique(shared_index, return_index=True)[1]).to(model.device)
    products = PairProducts(spans, model.device)
    heads: list[HeadGradient] = []

    def slope(states: torch.Tensor) -> torch.Tensor:
        predicting = states[graph.at]
        of_head = head_gradient(model.head, predicting, graph.tokens, responses, products=rules.head)
        heads.append(of_head)
        products.on_tied = _tied(model, products, of_head, predicting, graph.tokens, responses)
        slopes = torch.zeros_like(states)
        slopes[graph.at] = of_head.slope.to(states.dtype)
        return slopes

    states = graph.backward(rules, products, slope, first=first, line=line, checkpointed=checkpointed, apart=apart)
    where = graph.where
    if first is not None:
        states, where = states[first], shared.where
    batch_rows, statistics = [encoded[row] for row in bundle.rows], {s for m in measurements for s in m.head}
    batch = GradientBatch(model.head, bundle.rows, batch_rows, graph.sequences, where, states, statistics)
    batch.of_head, batch.products = heads[0], products.values + heads[0].products
    return batch


def _tied(
    model: Model,
    products: PairProducts,
    of_head: HeadGradient,
    states: torch.Tensor,
    tokens: torch.Tensor,
    responses: list[tuple[int, int, int]],
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A function of the embedding's ids (N,) and gradients (N, d). Where embedding and LM head are one matrix, it adds the inner products between
    the two uses of that matrix.
    """

    def add(ids: torch.Tensor, g: torch.Tensor) -> None:
        for k, ((start, middle, stop), (a, b, c)) in enumerate(zip(products.spans, responses)):
            distinct_ids, *sums = embedding_sums(ids[start:stop], g[start:stop], middle - start)
            one = (states[a:c], tokens[a:c], of_head.logp[a:c], of_head.lse[a:c])
            products.values[k] += tied_products(model.head, *one, b - a, distinct_ids, (sums[0], sums[1]))

    return add


def checked_rules(model: Model, parameters: Parameters) -> tuple[Rules, Footprint]:
    """The model's rules and its memory footprint. The rules are compared with autograd on a few tokens, once per model (`model.known`)."""
    key = "gradients", parameters
    if key not in model.known:
        rules = find_rules(model, parameters)
        _check_against_autograd(model, rules, parameters)
        model.known[key] = rules, footprint(model, rules)
    rules_and_memory: tuple[Rules, Footprint] = model.known[key]
    return rules_and_memory


def _probe(model: Model) -> dict[int, list[Item]]:
    """One pair of random tokens, with a common prompt of 5, on which the rules are checked."""
    ids = probe_ids(model, 17, seed=1)
    chosen, rejected = ids[:11], np.concatenate([ids[:5], ids[11:]])
    return {0: [Item(0, "chosen", chosen, 5), Item(0, "rejected", rejected, 5)]}


def _check_against_autograd(model: Model, rules: Rules, parameters: Parameters) -> None:
    """‖g+ + g−/2‖² of a few tokens, ours against autograd's weight gradients, which are freed one by one. ModelError where they differ."""
    items = _probe(model)
    pair = EncodedPair(Encoded(items[0][0].ids, 5), Encoded(items[0][1].ids, 5), 5)
    cc, cr, rr = run(model, rules, items, [pair]).products[0].tolist()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    selected = [p for name, p in model.module.named_parameters() if name in set(rules.names)]

    def take(p: torch.Tensor) -> None:
        assert p.grad is not None
        total.add_(p.grad.double().square().sum())
        p.grad = None

    handles = [p.requires_grad_().register_post_accumulate_grad_hook(take) for p in selected]
    try:
        with torch.enable_grad(), begun_at(rules.layers[rules.first]) if rules.first is not None else nullcontext():
            loss = torch.zeros((), dtype=torch.float64, device=model.device)
            for item, weight in zip(items[0], (1.0, 0.5)):
                ids = torch.from_numpy(item.ids.astype(np.int64)).to(model.device)[None]
                model.reset_dynamic_rope()
                logits = model.module(input_ids=ids, use_cache=False).logits[0, item.start - 1 : -1]
                logp = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
                loss = loss + weight * logp.gather(1, ids[0, item.start :, None]).sum()
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for p in selected:
            p.requires_grad_(False)
            p.grad = None
    ours, theirs = cc + cr + rr / 4, float(total)
    tolerance = 0.1 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if np.isfinite(theirs) and not abs(ours - theirs) <= tolerance * (theirs + 1e-30):
        raise ModelError(
            f"{type(model.module).__name__}: the inner products of its gradients (parameters {parameters!r}) are not what autograd gives on a few "
            f"tokens ({ours:.6g} against {theirs:.6g}): some layer does something that our rules do not know.\n"
            "  Scores that read forward passes alone work for this model; please open an issue naming the architecture."
        )
