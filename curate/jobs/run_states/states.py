"""Latent states of training runs, from statistics of their weights; and which of them are detours.

    x_k    the fourteen statistics of checkpoint k (curate/jobs/run_states/weights.py), z-scored within its run
    states one Gaussian HMM over all runs, 1 to 8 states, as many as give runs that were left out of the fit the highest likelihood
    graph  which state followed which, counted over the runs' most likely paths
    detour a state whose visit goes with a later convergence: r > 0 between visited and the rank of the convergence time, two-sided
           permutation test p < 0.05 after Holm's correction over the states that can be tested

The two-sided p is the share of all ways to hand out as many visits whose |r| is at least the one found, so it is never above 1 (twice a
one-sided p, as released code takes it, can be) and never 0. A run that never converges ranks last. z-scores within a run carry what happens late in
it into its early checkpoints and back, so a detour can mark other states of the same runs: the earliest one flagged is where to look.
Source: Hu et al. 2023, arXiv:2308.09543; Holm 1979.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curate.errors import ModelError, UsageError
from curate.jobs.run_states.weights import checkpoint_tensors, weight_statistics
from curate.scores import hmm
from curate.scores.declared import Array

MOST_STATES = 8
FOLDS = 5
STARTS = 3
FLOOR = 0.1  # least variance of a state, of a run's own 1: less would split states by how long each run stays in them
EXACT = 100_000  # ways to hand out the visits that are counted one by one; above, as many are drawn
DETOUR = 0.05


@dataclass(frozen=True)
class Run:
    """One training run. statistics: (K, 14) in step order, raw. converged: the step it converged at, inf: never, NaN: nobody knows."""

    name: str
    steps: tuple[int, ...]
    statistics: Array
    converged: float = math.nan


@dataclass(frozen=True)
class State:
    """visits: names of the runs that were ever in it. checkpoints: how many. mean: (14,) in each run's standard deviations.

    r, p, p_holm: visited against the rank of the convergence time; NaN where every run or none visited it, or times are not known.
    """

    visits: tuple[str, ...]
    checkpoints: int
    mean: Array
    r: float
    p: float
    p_holm: float

    @property
    def detour(self) -> bool:
        return self.r > 0 and self.p_holm < DETOUR


@dataclass(frozen=True)
class RunStates:
    """heldout: number of states -> log-likelihood per checkpoint of runs left out. paths: run -> its state (0, 1, …) at every checkpoint.

    edges: (from, to) -> runs that went so, stays left out. States are numbered by when runs are in them, the earliest first.
    """

    states: tuple[State, ...]
    paths: dict[str, tuple[int, ...]]
    edges: dict[tuple[int, int], int]
    heldout: dict[int, float]


def read_run(folder: Path, *, converged: float = math.nan, allow_pickle: bool = False) -> Run:
    """A trainer's output folder as a Run: its checkpoints in step order, their statistics computed. ModelError where it is none.

    allow_pickle: weights that are pickles (pytorch_model.bin) are read, as tensors alone; UsageError for them otherwise.
    """
    from curate.models.checkpoints import find_checkpoints
    from curate.models.layouts import check_pickles

    checkpoints = find_checkpoints(str(folder.resolve()), Path())
    check_pickles([s.path for s in checkpoints], allowed=allow_pickle, key="--allow-pickle, or allow_pickle")
    if any(s.base for s in checkpoints):
        raise ModelError(
            f"{folder.name}: its checkpoints are LoRA adapters, and these statistics are of whole weights. Merge each into its base "
            "(peft: merge_and_unload, then save_pretrained)."
        )
    steps = tuple(i if s.step is None else s.step for i, s in enumerate(checkpoints))
    statistics = np.stack([weight_statistics(checkpoint_tensors(Path(s.path))) for s in checkpoints])
    return Run(folder.resolve().name, steps, statistics, converged)


def standardised(statistics: Array) -> Array:
    """(K, 14) z-scores within the run; NaN, so that it counts for nothing, where a statistic is unknown or never changes."""
    known = np.isfinite(statistics)
    values = np.where(known, statistics, np.nan)
    with np.errstate(invalid="ignore"):
        enough = known.sum(axis=0) > 1
        mean = np.where(enough, np.where(known, statistics, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)
        spread = np.sqrt(np.where(known, (values - mean) ** 2, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1))
        varies = spread > 1e-9 * np.abs(mean)
        return np.where(varies, (values - mean) / np.where(varies, spread, 1.0), np.nan)


def run_states(runs: Sequence[Run], *, most: int = MOST_STATES, seed: int = 0) -> RunStates:
    """States, paths, graph and detours of a sweep. Deterministic for a seed.

    Raises UsageError for fewer than three runs (nothing could be left out and compared), one name twice, or a run of one checkpoint.
    """
    names = [run.name for run in runs]
    if len(runs) < 3:
        raise UsageError(f"states are shared by the runs of a sweep: got {len(runs)} run(s), expected at least 3.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two runs are called {twice!r}; rename a folder.")
    for run in runs:
        if len(run.steps) < 2:
            raise UsageError(f"run {run.name!r} has {len(run.steps)} checkpoint, expected two at least (save_steps).")
    longest = max(len(run.steps) for run in runs)
    x = np.full((len(runs), longest, runs[0].statistics.shape[1]), np.nan)  # (R, K, 14)
    for i, run in enumerate(runs):
        x[i, : len(run.steps)] = standardised(run.statistics)
    informative = np.asarray(~np.isnan(x).all(axis=(0, 1)))
    if not informative.any():
        raise UsageError(
            "nothing about the weights changes in any of these runs; are the checkpoints copies of one another?"
        )
    x = x[:, :, informative]
    heldout = held_out(x, most=most, seed=seed)
    model = fitted(x, max(heldout, key=lambda s: heldout[s]), seed=seed)
    paths = _in_order(hmm.viterbi(model, hmm.log_emission(model, x)), [len(run.steps) for run in runs], runs)
    count = 1 + max(max(path) for path in paths.values())
    edges: Counter[tuple[int, int]] = Counter()
    for path in paths.values():
        edges.update({pair for pair in itertools.pairwise(path) if pair[0] != pair[1]})
    return RunStates(_states(runs, x, informative, paths, count, seed), paths, dict(sorted(edges.items())), heldout)


def held_out(x: Array, *, most: int, seed: int) -> dict[int, float]:
    """Number of states -> mean log-likelihood per checkpoint of the runs left out; (R, K, D) standardised. Folds of whole runs."""
    order = np.random.default_rng(seed).permutation(len(x))
    folds = [order[i :: min(FOLDS, len(x))] for i in range(min(FOLDS, len(x)))]
    points = int((~np.isnan(x).all(axis=-1)).sum())
    result = {}
    for states in range(1, min(most, points // len(x)) + 1):
        total = 0.0
        for fold in folds:
            model = fitted(np.delete(x, fold, axis=0), states, seed=seed)
            # a move nobody made is unlikely, not impossible: one in as many moves as were seen
            seen = int(np.prod(x.shape[:2]))
            open_ = hmm.Model(
                _softened(model.start, len(x)), _softened(model.transition, seen), model.mean, model.variance
            )
            total += float(hmm.posterior(open_, hmm.log_emission(open_, x[fold])).log_likelihood.sum())
        result[states] = total / points
    return result


def fitted(x: Array, states: int, *, seed: int) -> hmm.Model:
    """The most likely of several fits, each from k-means over all checkpoints. (R, K, D), NaN where unknown."""
    rng = np.random.default_rng([seed, states])
    best: tuple[float, hmm.Model] | None = None
    for _ in range(STARTS if states > 1 else 1):
        model, history = hmm.fit(_started(x, states, rng), x, floor=FLOOR, tolerance=1e-3)
        if best is None or history[-1] > best[0]:
            best = (history[-1], model)
    assert best is not None
    return best[1]


def visit_test(visited: Sequence[bool], times: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """(r, p): Pearson's r between visited (0 or 1) and the ranks of the times, and its two-sided permutation p, 0 < p ≤ 1.

    times: inf ranks last; runs with NaN are left out. NaNs where all or none visited, or all times are equal.
    """
    known = ~np.isnan(np.asarray(times, dtype=float))
    flags, ranks = np.asarray(visited, dtype=bool)[known], _ranks(np.asarray(times, dtype=float)[known])
    n, m = len(flags), int(flags.sum())
    if m in (0, n) or ranks.std() == 0:
        return math.nan, math.nan
    centred = ranks - ranks.mean()
    visited_sum = float(centred[flags].sum())  # r is this over a number that no permutation changes
    r = visited_sum / math.sqrt((centred**2).sum() * m * (n - m) / n)
    least = abs(visited_sum) - 1e-9 * np.abs(centred).sum()
    if math.comb(n, m) <= EXACT:
        sums = np.array([centred[list(subset)].sum() for subset in itertools.combinations(range(n), m)])
        return r, float((np.abs(sums) >= least).mean())
    rng = np.random.default_rng(seed)
    sums = np.array([rng.permutation(centred)[:m].sum() for _ in range(EXACT // 10)])
    return r, float((1 + (np.abs(sums) >= least).sum()) / (1 + len(sums)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction, at most 1; NaN stays NaN and does not count as a test."""
    order = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    result, so_far = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(order):
        so_far = max(so_far, min(1.0, value * (len(order) - rank)))
        result[i] = so_far
    return result


