"""Which pairs a DPO run flipped between two of its checkpoints, and how it got there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.console import counted, table
from curate.errors import UsageError
from curate.store.runs import StoredRun

if TYPE_CHECKING:
    from curate.scores.flips import Flip


LINES = 9  # checkpoints of a run that the text shows; --json and the view dataset_values have all


@dataclass(frozen=True)
class Flips:
    """What one run flipped between two of its checkpoints: the table's cells, and the path there.

    to_right: the share of the wrong ones that became right, low and high its 95% interval, wrong how many there were.
    path: a dict a checkpoint from the first of the two to the second: checkpoint, ranking_accuracy, to_right and to_wrong (pairs), and the
    means of chosen_logp and rejected_logp in nats, over the pairs that are known at both ends.
    """

    run: str
    first: str
    last: str
    beta: float
    cells: list[Flip]
    wrong: int
    to_right: float
    low: float
    high: float
    path: list[dict[str, Any]]


def comparable(runs: list[StoredRun], between: tuple[int, int] | None) -> list[StoredRun]:
    """The runs with two checkpoints to compare, or with these two."""
    if between is None:
        return [run for run in runs if len(run.steps) > 1]
    with_both = [run for run in runs if set(between) <= set(run.steps)]
    if not with_both:
        have = "; ".join(f"{run.run or 'run'}: {', '.join(map(str, run.steps))}" for run in runs)
        raise UsageError(
            f"--between {between[0]},{between[1]}: no run has pairs measured at both steps. There are: {have or 'none'}."
        )
    return with_both


def flips_of(run: StoredRun, beta: float, between: tuple[int, int]) -> Flips:
    """What a run flipped from the first of these steps to the second. beta: DPO's, for the losses and margins of the cells."""
    from curate.scores.flips import flip_table, flipped_to_right
    from curate.scores.intervals import proportion_value
    from curate.scores.ranking import gap, right

    first, last = between
    i, j = run.steps.index(first), run.steps.index(last)
    chosen, rejected = run.values["chosen_logp"], run.values["rejected_logp"]
    c = gap(chosen, rejected)  # (rows, K)
    both = ~np.isnan(c[:, i] + c[:, j])
    ranked = right(c[both])
    path = []
    for k in range(i, j + 1) if i <= j else range(i, j - 1, -1):
        path.append(
            {
                "checkpoint": run.checkpoints[k],
                "ranking_accuracy": _mean(ranked[:, k]),
                "to_right": int((ranked[:, k] > ranked[:, i]).sum()),
                "to_wrong": int((ranked[:, k] < ranked[:, i]).sum()),
                "chosen_logp": _mean(chosen[both, k]),
                "rejected_logp": _mean(rejected[both, k]),
            }
        )
    became = proportion_value("flipped_to_right", flipped_to_right(c[:, i], c[:, j]))
    cells = flip_table(c[:, i], c[:, j], beta=beta)
    names = run.checkpoints[i], run.checkpoints[j]
    return Flips(run.run, *names, beta, cells, became.n, became.value, became.low, became.high, path)


def _mean(values: np.ndarray) -> float:
    """Of the known ones; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def flip_lines(f: Flips) -> list[str]:
    """The table of cells and the path between the two checkpoints, for people."""
    lines = [
        f"Pairs that {f.run} flipped from checkpoint {f.first} to {f.last} (β = {f.beta:g}; a tie is ranked right)."
    ]
    head = ("before", "now", "pairs", "share", "mean DPO loss", "mean reward margin")
    lines.append(table([(c.before, c.now, c.n, c.share, c.dpo_loss, c.reward_margin) for c in f.cells], head=head))
    if f.wrong:
        share = f"{f.to_right:.0%} ({f.low:.0%} to {f.high:.0%})"
        lines.append(counted(f"Of the {f.wrong:,} pairs ranked wrong before, {share} are ranked right now."))
    every = np.unique(np.linspace(0, len(f.path) - 1, LINES).round().astype(int))
    head = (
        "checkpoint",
        "ranking accuracy",
        "wrong → right",
        "right → wrong",
        "mean chosen_logp",
        "mean rejected_logp",
    )
    return [*lines, table([tuple(f.path[k].values()) for k in every], head=head)]
