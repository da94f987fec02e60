"""Each row's gradient projected on many directions of the weights: ⟨∇_θ ℓ, b⟩ for every row and every b, without a gradient being kept.

    ℓ = −logp(y)/T      mean loss per completion token, nats (target_nll)

By gradients. One forward and one backward per batch, for all r directions together. Of each linear layer the row's own gradient is formed
from its inputs A and its outputs' gradients B, multiplied with all directions, and let go:

    ⟨BᵀA, b⟩      T·i·o + r·i·o multiplications a row, against r·T·i·o for (A bᵀ)∘B, and 2 r forward passes for differences

By forwards, for any architecture: [ℓ(θ + εb) − ℓ(θ − εb)]/2ε, two packed forward passes per direction (passes/gradients/derivatives.py).
Measured for r = 9: 5 to 6 forward passes by gradients, 18 by forwards (benchmarks/projections.py).
The layers' gradients are those of passes/gradients/layer_rules.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes import forward
from curate.passes.bundles import CPU_BATCH, check_lengths
from curate.passes.gradients.capture import Capture, Shared
from curate.passes.gradients.derivatives import Line, derivatives
from curate.passes.gradients.head import Each, head_gradient
from curate.passes.gradients.layer_rules import Embedding, Linear, Norm, Rules, find_rules, probe_ids
from curate.passes.gradients.memory import Footprint, footprint
from curate.passes.gradients.products import wide
from curate.passes.gradients.segments import Directions
from curate.passes.layout import Item
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded

MATRIX = 1 << 21  # numbers of layers' gradients formed at a time
MATRIX_ON_GPU = 1 << 27
TOGETHER = 16  # rows that share one reading of a block of the directions
STEP = 1e-3  # ε of a unit direction, in parts of ‖θ‖, for differences in float32


def row_losses(model: Model, encoded: Sequence[Encoded], *, token_budget: int = 16384) -> np.ndarray:
    """(rows,) float64 ℓ at the model's present weights, by a packed forward pass; NaN where a row has a problem."""
    lengths = np.asarray([math.nan if row.problem else row.n_response for row in encoded])
    return -forward.response_logps(model, encoded, token_budget=token_budget)[:, 0] / lengths


def why_not_gradients(model: Model) -> str | None:
    """None where `by_gradients` has a rule for every parameter of this model, else the parameter that has none."""
    try:
        find_rules(model)
    except ModelError as reason:
        return str(reason).split("\n")[0]
    return None


def by_gradients(
    model: Model, encoded: Sequence[Encoded], directions: Directions, *, token_budget: int = 16384
) -> np.ndarray:
    """(rows, r) float64 ⟨∇ℓ, b⟩, nats per unit of b, at the model's present weights; NaN where a row has a problem.

    directions: {parameter's name: (r, *its shape)}, all parameters. Rows run padded, sorted by length. ModelError where a parameter has no rule,
    and where what comes out is not autograd's on a few tokens.
    """
    rules, memory = _rules(model, directions)
    count = len(next(iter(directions.values())))
    out = np.full((len(encoded), count), np.nan)
    items = {
        i: [Item(i, "completion", row.ids, row.start, row.counted)]
        for i, row in enumerate(encoded)
        if row.problem is None
    }
    if not items:
        return out
    check_lengths(model, items)
    longest = max(len(item.ids) for (item,) in items.values())
    if model.rope_limit is not None and longest >= model.rope_limit:
        raise ModelError(
            f"{model.path}: a row has {longest} tokens; from {model.rope_limit} on this model's rotary angles depend on the longest row of a batch.\n"
            f"  Set `--set tokens.max_length={model.rope_limit - 1}`."
        )
    limit = memory.check(model, items, token_budget)
    for batch in _batches(
        [item for (item,) in items.values()], min(limit, CPU_BATCH) if model.device.type == "cpu" else limit
    ):
        projected = _project_batch(model, rules, directions, batch)
        out[[item.row for item in batch]] = projected.cpu().numpy()
    return out


def by_forwards(
    model: Model, encoded: Sequence[Encoded], directions: Directions, *, token_budget: int = 16384, step: float = STEP
) -> np.ndarray:
    """The same by central differences, for any architecture whose forward pass can be measured. directions of unit length; step: ε/‖θ‖."""
    size = math.sqrt(sum(float(p.double().square().sum()) for p in model.module.parameters()))
    lengths = np.asarray([math.nan if row.problem else row.n_response for row in encoded])
    columns = []
    for k in range(len(next(iter(directions.values())))):
        with Line(model, {name: d[k] for name, d in directions.items()}) as line:
            along = derivatives(line, encoded, step * size, token_budget=token_budget)
        columns.append(-along.derivative[:, 0] / lengths)
    return np.stack(columns, axis=1)


