"""The backward pass: how a row's log-probabilities would move each other, exactly, without a gradient of any weight.

    g± = ∇_θ logp(y±)      K++ = ⟨g+, g+⟩   K+− = ⟨g+, g−⟩   K−− = ⟨g−, g−⟩        over all parameters, or those asked for

One forward and one backward per batch; the forward's own measurements are read off the same states. A linear layer sees a shared prompt once
on the way forward and once per response on the way back (passes/gradients/capture.py); the head goes by blocks of the vocabulary
(passes/gradients/head.py); which parameters are understood is passes/gradients/layer_rules.py. A model is believed only after ‖g+ + g−/2‖² on a few
tokens agreed with the gradients of autograd itself. Memory: passes/gradients/memory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes import forward
from curate.passes.batch import Batch, write_columns
from curate.passes.bundles import NO_LIMIT, bundle_rows, check_lengths, items_of, join
from curate.passes.gradients.capture import Capture, begun_at
from curate.passes.gradients.graph_memory import Arena
from curate.passes.gradients.head import HeadGradient, head_gradient, tied_products
from curate.passes.gradients.layer_rules import Parameters, Rules, find_rules, probe_ids
from curate.passes.gradients.memory import Footprint, footprint
from curate.passes.gradients.pairs import PairProducts
from curate.passes.gradients.products import embedding_sums
from curate.passes.kernels import attention
from curate.passes.layout import Group, Item, Layout
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair

if TYPE_CHECKING:
    from curate.passes.contract import Measurement

__all__ = ["GradientBatch", "Parameters", "measure"]

TOKENS_ON_CPU = 512  # more tokens at a time cost memory there and gain nothing
APART = 192 << 20  # bytes of a graph from which on it is kept apart: a few percent of time for a third of the memory


class GradientBatch(Batch):
    """A batch of the forward pass that also has `products` (rows, 3) float64: ⟨g1, g1⟩, ⟨g1, g2⟩, ⟨g2, g2⟩ of each row's two responses, of
    their summed log-probabilities. SFT rows have one response: the other two are 0.
    """

    products: torch.Tensor
    of_head: HeadGradient

    @cached_property
    def _statistics(self) -> dict[str, torch.Tensor]:
        """Log-probabilities are there already; anything else of the head takes the forward pass's own sweep."""
        if not self._wanted <= {"logp", "lse"}:
            return Batch._statistics.func(self)  # type: ignore[attr-defined]
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
        wanted = [m for m in measurements if m.kind in (name, "any") and m not in apart]
        rows = [i for i, row in enumerate(encoded) if isinstance(row, kind) and row.problem is None]
        if wanted and rows:
            _measure_rows(model, encoded, rows, wanted, token_budget, parameters, out)
    return out


def _measure_rows(
    model: Model,
    encoded: Sequence[Encoded | EncodedPair],
    indices: list[int],
    wanted: list[Measurement],
    token_budget: int,
    parameters: Parameters,
    out: dict[str, np.ndarray],
) -> None:
    items = {i: items_of(i, encoded[i], False, None) for i in indices}
    check_lengths(model, items)
    check_angles(model, items)
    rules, memory = understood(model, parameters)
    limit = memory.check(model, items, token_budget)
    if model.device.type == "cpu":
        limit = min(limit, TOKENS_ON_CPU)
    for rows in _batches(model, items, limit):
        _measure_batch(model, rules, memory, {row: items[row] for row in rows}, encoded, wanted, out)


def check_angles(model: Model, items: dict[int, list[Item]]) -> None:
    """ModelError where a row is so long that its rotary angles depend on its company."""
    longest = max(len(item.ids) for row in items.values() for item in row)
    if model.rope_limit is not None and longest >= model.rope_limit:
        raise ModelError(
            f"{model.path}: a row has {longest} tokens; from {model.rope_limit} on this model's rotary angles depend on the longest row of a batch, "
            f"and gradients of such rows are not taken.\n  Set `--set tokens.max_length={model.rope_limit - 1}`."
        )


