"""Latent states of the training runs of a sweep, from their weights alone, and which states are detours on the way to convergence.

    python pipelines/run_states.py runs/seed0 runs/seed1 … [--metric eval_loss] [--reach 0.5] [--times times.csv] [--allow-pickle] [--json]

Each RUN is a trainer's output folder with checkpoint-<step>/ in it. When a run converged is read from its trainer's log (trainer_state.json):
the first step at which --metric reached --reach (without one: the worst of the runs' best values, which all reach); or from --times, a csv with
the columns run (the folder's name) and step (empty: never). Needs no GPU; singular values of large matrices take a while. Exit 0 done, 1
failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from curate.console import Progress, out, table, to_json, told
from curate.errors import CurateError, UsageError
from curate.jobs.run_states.states import DETOUR, MOST_STATES, Run, RunStates, convergence_step, read_run, run_states
from curate.jobs.run_states.weights import STATISTICS

METRIC = "eval_loss"
HIGH_IS_GOOD = ("accuracy", "reward", "margin", "f1", "score")  # in a metric's name; anything else is a loss


def states_of_sweep(
    folders: Sequence[Path],
    *,
    metric: str | None = None,
    reach: float | None = None,
    times: Path | None = None,
    most: int = MOST_STATES,
    allow_pickle: bool = False,
    quiet: bool = False,
) -> tuple[list[Run], RunStates]:
    """The runs with their convergence steps, and their states. UsageError, ModelError: what is wrong with a folder or the times."""
    names = labels(folders)
    converged = read_times(times, names) if times else logged(folders, metric, reach)
    runs = []
    progress = Progress(quiet=quiet)
    for folder, name, step in zip(folders, names, converged, strict=True):
        runs.append(replace(read_run(folder, allow_pickle=allow_pickle), name=name, converged=step))
        progress.say(f"{runs[-1].name}: {len(runs[-1].steps)} checkpoints")
    return runs, run_states(runs, most=most)


def labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart. UsageError for one folder twice."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UsageError(f"{next(f for f, p in zip(folders, parts) if parts.count(p) > 1)} is named twice.")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def logged(folders: Sequence[Path], metric: str | None, reach: float | None) -> list[float]:
    """Convergence steps from the trainers' logs; NaN for a run whose log does not have the metric. UsageError where one was named that none has."""
    logs = [history(folder) for folder in folders]
    if metric is not None and not any(metric in entry for log in logs for entry in log):
        raise UsageError(f"--metric {metric}: no run's log has it; {metrics_of(logs)}.")
    metric = metric or METRIC
    low = not any(word in metric for word in HIGH_IS_GOOD)
    best = [(min if low else max)(values) for log in logs if (values := [e[metric] for e in log if metric in e])]
    if not best:
        return [math.nan] * len(logs)
    level = reach if reach is not None else (max if low else min)(best)
    return [convergence_step(log, metric, level, low=low) for log in logs]


def metrics_of(logs: Sequence[list[dict[str, Any]]]) -> str:
    """What the trainers' logs can be asked for, in words."""
    names = sorted({name for log in logs for entry in log for name in entry} - {"step", "epoch"})
    return f"the logs have {', '.join(names)}" if names else "there are no trainers' logs (trainer_state.json)"


def history(folder: Path) -> list[dict[str, Any]]:
    """`log_history` of the longest trainer_state.json in a run's folder; [] where there is none."""
    found: list[dict[str, Any]] = []
    for file in [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]:
        try:
            entries = json.loads(file.read_text())["log_history"]
        except (OSError, ValueError, KeyError):
            continue
        found = max(found, entries, key=len)
    return found


