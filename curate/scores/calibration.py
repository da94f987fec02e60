"""τ, the threshold of pre-memorization accuracy, calibrated against held-out accuracy; and how well it predicts that accuracy.

    x = mean premem_t over the rows trained on, y = held-out accuracy, one point per run and checkpoint
    R² = 1 − Σ(y − x)² / Σ(y − ȳ)²             about y = x, so a biased prediction is punished; the squared correlation forgives it

τ is the one with the highest R². Fitted and judged on the same runs it flatters itself: leave_one_run_out fits it on the other runs.
Rivals stand beside it: train accuracy, the first checkpoint's accuracy (both about y = x, nothing fitted), and the mean NLL through
a line y = a + b·nll, fitted in the same two ways.
Source: Kang et al. 2024, arXiv:2411.07681, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from curate.scores.declared import Array
from curate.scores.premem import group_names, running

GRID = 200
REFINED = 41
DRAWS = 2000


@dataclass(frozen=True)
class Run:
    """One training run. accuracy, target_nll: (rows, K) of the rows it trained on, in step order, NaN where unmeasured.

    heldout: (K,) held-out accuracy, NaN where unknown (that checkpoint is then left out).
    """

    name: str
    accuracy: Array
    target_nll: Array
    heldout: Array

    def __post_init__(self) -> None:
        shape, points = np.shape(self.accuracy), np.shape(self.heldout)
        if len(shape) != 2 or np.shape(self.target_nll) != shape or points != shape[1:]:
            raise ValueError(
                f"run {self.name!r}: accuracy has shape {shape}, target_nll {np.shape(self.target_nll)}, heldout {points}; "
                "expected (rows, K), (rows, K) and (K,)"
            )


@dataclass(frozen=True)
class Fit:
    """How well x predicts y over points, one per run and checkpoint. r2: about y = x (at most 1, below 0 when worse than y's mean).

    low, high: 95% interval of r2, from resampling whole runs (NaN for one run). correlation2: squared Pearson correlation.
    r2 is NaN where y does not vary.
    """

    r2: float
    low: float
    high: float
    correlation2: float
    mean_error: float
    n: int


@dataclass(frozen=True)
class Point:
    """One run's checkpoint: predicted held-out accuracy, in-sample and with τ from the other runs, beside the measured one."""

    run: str
    checkpoint: int
    heldout: float
    premem: float
    premem_left_out: float


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found. threshold: τ in nats/token, fitted on all runs; left_out: run -> τ fitted on the others.

    in_sample, leave_one_run_out: the fit of premem with the one and the others. given: the fit at a τ that was asked about.
    baselines: name -> Fit; those called "… (line, in-sample)" and "… (line, leave-one-run-out)" had two numbers fitted, the others none.
    notes: what to keep in mind, in words.
    """

    threshold: float
    in_sample: Fit
    leave_one_run_out: Fit | None
    left_out: dict[str, float]
    given: Fit | None
    baselines: dict[str, Fit]
    points: list[Point]
    notes: list[str]


def r_squared(x: Array, y: Array) -> float:
    """1 − Σ(y − x)²/Σ(y − ȳ)². NaN where y does not vary or there are no points."""
    if len(y) == 0:
        return math.nan
    spread = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((y - x) ** 2).sum()) / spread if spread > 0 else math.nan


def calibrate(
    runs: Sequence[Run], *, threshold: float | None = None, grid: Array | None = None, seed: int = 0
) -> Calibration:
    """τ against held-out accuracy, over all runs and leaving one out. threshold: a τ to report the fit of, too.

    grid: candidate τ; by default 200, log-spaced over the NLLs seen and at their quantiles, and 41 more around the best.
    Raises ValueError where there is no checkpoint with held-out accuracy, or no row.
    """
    runs = [run for run in runs if np.isfinite(run.heldout).any()]
    if not runs:
        raise ValueError(
            "calibration needs a run with rows trained on and a held-out accuracy at one checkpoint at least"
        )
    y, owner = _heldout(runs)
    candidates = _grid(runs) if grid is None else np.unique(np.asarray(grid, dtype=np.float64))
    x = np.stack([premem_points(runs, tau) for tau in candidates])  # (grid, points)
    if grid is None and len(candidates) > 1:
        best = int(_best(x, y, candidates, np.full(len(y), True)))
        below, above = candidates[max(0, best - 1)], candidates[min(len(candidates) - 1, best + 1)]
        finer = np.geomspace(float(below), float(above), REFINED)[1:-1]
        x = np.concatenate([x, np.stack([premem_points(runs, tau) for tau in finer])])
        candidates = np.concatenate([candidates, finer])
    order = np.argsort(candidates)
    candidates, x = candidates[order], x[order]
    best = _best(x, y, candidates, np.full(len(y), True))
    fit = _fitter(y, owner, seed)

    several = len(runs) > 1
    chosen = [_best(x, y, candidates, owner != i) for i in range(len(runs))] if several else []
    predicted = np.array([x[chosen[run], p] for p, run in enumerate(owner)]) if several else np.full(len(y), np.nan)
    points = [(run.name, k) for run in runs for k in np.flatnonzero(np.isfinite(run.heldout))]
    notes = []
    if not several:
        notes.append("one run: no run can be left out, so the threshold is judged on the run that it was fitted on")
    if best in (0, len(candidates) - 1):
        notes.append(
            "the best threshold is at the end of the range that was tried: premem may be no better than a rival here"
        )
    return Calibration(
        threshold=float(candidates[best]),
        in_sample=fit(x[best]),
        leave_one_run_out=fit(predicted) if several else None,
        left_out={run.name: float(candidates[at]) for run, at in zip(runs, chosen)},
        given=None if threshold is None else fit(premem_points(runs, threshold)),
        baselines=_baselines(runs, y, owner, fit),
        points=[
            Point(name, int(k), float(y[p]), float(x[best, p]), float(predicted[p]))
            for p, (name, k) in enumerate(points)
        ],
        notes=notes,
    )


def premem_points(runs: Sequence[Run], threshold: float | Sequence[Array]) -> Array:
    """x: the mean premem of each run's checkpoints with held-out accuracy, (points,). threshold: one τ, or (rows,) per run."""
    means = []
    for i, run in enumerate(runs):
        tau = threshold[i] if isinstance(threshold, Sequence) else threshold
        means.append(_mean(running(run.accuracy, run.target_nll, tau))[np.isfinite(run.heldout)])
    return np.concatenate(means)


def calibrate_groups(runs: Mapping[str, Sequence[Run]], **settings: float) -> dict[str, Calibration]:
    """τ per group (source, task, length class): group -> its runs, each with the rows and the held-out accuracy of that group only."""
    return {group: calibrate(of_group, **settings) for group, of_group in runs.items()}  # type: ignore[arg-type]


def nll_floors(target_nll: Array, groups: np.ndarray, *, factor: float = 2.0) -> tuple[dict[str, float], str | None]:
    """Each group's irreducible NLL per token, and a warning when one τ cannot fit all.

    target_nll: (rows, K). The floor of a group is the median over its rows of the lowest NLL over checkpoints. The warning (None where
    there is nothing to warn of) says that two floors differ by more than `factor`.
    """
    known = ~np.isnan(target_nll).all(axis=1)
    lowest = np.nanmin(target_nll[known], axis=1)
    names = group_names(groups)[known]
    floors = {str(name): float(np.median(lowest[names == name])) for name in np.unique(names)}
    if len(floors) < 2:
        return floors, None
    low, high = min(floors, key=floors.__getitem__), max(floors, key=floors.__getitem__)
    if floors[high] <= factor * floors[low]:
        return floors, None
    return floors, (
        f"one threshold for all rows may not fit: at its best, {high!r} still has {floors[high]:.3g} nats/token, "
        f"{low!r} {floors[low]:.3g}. Calibrate one per group: `{{threshold: auto_per_group, per: COLUMN}}`."
    )


def _mean(values: Array) -> Array:
    """Mean over the rows that are known, (K,); NaN where none is."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _heldout(runs: Sequence[Run]) -> tuple[Array, np.ndarray]:
    """y, and the run that each point is of."""
    y = [np.asarray(run.heldout, float)[np.isfinite(run.heldout)] for run in runs]
    return np.concatenate(y), np.repeat(np.arange(len(runs)), [len(part) for part in y])


def _grid(runs: Sequence[Run]) -> Array:
    seen = np.concatenate([run.target_nll[np.isfinite(run.target_nll)] for run in runs])
    seen = seen[seen > 0]
    if not len(seen):
        raise ValueError("calibration needs target NLLs above 0; found none")
    low, high = np.quantile(seen, [0.005, 0.995])
    return np.unique(
        np.concatenate([np.geomspace(low, high, GRID // 2), np.quantile(seen, np.linspace(0.01, 0.99, GRID // 2))])
    )


def _best(x: Array, y: Array, candidates: Array, points: np.ndarray) -> int:
    """The candidate with the least squared error over the points; of equals, the middle one."""
    errors = ((x[:, points] - y[points]) ** 2).sum(axis=1)
    errors = np.where(np.isnan(errors), np.inf, errors)
    ties = np.flatnonzero(errors == errors.min())
    return int(ties[len(ties) // 2])


def _fitter(y: Array, owner: np.ndarray, seed: int) -> Fitter:
    return Fitter(y, owner, np.random.default_rng(seed).integers(0, owner.max() + 1, (DRAWS, owner.max() + 1)))


@dataclass(frozen=True)
class Fitter:
    """Judges predictions of one y, with the same resampled runs for each, so that intervals can be compared."""

    y: Array
    owner: np.ndarray
    draws: np.ndarray  # (DRAWS, runs)

    def __call__(self, x: Array) -> Fit:
        known = ~np.isnan(x)
        x, y, owner = x[known], self.y[known], self.owner[known]
        low, high = self._interval(x, y, owner)
        varies = len(y) > 1 and x.std() > 0 and y.std() > 0
        correlation = float(np.corrcoef(x, y)[0, 1]) if varies else math.nan
        error = float(np.abs(y - x).mean()) if len(y) else math.nan
        return Fit(r_squared(x, y), low, high, correlation**2, error, len(y))

    def _interval(self, x: Array, y: Array, owner: np.ndarray) -> tuple[float, float]:
        """From sums per run: a draw of runs adds them up."""
        runs = self.draws.shape[1]
        if runs < 2:
            return math.nan, math.nan
        sums = [
            np.bincount(owner, weights, runs)[self.draws].sum(axis=1) for weights in ((y - x) ** 2, y**2, y, y * 0 + 1)
        ]
        error, squares, total, n = sums
        with np.errstate(divide="ignore", invalid="ignore"):
            r2 = 1 - error / (squares - total**2 / n)
        r2 = r2[np.isfinite(r2)]
        low, high = np.quantile(r2, [0.025, 0.975]) if len(r2) else (math.nan, math.nan)
        return float(low), float(high)


def _baselines(runs: Sequence[Run], y: Array, owner: np.ndarray, fit: Fitter) -> dict[str, Fit]:
    accuracy, first, nll = [], [], []
    for run in runs:
        here = np.isfinite(run.heldout)
        means = _mean(run.accuracy)
        accuracy.append(means[here])
        first.append(np.full(here.sum(), means[0]))
        nll.append(_mean(run.target_nll)[here])
    loss = np.concatenate(nll)
    everyone = _line(loss, y, loss)
    result = {
        "train accuracy": fit(np.concatenate(accuracy)),
        "first checkpoint's train accuracy": fit(np.concatenate(first)),
        "train NLL (line, in-sample)": fit(everyone),
    }
    if len(runs) > 1:
        others = np.full(len(y), np.nan)
        for i in range(len(runs)):
            others[owner == i] = _line(loss[owner != i], y[owner != i], loss[owner == i])
        result["train NLL (line, leave-one-run-out)"] = fit(others)
    return result


def _line(x: Array, y: Array, at: Array) -> Array:
    """Least squares y = a + b·x, at other points. y's mean where x does not vary."""
    known = ~np.isnan(x)
    if not known.any():
        return np.full(len(at), np.nan)
    x, y = x[known], y[known]
    away = x - x.mean()
    slope = float((away * y).sum() / (away**2).sum()) if (away**2).sum() > 0 else 0.0
    return y.mean() + slope * (at - x.mean())
