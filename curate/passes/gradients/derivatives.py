"""What every row does along a direction v in weight space, without a row's gradient: ⟨g_i, v⟩, g_i = ∇ log π(y_i).

    ⟨g_i, v⟩ = [log π(y_i; θ + εv) − log π(y_i; θ − εv)] / 2ε          two runs of the forward pass, on any architecture
    the LM head's part alone   Σ_t ⟨r_t, V h_t⟩, V the head's direction   exact, one run

With ε such that rows move by some tenths of a nat, float32's rounding and the curvature are both small. ε is chosen on a sample of rows, against the
exact product of their gradients with v, and its error on that sample is reported. The weights are restored bit by bit.

Source: Pruthi et al. 2020, arXiv:2002.08484 (TracIn).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes import forward
from curate.passes.batch import Batch, Side
from curate.passes.contract import Measurement
from curate.passes.gradients.along import vector_products
from curate.passes.gradients.layer_rules import Parameters
from curate.passes.gradients.mean import Rows, Vector, accumulate, fixed_weights
from curate.passes.gradients.residuals import residuals
from curate.passes.loading.model import Model
from curate.passes.tokens import EncodedPair

MOVED = 0.2  # nats: how far ε moves a typical row of the sample
LADDER = (1.0, 0.25, 4.0)  # times that: the first that is good enough, else the best
GOOD = 5e-4  # error, as a share of the products' spread
SAMPLE = 8  # rows that ε is checked on
STATES = 512  # per block of logits


class Line:
    """θ + t·v: the model's weights on a line, put back bit by bit at the end of the `with` block. ModelError where a second copy of them does not
    fit into memory.
    """

    def __init__(self, model: Model, v: Vector) -> None:
        self.model, self.v = model, v
        self.parameters = {name: p for name, p in model.module.named_parameters() if name in v}

    def __enter__(self) -> Line:
        try:
            self.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        except torch.OutOfMemoryError:
            raise ModelError(
                f"{self.model.path}: the weights in {self.model.dtype} and a copy of them do not fit into the memory of {self.model.device}.\n"
                "  Take directions over the last layers alone: `--set gradients.parameters=2`."
            ) from None
        return self

    def __exit__(self, *exception: object) -> None:
        self.to(0.0)
        del self.kept

    @torch.no_grad()
    def to(self, t: float) -> None:
        """Sets the model's weights to θ + t·v; t = 0 restores them exactly."""
        for name, p in self.parameters.items():
            p.copy_(self.kept[name])
            if t:
                p.add_(self.v[name].to(p), alpha=t)


@dataclass(frozen=True)
class Along:
    """What rows do along a line, per unit of it. derivative (rows, sides) and logp (rows, sides) at its middle, float64, NaN where unmeasured; sides:
    chosen and rejected of pairs, the completion of SFT rows.
    """

    derivative: np.ndarray
    logp: np.ndarray


def derivatives(line: Line, encoded: Rows, epsilon: float, *, token_budget: int = 16384) -> Along:
    """⟨∇ log π(y), v⟩ of every row by two runs of the forward pass."""
    ends = []
    for t in (epsilon, -epsilon):
        line.to(t)
        ends.append(forward.response_logps(line.model, encoded, token_budget=token_budget))
    line.to(0.0)
    return Along((ends[0] - ends[1]) / (2 * epsilon), (ends[0] + ends[1]) / 2)


def exact_products(model: Model, encoded: Rows, v: Vector) -> np.ndarray:
    """(rows, sides) ⟨∇ log π(y), v⟩ over v's parameters by autograd's backward of each response and a float64 product: slow, on any
    architecture. `vector_products` gives it for many rows at once where every parameter has a rule.
    """
    sides = _sides(encoded)
    products = np.full((len(encoded), sides), np.nan)
    for i, row in enumerate(encoded):
        for side in range(sides) if row.problem is None else ():
            g = accumulate(model, [row], fixed_weights(*np.eye(sides)[side]), parameters=v.keys())
            products[i, side] = float(sum(g[name].mul_(v[name]).sum(dtype=torch.float64) for name in v))
    return products