def _batches(items: list[Item], limit: int) -> Iterator[list[Item]]:
    """Items of similar length together, at most `limit` tokens with padding; a longer one alone."""
    items = sorted(items, key=lambda item: -len(item.ids))
    at = 0
    while at < len(items):
        size = max(1, limit // len(items[at].ids))
        yield items[at : at + size]
        at += size


def _project_batch(model: Model, rules: Rules, directions: Directions, items: list[Item]) -> torch.Tensor:
    """(len(items), r) float64 ⟨∇ℓ, b⟩ of one batch of rows with every direction."""
    longest = max(len(item.ids) for item in items)
    along = _Projector(model, directions, len(items), longest)
    capture = Capture(rules, along, len(items) * longest)
    device = model.device
    at = np.concatenate([i * longest + t.targets - 1 for i, t in enumerate(items)])
    where = torch.from_numpy(at).to(device)  # (M,) positions that predict
    tokens = torch.from_numpy(np.concatenate([t.ids[t.targets] for t in items]).astype(np.int64)).to(device)
    counts = np.asarray([len(t.targets) for t in items])
    ends = np.cumsum([0, *counts])
    spans = [(int(a), int(b), int(b)) for a, b in itertools.pairwise(ends)]
    with torch.enable_grad(), capture.installed():
        states = _states(model, items)  # (N, d)
        capture.forward_done()
        predicting = states.detach()[where]
        with torch.no_grad():
            each = along.head(predicting, counts) if rules.head else None
            of_head = head_gradient(model.head, predicting, tokens, spans, products=False, each=each)
            slope = torch.zeros_like(states)
            slope[where] = of_head.slope.to(states.dtype)
        states.backward(slope)
    return -along.sums / torch.from_numpy(counts).to(device)[:, None]


def _states(model: Model, items: list[Item]) -> torch.Tensor:
    """(len(items) · longest, d). Nothing that counts looks at what stands behind a row, so there is no mask: behind one, a window of padding
    alone is a softmax over nothing, NaN in float64. A table of positions is read once per token, not once per batch: each reading has its own
    gradient.
    """
    longest = max(len(item.ids) for item in items)
    ids = torch.from_numpy(np.stack([np.resize(item.ids, longest) for item in items]).astype(np.int64)).to(model.device)
    if model.learned_positions is None:
        return model.states(ids).flatten(0, 1)
    positions = torch.arange(longest, device=model.device).repeat(len(items), 1)  # (rows, longest)
    return model.states(ids, position_ids=positions).flatten(0, 1)


class _Projector:
    """A taker (capture.py) that sums ⟨∇logp, b⟩ over the layers during one backward of padded rows: sums (rows, r) float64."""

    def __init__(self, model: Model, directions: Directions, rows: int, longest: int) -> None:
        self.directions = {id(p): directions[name] for name, p in model.module.named_parameters()}
        self.rows, self.longest, self.model = rows, longest, model
        count = len(next(iter(directions.values())))
        self.sums = torch.zeros(rows, count, dtype=torch.float64, device=model.device)

    def linear(
        self, rule: Linear, shared: Shared, rows: torch.Tensor, line: torch.Tensor | None, g: torch.Tensor
    ) -> None:
        b = wide(g).view(self.rows, self.longest, -1)
        if rule.needs_weight:
            a = wide(rows if line is None else rows[line]).view(self.rows, self.longest, -1)
            weight = self.directions[id(rule.module.weight)]
            is_linear = isinstance(rule.module, torch.nn.Linear)  # Conv1D keeps its weight the other way round
            self.sums += _contract(b, a, weight) if is_linear else _contract(a, b, weight)
        if rule.needs_bias:
            self._vector(b.sum(1), self.directions[id(rule.module.bias)])

    def norm(self, rule: Norm, x: torch.Tensor, g: torch.Tensor) -> None:
        for name, part in zip(("weight", "bias"), rule.gradients(x, g)):
            own = part.reshape(self.rows, self.longest, -1).sum(1)
            self._vector(own, self.directions[id(getattr(rule.module, name))])

    def embedding(self, rule: Embedding, ids: torch.Tensor, g: torch.Tensor) -> None:
        for k, table in enumerate(self.directions[id(rule.module.weight)]):
            per_token = (wide(table[ids]) * g).sum(1).view(self.rows, self.longest)
            self.sums[:, k] += per_token.sum(1, dtype=torch.float64)

    def head(self, states: torch.Tensor, counts: np.ndarray) -> Each:
        """A function of each block of the head's residuals q that adds the head's part: ∂logp/∂W = −qᵀh, ∂logp/∂b = −Σ q."""
        module = self.model.module.get_output_embeddings()
        weight, bias = self.directions[id(module.weight)], getattr(module, "bias", None)
        ends = np.cumsum([0, *counts])

        def each(where: tuple[int, int], block: slice, q: torch.Tensor) -> None:
            first, last = np.searchsorted(ends, where)
            own = slice(int(first), int(last))
            lines = _lines(counts[first:last], len(q)).to(q.device)  # (rows, most tokens)
            q, h = _padded(-q, lines), _padded(wide(states[slice(*where)]), lines)
            self.sums[own] += _contract(q, h, weight[:, block])
            if bias is not None:
                self._vector(q.sum(1), self.directions[id(bias)][:, block], own)

        return each

    def _vector(self, gradients: torch.Tensor, direction: torch.Tensor, own: slice = slice(None)) -> None:
        """Adds a vector's part (a bias, a norm's weight). gradients: (rows, n); direction: (r, *shape), n numbers each."""
        self.sums[own] += (gradients @ wide(direction.flatten(1)).T).double()


def _lines(counts: np.ndarray, n: int) -> torch.Tensor:
    """(rows, most) positions of each row's tokens among the n of all rows, which follow each other; n where a row has fewer than most."""
    at = np.cumsum([0, *counts])[:-1, None] + np.arange(max(counts))
    return torch.from_numpy(np.where(np.arange(max(counts)) < counts[:, None], at, n))


def _padded(x: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    """(n, k) -> (rows, most, k), 0 beyond a row's own tokens."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[lines]


def _contract(b: torch.Tensor, a: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """(R, T, o), (R, T, i), (r, o, i) -> (R, r) float64: Σ_t b_tᵀ D a_t, by each row's matrix BᵀA, in blocks of rows and of outputs."""
    rows, _, outputs = b.shape
    inputs = a.shape[2]
    limit = MATRIX_ON_GPU if b.is_cuda else MATRIX
    step = min(outputs, max(1, limit // (inputs * min(rows, TOGETHER))))
    together = max(1, limit // (step * inputs))
    products = torch.zeros(rows, len(direction), dtype=torch.float64, device=b.device)
    for start in range(0, outputs, step):
        d = wide(direction[:, start : start + step].reshape(len(direction), -1))  # (r, step · i)
        for i in range(0, rows, together):
            own = slice(i, i + together)
            matrices = torch.bmm(b[own, :, start : start + step].transpose(1, 2), a[own])  # (R', step, i)
            products[own] += (matrices.flatten(1) @ d.T).double()
    return products


def _rules(model: Model, directions: Directions) -> tuple[Rules, Footprint]:
    """The model's rules, checked once on a few tokens. ModelError where one is missing or wrong, or a parameter has no direction."""
    names = [name for name, _ in model.module.named_parameters()]
    if set(names) != directions.keys():
        odd = sorted(set(names) ^ directions.keys())
        raise ModelError(
            f"{model.path}: directions are wanted for exactly the model's parameters, but {odd[0]} is on one side only."
        )
    if "projections" not in model.known:
        rules = find_rules(model)
        _check_against_autograd(model, rules, directions)
        model.known["projections"] = rules, footprint(model, rules)
    rules_and_memory: tuple[Rules, Footprint] = model.known["projections"]
    return rules_and_memory


def _check_against_autograd(model: Model, rules: Rules, directions: Directions) -> None:
    """Two short rows, ours against autograd's weight gradients, which are freed one by one. ModelError where they differ."""
    ids = probe_ids(model, 19, seed=2)
    items = [Item(0, "completion", ids[:12], 5), Item(1, "completion", ids[12:], 3)]
    named = dict(model.module.named_parameters())
    count = len(next(iter(directions.values())))
    ours = _project_batch(model, rules, directions, items).sum(0)
    theirs, norm = torch.zeros_like(ours), torch.zeros(len(items), dtype=torch.float64, device=ours.device)

    def take(name: str, p: torch.Tensor, row: int) -> None:
        assert p.grad is not None
        theirs.add_((wide(directions[name]).reshape(count, -1) @ wide(p.grad).flatten()).double())
        norm[row] += p.grad.double().square().sum()
        p.grad = None

    try:
        for row, item in enumerate(items):
            handles = [
                p.requires_grad_().register_post_accumulate_grad_hook(lambda p, name=name, row=row: take(name, p, row))
                for name, p in named.items()
            ]
            try:
                with torch.enable_grad():
                    tokens = torch.from_numpy(item.ids.astype(np.int64)).to(model.device)[None]
                    model.reset_dynamic_rope()
                    logits = wide(model.module(input_ids=tokens, use_cache=False).logits[0, item.start - 1 : -1])
                    (-logits.log_softmax(-1).gather(1, tokens[0, item.start :, None]).mean()).backward()
            finally:
                for handle in handles:
                    handle.remove()
    finally:
        for p in named.values():
            p.requires_grad_(False)
            p.grad = None
    lengths = torch.stack([wide(d).flatten(1).square().sum(1).double() for d in directions.values()]).sum(0).sqrt()
    allowed = (0.1 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3) * norm.sqrt().sum() * lengths
    if bool(torch.isfinite(theirs).all()) and not bool(((ours - theirs).abs() <= allowed).all()):
        raise ModelError(
            f"{type(model.module).__name__}: its gradients along the directions are not what autograd gives on a few tokens: some layer does "
            'something that our rules do not know.\n  Differences of forward passes serve this model: way="forwards".'
        )