def convergence_step(history: Sequence[Mapping[str, float]], metric: str, reach: float, *, low: bool) -> float:
    """The first step at which a trainer's log (`log_history`) has the metric at `reach` or better; inf: never, NaN: never logged."""
    logged = [(e["step"], e[metric]) for e in history if metric in e and "step" in e]
    if not logged:
        return math.nan
    good = [step for step, value in sorted(logged) if (value <= reach if low else value >= reach)]
    return float(good[0]) if good else math.inf


def _states(
    runs: Sequence[Run], x: Array, informative: np.ndarray, paths: dict[str, tuple[int, ...]], count: int, seed: int
) -> tuple[State, ...]:
    times = [run.converged for run in runs]
    tests = [visit_test([s in paths[run.name] for run in runs], times, seed=seed) for s in range(count)]
    corrected = holm([p for _, p in tests])
    result = []
    for s, (r, p) in enumerate(tests):
        points = np.concatenate([x[i, : len(run.steps)][np.array(paths[run.name]) == s] for i, run in enumerate(runs)])
        mean = np.full(len(informative), np.nan)
        known = ~np.isnan(points)
        total = np.where(known, points, 0.0).sum(axis=0)
        mean[informative] = np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)
        visits = tuple(run.name for run in runs if s in paths[run.name])
        result.append(State(visits, len(points), mean, r, p, corrected[s]))
    return tuple(result)


