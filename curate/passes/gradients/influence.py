"""Which training row taught this answer? Inner products of N rows' gradients with those of M targets, exactly or by factored projections.

    products[i, m] = ⟨g_i, g_m⟩        g = ∇_θ f        f of an SFT row: logp(completion); of a pair: its margin, logp(chosen) or logp(rejected)

A step of size η up f_i changes f_m by η·⟨g_i, g_m⟩ to first order. Summed over checkpoints with their learning rates this is TracIn (Pruthi et al.
2020, arXiv:2002.08484); cosines over LoRA parameters, LESS (Xia et al. 2024, arXiv:2402.04333) with plain gradients in place of Adam's.

exact      every target's gradient is kept, the training rows come by once              (passes/gradients/targets.py)
factored   one side of each weight's gradient is projected to k numbers                (passes/gradients/sketches.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.gradients.layer_rules import Parameters, Rules
from curate.passes.gradients.memory import SHARE, Footprint, free_for
from curate.passes.gradients.products import PER_PAIR
from curate.passes.gradients.rows import HEAD, Name, Scalar, Sink, prepared, rows_of, take
from curate.passes.gradients.sketches import Both, Projections, Sketches
from curate.passes.gradients.targets import Crossing, Targets
from curate.passes.layout import Item
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair

__all__ = ["CrossProducts", "cross_products"]

CHECKED = 4, 16  # targets and training rows among which a factored estimate is compared with the exact products


@dataclass(frozen=True)
class SketchError:
    """How far factored estimates are from the exact products, over `pairs` pairs of a training row and a target drawn at random.

    rms, worst: of (estimate − exact)/(‖g‖·‖g'‖), both norms exact. spread: standard deviation of the exact cosines themselves. correlation: of
    estimated and exact products over ‖g‖·‖g'‖; NaN under three pairs.
    """

    pairs: int
    rms: float
    worst: float
    spread: float
    correlation: float

    def __str__(self) -> str:
        return (
            f"estimates are off by {self.rms:.2g} of |g||g'| (rms; worst {self.worst:.2g}) where cosines vary by {self.spread:.2g}; "
            f"correlation with the exact products {self.correlation:.2f}, over {self.pairs} pairs"
        )


@dataclass(frozen=True)
class CrossProducts:
    """products (N, M) float64: ⟨g_i, g_m⟩, nats² per squared unit of weight; NaN where either row has a `problem`. train_norms (N,),
    target_norms (M,): ‖g‖. passes: how often the training rows were run. error: of factored estimates; None where they are exact, or where not
    even one target's gradient fits into memory to compare with.
    """

    products: np.ndarray
    train_norms: np.ndarray
    target_norms: np.ndarray
    passes: int = 1
    error: SketchError | None = None

    @property
    def cosines(self) -> np.ndarray:
        """(N, M) in [−1, 1]; NaN where a gradient is 0 or unknown."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.products / (self.train_norms[:, None] * self.target_norms[None, :])


def cross_products(
    model: Model,
    train: Sequence[Encoded | EncodedPair],
    targets: Sequence[Encoded | EncodedPair],
    *,
    parameters: Parameters = "all",
    of: Scalar = "margin",
    target_of: Scalar | None = None,
    factored: int | None = None,
    seed: int = 0,
    token_budget: int = 16384,
) -> CrossProducts:
    """⟨g_i, g_m⟩ of every training row with every target, and all norms.

    parameters: as in backward.measure: "all", "lora", or the last k layers. of, target_of: what of a pair is differentiated, "margin" (log-prob of
    chosen minus that of rejected), "chosen" or "rejected"; target_of None: as `of`. SFT rows have their completion's log-prob.

    factored: None for exact products; a number k for estimates from each weight's gradient with one side projected to k, drawn with `seed`: no
    gradient is made or kept, and `error` says what they are worth.

    Targets whose gradients do not fit into half of the free memory are taken in blocks, the training rows once per block. ModelError where a
    parameter has no rule, a row is too long, or not even one target fits.
    """
    rows, theirs = rows_of(train, of), rows_of(targets, target_of or of)
    products = np.full((len(train), len(targets)), np.nan)
    norms = np.full(len(train), np.nan), np.full(len(targets), np.nan)
    if not rows or not theirs:
        return CrossProducts(products, *norms, passes=0)
    together = rows | {-1 - m: items for m, items in theirs.items()}
    passes = _Passes(model, *prepared(model, together, parameters, token_budget))
    with torch.no_grad():
        if factored is None:
            result = _exact(passes, list(rows.values()), list(theirs.values()))
        else:
            result = _factored(passes, list(rows.values()), list(theirs.values()), factored, seed)
    products[np.ix_(list(rows), list(theirs))] = result.products
    norms[0][list(rows)], norms[1][list(theirs)] = result.train_norms, result.target_norms
    return replace(result, products=products, train_norms=norms[0], target_norms=norms[1])


@dataclass(frozen=True)
class _Passes:
    """A model ready to run; limit: tokens at a time."""

    model: Model
    rules: Rules
    memory: Footprint
    limit: int

    def run(self, rows: list[list[Item]], sink: Sink) -> None:
        """Runs forward and backward over the rows, and gives their gradients to the sink."""
        take(self.model, self.rules, self.memory, dict(enumerate(rows)), self.limit, sink)

    @property
    def shapes(self) -> dict[Name, tuple[int, int]]:
        """Shapes of the gradients that are taken: (o, i) of every weight, (n, d) of every embedding that is not the LM head too."""
        rules = self.rules
        weights = {HEAD: self.model.head.weight} if rules.head else {}
        weights |= {("weight", k): rule.weight for k, rule in enumerate(rules.linears) if rule.needs_weight}
        weights |= {("embedding", k): rule.table for k, rule in enumerate(rules.embeddings) if not rule.tied}
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}

    def by_tokens(self, targets: list[list[Item]]) -> frozenset[Name]:
        """The linear layers for which it is cheaper to keep the targets' inputs and output gradients, token by token, than their gradient
        matrices: with few and short targets and wide layers.
        """
        n = sum(len(item.ids) for items in targets for item in items)
        linears = {name: shape for name, shape in self.shapes.items() if name[0] == "weight"}
        return frozenset(name for name, (o, i) in linears.items() if n * (i + o + PER_PAIR) < o * i)

    def keeping(self, targets: list[list[Item]]) -> int:
        """Bytes that it takes to keep these targets' gradients."""
        n = sum(len(item.ids) for items in targets for item in items)
        by_tokens, numbers = self.by_tokens(targets), n * self.model.head.weight.shape[1]
        for name, (o, i) in self.shapes.items():
            if name[0] != "embedding":
                numbers += n * (o + i) if name in by_tokens else len(targets) * o * i
        return numbers * max(4, torch.finfo(self.model.dtype).bits // 8)

    def fit(self, targets: list[list[Item]]) -> int:
        """How many of the targets, from the first on, can be kept in half of the memory that may be taken."""
        free = SHARE / 2 * free_for(self.model)
        low, high = 0, len(targets)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.keeping(targets[:middle]) <= free else (low, middle - 1)
        return low

    def crossed(self, rows: list[list[Item]], targets: Targets) -> Crossing:
        """The products of the rows' gradients with those of the targets."""
        crossing = Crossing(self.model.head, targets, len(rows))
        self.run(rows, crossing)
        return crossing


def _exact(passes: _Passes, rows: list[list[Item]], targets: list[list[Item]]) -> CrossProducts:
    """Exact products: as many targets as fit into memory at a time, all rows once for each such block."""
    products, target_squares, left = [], [], targets
    while left:
        fit = passes.fit(left)
        if not fit:
            raise ModelError(
                f"{passes.model.path or type(passes.model.module).__name__}: one target's gradient needs {passes.keeping(left[:1]) / 1e9:.1f} GB, "
                f"{SHARE / 2 * free_for(passes.model) / 1e9:.1f} GB may be taken on {passes.model.device}.\n"
                '  Take factored=32 (projections), parameters="lora", or the last layers alone (parameters=2).'
            )
        some, left = left[:fit], left[fit:]
        kept = Targets(len(some), passes.shapes, passes.by_tokens(some), passes.model.device)
        passes.run(some, kept)
        crossing = passes.crossed(rows, kept)
        products.append(crossing.products)
        squares = crossing.squares
        target_squares.append(kept.squares())
        del kept, crossing  # which holds it too
    return _result(torch.cat(products, 1), squares, torch.cat(target_squares), passes=len(products))


def _factored(passes: _Passes, rows: list[list[Item]], targets: list[list[Item]], k: int, seed: int) -> CrossProducts:
    """Estimates from projected gradients. A random few rows and targets are computed exactly too, for `error`."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(x)) for x in (rows, targets)]  # the first ones are compared with the exact products
    rows, targets = ([x[i] for i in order] for x, order in zip((rows, targets), orders))
    n_rows, n_targets = min(CHECKED[1], len(rows)), min(CHECKED[0], len(targets), passes.fit(targets[: CHECKED[0]]))
    projections, device = Projections(passes.shapes, k, seed), passes.model.device
    theirs = Sketches(projections, len(targets), device, None)
    exact = Targets(n_targets, passes.shapes, frozenset(), device)
    _in_two(passes, targets, n_targets, theirs, exact)
    mine = Sketches(projections, len(rows), device, theirs)
    crossing = Crossing(passes.model.head, exact, n_rows) if n_targets else None
    _in_two(passes, rows, n_rows if n_targets else 0, mine, crossing)
    error = None
    if crossing is not None:
        error = _error(mine.products[:n_rows, :n_targets], crossing, exact.squares())
    back = [np.argsort(order) for order in orders]
    return _result(mine.products[np.ix_(*back)], mine.squares[back[0]], theirs.squares[back[1]], error=error)


def _in_two(passes: _Passes, rows: list[list[Item]], checked: int, sketches: Sketches, exact: Sink | None) -> None:
    """The first `checked` rows into both sinks, the others into the sketches alone."""
    if checked and exact is not None:
        passes.run(rows[:checked], Both(sketches, exact))
    if rest := dict(enumerate(rows[checked:], checked)):
        take(passes.model, passes.rules, passes.memory, rest, passes.limit, sketches)


def _error(estimates: torch.Tensor, crossing: Crossing, target_squares: torch.Tensor) -> SketchError:
    """How far the estimates (rows, targets) are from the exact products, as shares of ‖g‖·‖g'‖."""
    scale = (crossing.squares[:, None] * target_squares).sqrt()
    good = scale > 0
    x, y = (estimates / scale)[good].cpu().numpy(), (crossing.products / scale)[good].cpu().numpy()
    correlation = float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and y.std() > 0 else float("nan")
    off = np.abs(x - y)
    rms, worst = (float(np.sqrt(np.mean(off**2))), float(off.max())) if len(x) else (float("nan"),) * 2
    return SketchError(len(x), rms, worst, float(y.std()) if len(y) else float("nan"), correlation)


def _result(
    products: torch.Tensor,
    train_squares: torch.Tensor,
    target_squares: torch.Tensor,
    *,
    passes: int = 1,
    error: SketchError | None = None,
) -> CrossProducts:
    """The result from sums on the model's device: products (N, M), squared norms (N,) and (M,)."""
    return CrossProducts(
        products.cpu().numpy(),
        train_squares.sqrt().cpu().numpy(),
        target_squares.sqrt().cpu().numpy(),
        passes,
        error,
    )