def _batches(model: Model, items: dict[int, list[Item]], limit: int) -> Iterator[list[int]]:
    """Rows with the same prompt side by side, at most `limit` tokens of the graph at a time; a longer row alone."""
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
    """Tokens that a batch has in the graph: every sequence whole, with padding in the padded layout."""
    lengths = [len(item.ids) for row in rows for item in row]
    return len(lengths) * max(lengths) if layout == "padded" else sum(lengths)


def _measure_batch(
    model: Model,
    rules: Rules,
    memory: Footprint,
    items: dict[int, list[Item]],
    encoded: Sequence[Encoded | EncodedPair],
    wanted: Sequence[Measurement],
    out: dict[str, np.ndarray],
) -> None:
    """One batch; halved and run again where a GPU's memory is short after all."""
    try:
        rows = list(items.values())
        again = memory.checkpointed(rows, model)
        apart = not again and model.device.type == "cpu" and memory.graph(rows) > APART
        batch = run(model, rules, items, encoded, wanted, checkpointed=again, apart=apart)
    except torch.OutOfMemoryError:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(items) == 1:
            raise memory.too_long(model, next(iter(items.values()))) from None
    else:
        with torch.no_grad():
            for m in wanted:
                write_columns(m, batch, out)
        return
    numbers = list(items)
    for part in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
        _measure_batch(model, rules, memory, {row: items[row] for row in part}, encoded, wanted, out)


def run(
    model: Model,
    rules: Rules,
    items: dict[int, list[Item]],
    encoded: Sequence[Encoded | EncodedPair],
    wanted: Sequence[Measurement] = (),
    *,
    checkpointed: bool = False,
    apart: bool = False,
) -> GradientBatch:
    """Forward and backward of one batch of whole rows, `items` their sequences, with its inner products. checkpointed: layers are run again on
    the way back. apart: activations are kept as in passes/gradients/graph_memory.py.
    """
    bundle = join(bundle_rows(items, NO_LIMIT))
    sequences = bundle.items
    shared = Layout.of(bundle.groups)
    layout = Layout.of([Group((item,), 0) for item in sequences])
    padded = model.layout == "padded"
    longest = max(len(item.ids) for item in sequences)
    starts = [i * longest for i in range(len(sequences))] if padded else [int(w[0]) for w in layout.where]
    n_tokens = longest * len(sequences) if padded else len(layout.ids)
    per_row = len(sequences) // len(bundle.rows)
    ends = [*starts[per_row::per_row], n_tokens]
    spans = [
        (starts[i], starts[i + 1] if per_row == 2 else end, end) for i, end in zip(range(0, len(starts), per_row), ends)
    ]
    first = line = None
    if not padded and len(shared.ids) < n_tokens:
        found = np.concatenate(shared.where)
        line = torch.from_numpy(found).to(model.device)
        first = torch.from_numpy(np.unique(found, return_index=True)[1]).to(model.device)
    around = None if padded else lambda: attention.packed(layout)
    apart &= not padded and n_tokens not in _heads(model)
    arena = Arena(n_tokens, first, line) if apart else None
    products = PairProducts(spans, model.device)
    capture = Capture(rules, products, n_tokens, first, line, checkpointed, arena, around)

    at = torch.from_numpy(
        np.concatenate([np.arange(s + i.start - 1, s + len(i.ids) - 1) for s, i in zip(starts, sequences)])
    ).to(model.device)
    tokens = torch.from_numpy(np.concatenate([i.ids[i.start :] for i in sequences]).astype(np.int64)).to(model.device)
    counts = np.cumsum([0] + [len(i.ids) - i.start for i in sequences])
    responses = [
        (int(counts[i]), int(counts[i + 1]), int(counts[i + per_row])) for i in range(0, len(sequences), per_row)
    ]
    with torch.enable_grad(), capture.installed():
        with arena.keeping() if arena else nullcontext():
            states = model.padded_states(sequences) if padded else model.packed_states(layout)  # (N, d)
        capture.forward_done()
        predicting = states.detach()[at]
        with torch.no_grad():
            of_head = head_gradient(model.head, predicting, tokens, responses, products=rules.head)
            slope = torch.zeros_like(states)
            slope[at] = of_head.slope.to(states.dtype)
        products.on_tied = _tied(model, products, of_head, predicting, tokens, responses)
        with packed_attention(model) if checkpointed and not padded else nullcontext():
            states.backward(slope)
    states = states.detach()
    where = [np.arange(s, s + len(i.ids)) for s, i in zip(starts, sequences)]
    if first is not None:
        states, where = states[first], shared.where
    batch = GradientBatch(
        model.head,
        bundle.rows,
        [encoded[row] for row in bundle.rows],
        sequences,
        where,
        states,
        {s for m in wanted for s in m.head},
    )
    batch.products, batch.of_head = products.found + of_head.products, of_head
    return batch