def read_times(file: Path, names: Sequence[str]) -> list[float]:
    """Convergence steps from a csv with the columns run and step; an empty step is never. UsageError where a run is missing."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            found = {line["run"]: float(line["step"] or math.inf) for line in csv.DictReader(lines)}
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(f"{file}: expected a csv with the columns run and step, found: {error!r}.") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"{file}: no line for run {missing[0]!r} (it has {', '.join(found) or 'none'}).")
    return [found[name] for name in names]


def report(runs: Sequence[Run], found: RunStates) -> str:
    """The states, the graph and the detours as text."""
    curve = ", ".join(f"{count}: {value:.2f}" for count, value in found.heldout.items())
    lines = [
        f"{len(runs)} runs, {sum(len(run.steps) for run in runs)} checkpoints: {len(found.states)} states.",
        f"Log-likelihood per checkpoint of runs left out, by number of states: {curve}.",
        "",
    ]
    rows = []
    for number, state in enumerate(found.states):
        told = sorted(zip(state.mean, STATISTICS), key=lambda pair: -abs(pair[0]) if pair[0] == pair[0] else 0.0)[:3]
        words = ", ".join(f"{name} {mean:+.1f}" for mean, name in told if mean == mean)
        verdict = "DETOUR" if state.detour else ""
        rows.append((number, len(state.visits), state.checkpoints, state.r, state.p, state.p_holm, verdict, words))
    head = ("state", "runs", "checkpoints", "r", "p", "p (Holm)", "", "stands out by (its runs' standard deviations)")
    lines += [
        table(rows, head=head),
        "",
        table([(f"{a} → {b}", n) for (a, b), n in found.edges.items()], head=("move", "runs")),
    ]
    rows = [
        (run.name, "never" if run.converged == math.inf else run.converged, _short(found.paths[run.name]))
        for run in runs
    ]
    lines += ["", table(rows, head=("run", "converged at step", "states")), ""]
    if all(math.isnan(run.converged) for run in runs):
        lines.append(
            "When the runs converged is not known, so no state can be called a detour: give --metric or --times."
        )
    else:
        lines.append(
            f"r: visited against the rank of the convergence step; a detour has r > 0 and a two-sided permutation p below {DETOUR} after Holm's "
            "correction. States that every run visits cannot be tested. A correlation, not a cause; and as statistics are z-scored within "
            "a run, a detour can mark later states of its runs too: the first one is where to look. Fewer, clearer states: --most."
        )
    return "\n".join(lines)


def _short(path: Sequence[int]) -> str:
    """0 0 0 1 1 as 0×3 1×2."""
    parts: list[list[int]] = []
    for state in path:
        if parts and parts[-1][0] == state:
            parts[-1][1] += 1
        else:
            parts.append([state, 1])
    return " ".join(f"{state}×{count}" for state, count in parts)


def as_json(runs: Sequence[Run], found: RunStates) -> dict[str, Any]:
    """For machines: states are numbered from 0; NaN is null, never is "never"."""
    return {
        "heldout": found.heldout,
        "states": [
            {
                "state": number,
                "runs": list(state.visits),
                "checkpoints": state.checkpoints,
                **{
                    key: None if math.isnan(v) else v
                    for key, v in (("r", state.r), ("p", state.p), ("p_holm", state.p_holm))
                },
                "detour": state.detour,
                "mean": {name: None if math.isnan(v) else v for name, v in zip(STATISTICS, state.mean.tolist())},
            }
            for number, state in enumerate(found.states)
        ],
        "moves": [{"from": a, "to": b, "runs": n} for (a, b), n in found.edges.items()],
        "runs": [
            {
                "run": run.name,
                "converged": None
                if math.isnan(run.converged)
                else "never"
                if run.converged == math.inf
                else run.converged,
                "steps": list(run.steps),
                "states": list(found.paths[run.name]),
            }
            for run in runs
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a trainer's output folder")
    parser.add_argument("--metric", help=f"of the trainer's log (default {METRIC}, where it has that)")
    parser.add_argument("--reach", type=float, help="the metric's value that counts as converged")
    parser.add_argument("--times", type=Path, metavar="CSV", help="columns run, step: when each run converged")
    parser.add_argument("--most", type=int, default=MOST_STATES, help=f"states at most (default {MOST_STATES})")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read weights that are pickles (pytorch_model.bin), as tensors alone",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    a = parser.parse_args()
    try:
        runs, found = states_of_sweep(
            a.runs,
            metric=a.metric,
            reach=a.reach,
            times=a.times,
            most=max(1, a.most),
            allow_pickle=a.allow_pickle,
            quiet=a.quiet or a.json,
        )
        out(to_json(as_json(runs, found)) if a.json else report(runs, found))
    except CurateError as error:
        return told(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
