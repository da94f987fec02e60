"""POLCA: the change of each row's loss over a run, taken apart along the directions that the run moved in.

    part(x, t, b) = ⟨b, θ_{t+1} − θ_t⟩ · ∫_0^1 ⟨b, ∇ℓ_x(θ_t + u(θ_{t+1} − θ_t))⟩ du      nats
    Σ_b part(x, t, b) = ℓ_x(θ_{t+1}) − ℓ_x(θ_t)                                          completeness, up to the quadrature

B spans the deltas (passes/gradients/segments.py), so nothing is left out, and what the sum is off shows the quadrature's error. The integral is
composite Simpson over 5 equidistant nodes per segment, ends shared with its neighbours; a segment whose sum is off by more than the tolerance
gets 9, 17, … nodes, and keeps those it has; Gauss–Legendre's could neither be shared nor kept.

Source: Kangaslahti et al. 2025, arXiv:2506.15872 (there to second order in the step).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curate.passes.tokens import Encoded

if TYPE_CHECKING:
    from curate.passes.gradients.segments import Segments

Way = Literal["gradients", "forwards"]


@dataclass(frozen=True)
class Decomposition:
    """losses (rows, K) and parts (rows, K−1, r), nats per token; share (r,) of the path's squared length. Rows that could not be measured are NaN."""

    losses: np.ndarray
    parts: np.ndarray
    share: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Numbers of the rows that were measured everywhere."""
        return np.flatnonzero(np.isfinite(self.losses).all(1) & np.isfinite(self.parts).all((1, 2)))

    @property
    def n_directions(self) -> int:
        return self.parts.shape[2]

    def trajectories(self, direction: int | None) -> np.ndarray:
        """(rows, K) change of loss since the first checkpoint along one direction; None: of the plain loss."""
        if direction is None:
            return self.losses - self.losses[:, :1]
        steps = self.parts[:, :, direction]
        return np.concatenate([np.zeros((len(steps), 1)), np.cumsum(steps, axis=1)], axis=1)

    def loss_share(self) -> np.ndarray:
        """(r,) each direction's part of the mean change of loss over the whole run; they add up to 1. NaN where the loss did not change."""
        total = self.parts[self.rows].sum(1).mean(0)  # (r,)
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / total.sum()

    def completeness(self) -> dict[str, float]:
        """How far Σ_b part is from the real change, relative to the mean |Δℓ|.

        total: of the mean over rows, from the first checkpoint to the last, over the mean |change| there. mean, median, p90: of |error| per row and
        segment, over the mean |Δℓ| per row and segment; worst_segment: the largest mean of a segment over the same.
        """
        rows = self.rows
        real = np.diff(self.losses[rows], axis=1)  # (n, K−1)
        error = self.parts[rows].sum(2) - real
        unit, whole = np.abs(real).mean(), np.abs(real.sum(1)).mean()
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "total": float(abs(error.sum(1).mean()) / whole),
                "mean": float(np.abs(error).mean() / unit),
                "median": float(np.median(np.abs(error)) / unit),
                "p90": float(np.quantile(np.abs(error), 0.9) / unit),
                "worst_segment": float(np.abs(error).mean(0).max() / unit),
            }


def simpson(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """`nodes` (odd, 3 or more) equidistant nodes of [0, 1] and their weights, which add up to 1; exact for cubics."""
    weights = np.full(nodes, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    return np.linspace(0, 1, nodes), weights / weights.sum()


@dataclass
class Integrator:
    """Parts of one segment after another. losses (rows, K) as `checkpoint_losses` gives them.

    tolerance: mean |Σ_b part − Δℓ| of a segment over the mean |Δℓ| of all, above which its nodes are doubled, up to `most`.
    """

    segments: Segments
    encoded: Sequence[Encoded]
    losses: np.ndarray
    way: Way = "gradients"
    tolerance: float = 0.02
    most: int = 65
    token_budget: int = 16384
    count: Callable[[int], None] = lambda n: None  # called with 1 after every node
    _end: tuple[int, np.ndarray] | None = None  # a checkpoint and the derivatives there

    def parts(self, segment: int) -> tuple[np.ndarray, int]:
        """(rows, r) float64, nats per token, and how many nodes it took."""
        real = self.losses[:, segment + 1] - self.losses[:, segment]
        unit = np.nanmean(np.abs(np.diff(self.losses, axis=1)))
        known: dict[float, np.ndarray] = {}
        if self._end is not None and self._end[0] == segment:
            known[0.0] = self._end[1]
        nodes = 5
        while True:
            at, weights = simpson(nodes)
            for u in map(float, at):
                if u not in known:
                    self.segments.put(segment, u)
                    known[u] = self._derivatives()
                    self.count(1)
            integral = np.sum([w * known[u] for u, w in zip(map(float, at), weights)], axis=0)
            found = integral * self.segments.steps[:, segment]
            error = np.nanmean(np.abs(found.sum(1) - real))
            if not error > self.tolerance * unit or 2 * nodes - 1 > self.most:
                self._end = segment + 1, known[1.0]
                return found, nodes
            nodes = 2 * nodes - 1

    def _derivatives(self) -> np.ndarray:
        from curate.passes.gradients import projections

        derivatives = projections.by_gradients if self.way == "gradients" else projections.by_forwards
        return derivatives(self.segments.model, self.encoded, self.segments.basis, token_budget=self.token_budget)


def checkpoint_losses(segments: Segments, encoded: Sequence[Encoded], *, token_budget: int = 16384) -> np.ndarray:
    """(rows, K) float64 mean loss per completion token at every checkpoint, nats; NaN where a row has a problem."""
    from curate.passes.gradients.projections import row_losses

    losses = []
    for k in range(len(segments) + 1):
        segments.checkpoint(k)
        losses.append(row_losses(segments.model, encoded, token_budget=token_budget))
    return np.stack(losses, axis=1)


def decompose(
    segments: Segments, encoded: Sequence[Encoded], *, token_budget: int = 16384, **settings: Any
) -> Decomposition:
    """The whole of it in memory; settings: `Integrator`'s way, tolerance, most, count."""
    losses = checkpoint_losses(segments, encoded, token_budget=token_budget)
    integrator = Integrator(segments, encoded, losses, token_budget=token_budget, **settings)
    parts = [integrator.parts(t)[0] for t in range(len(segments))]
    return Decomposition(losses, np.stack(parts, axis=1), segments.share)