def head_derivatives(model: Model, encoded: Rows, v: Vector, *, token_budget: int = 16384) -> np.ndarray:
    """(rows, sides) ⟨∇_W log π(y), v⟩ over the LM head alone, v as `accumulate_head` gives it: one run, exact, float64; NaN where unmeasured."""
    v = {name: value.to(model.device) for name, value in v.items()}
    pairs = _sides(encoded) == 2
    sides = ("chosen", "rejected") if pairs else ("completion",)

    def along(batch: Batch) -> dict[str, torch.Tensor]:
        return {name: _head_along(batch, getattr(batch, name), v) for name in sides}

    kind = "preference" if pairs else "sft"
    units = dict.fromkeys(sides, "nats per unit of step")
    m = Measurement("head_along", "forward", kind, units, 1, along, head=("logp", "lse"))  # type: ignore[arg-type]
    columns = forward.measure(model, encoded, [m], token_budget=token_budget)
    return np.stack([columns[name] for name in sides], 1)


def _head_along(batch: Batch, side: Side, v: Vector) -> torch.Tensor:
    """(rows,) float64: Σ_t ⟨r_t, V h_t⟩ over the tokens of each row's response, by blocks of the vocabulary and of states."""
    per_token = torch.zeros(len(side.tokens), dtype=torch.float64, device=side.tokens.device)
    logp, lse = side.logp, side.lse
    for i in range(0, len(side.tokens), STATES):
        rows = slice(i, i + STATES)
        h = batch.all_states[side.at[rows]]
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        for block in batch.head.blocks():
            r = residuals(batch.head, h, side.tokens[rows], logp[rows], lse[rows], block)  # (n, width)
            z = h @ v["weight"][block].to(h.dtype).T
            if "bias" in v:
                z += v["bias"][block].to(h.dtype)
            per_token[rows] += (r * z).sum(1, dtype=torch.float64)
    return side.sum(per_token)


def _sides(encoded: Rows) -> int:
    """How many responses a row has: 2 of pairs, 1 of SFT rows."""
    return 2 if any(isinstance(row, EncodedPair) for row in encoded) else 1


@dataclass(frozen=True)
class Epsilon:
    """A step length and how exact float32 is with it, on `rows` rows. error: root mean square over the spread (standard deviation) of the exact
    products, the worse of the responses' and the margins'. rank: Spearman's correlation, the lower of the two.
    """

    value: float
    error: float
    rank: float
    rows: int

    def __str__(self) -> str:
        return (
            f"ε {self.value:.2g}: off by {self.error:.1e} of the spread, Spearman {self.rank:.5f} on {self.rows} rows"
        )


def choose_epsilon(line: Line, encoded: Rows, *, sample: int = SAMPLE, token_budget: int = 16384) -> Epsilon:
    """The step length for derivatives along a line, checked against exact products on rows spread evenly over those that can be measured.
    ModelError where there are none, or where the products are not finite.
    """
    known = [row for row in encoded if row.problem is None]
    if not known:
        raise ModelError(f"none of {len(encoded):,} rows can be measured: there is nothing to choose a step length on.")
    picked = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, min(sample, len(known))).round().astype(int))]
    parameters: Parameters = "lora" if all("lora_" in name for name in line.v) else "all"
    try:
        exact = vector_products(line.model, picked, line.v, parameters=parameters, token_budget=token_budget)
    except ModelError:  # a parameter without a rule
        exact = exact_products(line.model, picked, line.v)
    typical = float(np.sqrt(np.mean(exact**2)))
    if not np.isfinite(typical):
        raise ModelError(f"{line.model.path}: the rows' gradients, or the direction itself, are not finite.")
    if typical == 0:
        return Epsilon(1.0, 0.0, 1.0, len(picked))  # nothing moves
    best: Epsilon | None = None
    for factor in LADDER:
        value = factor * MOVED / typical
        differences = derivatives(line, picked, value, token_budget=token_budget).derivative
        compared = [(_columns(differences)[:, i], _columns(exact)[:, i]) for i in range(_columns(exact).shape[1])]
        error = float(np.max([np.sqrt(np.mean((a - b) ** 2)) / (b.std() or typical) for a, b in compared]))
        rank = float(np.min([spearman(a, b) for a, b in compared]))
        tried = Epsilon(value, error, rank, len(picked))
        if best is None or error < best.error or np.isnan(best.error):
            best = tried
        if error <= GOOD:
            break
    assert best is not None
    return best


def _columns(values: np.ndarray) -> np.ndarray:
    """(rows, 1) as it is; (rows, 2) with the margin beside: (rows, 3)."""
    return values if values.shape[1] == 1 else np.column_stack([values, values[:, 0] - values[:, 1]])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks (without ties); 1 where there are fewer than two, NaN where a value is."""
    if np.isnan([*a, *b]).any():
        return float("nan")
    if len(a) < 2:
        return 1.0
    first, second = (np.argsort(np.argsort(x)) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])