def _heads(model: Model) -> set[int]:
    """How many heads attention has: of as many tokens, its own tensors (1, heads, …) would be taken for tokens'."""
    config = model.module.config.get_text_config()
    return {getattr(config, name, 0) for name in ("num_attention_heads", "num_key_value_heads")}


@contextmanager
def packed_attention(model: Model) -> Iterator[None]:
    """The attention of packed rows for layers that are run again on the way back."""
    model.module.set_attn_implementation(attention.NAME)
    try:
        yield
    finally:
        model.module.set_attn_implementation(model.plain_attention)


def _tied(
    model: Model,
    products: PairProducts,
    of_head: HeadGradient,
    states: torch.Tensor,
    tokens: torch.Tensor,
    responses: list[tuple[int, int, int]],
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """What a matrix that is embedding and head at once adds when the embedding's gradient arrives."""

    def add(ids: torch.Tensor, g: torch.Tensor) -> None:
        for k, ((start, middle, stop), (a, b, c)) in enumerate(zip(products.spans, responses)):
            found, *sums = embedding_sums(ids[start:stop], g[start:stop], middle - start)
            one = (states[a:c], tokens[a:c], of_head.logp[a:c], of_head.lse[a:c])
            products.found[k] += tied_products(model.head, *one, b - a, found, (sums[0], sums[1]))

    return add


def understood(model: Model, parameters: Parameters) -> tuple[Rules, Footprint]:
    """The model's rules, checked once against autograd on a few tokens, and what a token costs in memory."""
    key = "gradients", parameters
    if key not in model.known:
        rules = find_rules(model, parameters)
        _check_against_autograd(model, rules, parameters)
        model.known[key] = rules, footprint(model, rules)
    found: tuple[Rules, Footprint] = model.known[key]
    return found


def _probe(model: Model) -> dict[int, list[Item]]:
    ids = probe_ids(model, 17, seed=1)
    chosen, rejected = ids[:11], np.concatenate([ids[:5], ids[11:]])
    return {0: [Item(0, "chosen", chosen, 5), Item(0, "rejected", rejected, 5)]}


def _check_against_autograd(model: Model, rules: Rules, parameters: Parameters) -> None:
    """‖g+ + g−/2‖² of a few tokens, ours against autograd's weight gradients, which are freed one by one. ModelError where they differ."""
    items = _probe(model)
    pair = EncodedPair(Encoded(items[0][0].ids, 5), Encoded(items[0][1].ids, 5), 5)
    cc, cr, rr = run(model, rules, items, [pair]).products[0].tolist()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    wanted = [p for name, p in model.module.named_parameters() if name in set(rules.names)]

    def take(p: torch.Tensor) -> None:
        assert p.grad is not None
        total.add_(p.grad.double().square().sum())
        p.grad = None

    handles = [p.requires_grad_().register_post_accumulate_grad_hook(take) for p in wanted]
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
        for p in wanted:
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