def _in_order(paths: np.ndarray, lengths: Sequence[int], runs: Sequence[Run]) -> dict[str, tuple[int, ...]]:
    """Paths without padding, the states that occur numbered by the mean share of the run that has passed."""
    when: dict[int, list[float]] = {}
    for path, length in zip(paths, lengths):
        for at in range(length):
            when.setdefault(int(path[at]), []).append(at / (length - 1))
    order = sorted(when, key=lambda s: (float(np.mean(when[s])), s))
    return {
        run.name: tuple(order.index(int(s)) for s in path[:length]) for run, path, length in zip(runs, paths, lengths)
    }


def _started(x: Array, states: int, rng: np.random.Generator) -> hmm.Model:
    """k-means++ and ten rounds of k-means over the checkpoints, what is unknown taken as the run's mean (0)."""
    flat = np.where(np.isnan(x), 0.0, x)[~np.isnan(x).all(axis=-1)]  # (points, D)
    centres = flat[[rng.integers(len(flat))]]
    while len(centres) < states:
        away = ((flat[:, None] - centres) ** 2).sum(axis=-1).min(axis=1) + 1e-12
        centres = np.concatenate([centres, flat[[rng.choice(len(flat), p=away / away.sum())]]])
    for _ in range(10):
        nearest = ((flat[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
        centres = np.stack(
            [flat[nearest == s].mean(axis=0) if (nearest == s).any() else centres[s] for s in range(states)]
        )
    spread = np.maximum(flat.var(axis=0), FLOOR)
    stay = np.full((states, states), 0.2 / max(1, states - 1))
    np.fill_diagonal(stay, 0.8 if states > 1 else 1.0)
    return hmm.Model(np.full(states, 1 / states), stay, centres, np.tile(spread, (states, 1)))


def _softened(probability: Array, seen: int) -> Array:
    return (probability + 1 / seen) / (1 + probability.shape[-1] / seen)


def _ranks(values: Array) -> Array:
    """Ranks from 0, equal values sharing their mean."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    for value in np.unique(values):
        ranks[values == value] = ranks[values == value].mean()
    return ranks
