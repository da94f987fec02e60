"""`threshold: auto`: τ of pre-memorization accuracy from held-out accuracies, before the scores that use it are computed.

Held-out accuracy is measured on the recipe's `heldout` rows at the same checkpoints, or imported as `test_accuracy`. `auto` fits one τ for
all rows, `auto_per_group` one for each value of the column that the score's `per` names (scores/calibration.py: how, and how it is judged).
The τ that was chosen stands among the dataset values as premem_threshold, with the range that it has when one run is left out, and is said
aloud.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import UsageError, did_you_mean
from curate.scores.premem import AUTO, group_names
from curate.store import DatasetValue

if TYPE_CHECKING:
    from curate.plan.plan import Plan
    from curate.plan.step import RequestedScore
    from curate.scores.calibration import Calibration, Run
    from curate.store import Store
    from curate.workflow.columns import Columns

IMPORTED = ("test_accuracy", "heldout_accuracy")
LOOSE = 0.2  # how much R² may lose when τ comes from the other runs, before that is a warning
WIDE = 2.0  # and how far the τ of left-out runs may lie apart
CLASSES = ("short", "middle", "long")


@dataclass(frozen=True)
class Calibrated:
    """A plan whose scores know their τ, the values that state it, and what to tell the user."""

    plan: Plan
    values: list[DatasetValue]
    notes: list[str]


def with_thresholds(store: Store, plan: Plan, train: Columns, heldout: Columns | None) -> Calibrated:
    """Every `auto` among the scores' thresholds replaced by what calibration finds; the plan as it is where there is none.

    train, heldout: the columns of the rows to score and of the held-out ones. UsageError where there is nothing to calibrate against.
    """
    params = [want.params for want in plan.wanted if {"threshold", "per"} <= want.params.keys()]
    given = [p["threshold"] for p in params]
    asked = [t for t in given if isinstance(t, str)]
    one_for_all = any(not isinstance(t, dict) for t in given)
    notes = floors(store, train, per=params[0]["per"], lengths=bool(asked)) if one_for_all else []
    if not asked:
        return Calibrated(plan, [], notes)
    chosen: dict[str, float | dict[str, float]] = {}
    values: list[DatasetValue] = []
    if "auto" in asked:
        calibration = _calibration(store, train, heldout)
        chosen["auto"] = calibration.threshold
        values.append(_value("premem_threshold", calibration))
        notes = [*_lines(calibration, ""), *notes]
    if "auto_per_group" in asked:
        per = _one_column([p["per"] for p in params if p["threshold"] == "auto_per_group"])
        of = {name: _calibration(store, train, heldout, Group(per, name)) for name in _groups(train, per)}
        chosen["auto_per_group"] = {group: c.threshold for group, c in of.items()}
        values += [_value(f"premem_threshold_{group}", c) for group, c in of.items()]
        notes = [line for group, c in of.items() for line in _lines(c, f" of group {group}")]
    wanted = [
        replace(want, params={**want.params, "threshold": chosen[want.params["threshold"]]})
        if "per" in want.params and isinstance(want.params.get("threshold"), str)
        else want
        for want in plan.wanted
    ]
    return Calibrated(replace(plan, wanted=wanted), values, notes)


@dataclass(frozen=True)
class Group:
    """The rows whose column `per` has one value."""

    per: str
    name: str

    def rows(self, columns: Columns) -> np.ndarray:
        """(rows,) bool."""
        return group_names(columns.own(self.per)) == self.name  # type: ignore[arg-type]


def _calibration(store: Store, train: Columns, heldout: Columns | None, group: Group | None = None) -> Calibration:
    from curate.scores.calibration import calibrate

    try:
        return calibrate(_runs(store, train, heldout, group))
    except ValueError as error:
        raise UsageError(f"threshold: {AUTO[0] if group is None else AUTO[1]}: {error}.") from None


def _runs(store: Store, train: Columns, heldout: Columns | None, group: Group | None) -> list[Run]:
    """Every run with the rows that it trained on (of one group), and the held-out accuracy at its checkpoints."""
    from curate.scores.calibration import Run

    rows = np.ones(len(train.row_ids), bool) if group is None else group.rows(train)
    runs, imported = [], imported_accuracies(store) if group is None else {}
    for series in train.runs("checkpoints"):
        read = [train.column("", name, "checkpoints", series) for name in ("accuracy", "target_nll")]
        if read[0] is None or read[1] is None:
            raise UsageError("threshold: auto is calibrated with premem_accuracy: add it to the recipe's scores.")
        accuracy, nll = read[0], read[1]
        kept = rows & np.isfinite(accuracy).any(axis=1)
        trained = train.trained(series)
        if trained is not None:
            kept &= trained.all(axis=1)
        known = [imported.get((series.run, step), math.nan) for step in series.steps]
        measured = heldout.column("", "accuracy", "checkpoints", series) if heldout is not None else None
        if measured is not None and heldout is not None:
            measured = measured if group is None else measured[group.rows(heldout)]
            own = [float(np.nanmean(v)) if np.isfinite(v).any() else math.nan for v in measured.T]
            known = [y if math.isnan(x) else x for x, y in zip(known, own, strict=True)]
        runs.append(Run(series.run, accuracy[kept], nll[kept], np.array(known, dtype=np.float64)))
    if not any(np.isfinite(run.heldout).any() for run in runs):
        where = "" if group is None else f" of group {group.name!r}"
        also = ", or import test_accuracy for each run and checkpoint" if group is None else ""
        raise UsageError(
            f"threshold: auto needs held-out accuracies{where}, and there are none. Name rows with answers as `heldout: {{path: …}}`{also}; "
            "or give τ in nats/token."
        )
    return [run for run in runs if len(run.accuracy)]


def calibrates(wanted: Iterable[RequestedScore]) -> bool:
    """Whether a score of these gets its τ from held-out accuracies: with them it is outdated."""
    return any(want.params.get("threshold") in AUTO for want in wanted if isinstance(want.params.get("threshold"), str))


def imported_accuracies(store: Store) -> dict[tuple[str, int | None], float]:
    """(run, step) -> held-out accuracy that was imported."""
    names = ", ".join(f"'{name}'" for name in IMPORTED)
    answer = store.sql(
        f"SELECT run, step, value FROM data.dataset_values WHERE starts_with(origin, 'import:') AND name IN ({names}) AND value IS NOT NULL"
    )
    return {(run, step): value for run, step, value in answer.rows()}


def _one_column(named: list[str]) -> str:
    """The column that groups are the values of; dataset values are named by group, so there is one such column in a recipe."""
    for other in named[1:]:
        if other != named[0]:
            raise UsageError(
                f"threshold: auto_per_group is asked for per {named[0]!r} and per {other!r}; one recipe calibrates per one column. "
                "Give every score with this threshold the same `per:`."
            )
    return named[0]


def _groups(train: Columns, per: str) -> list[str]:
    groups = train.own(per, False)
    if groups is None:
        have = [
            c
            for c in train.store.sql("SELECT * FROM occurrences LIMIT 0").columns
            if c not in ("row_id", "index", "role")
        ]
        hint = did_you_mean(per, have, f"it has {', '.join(have)}.")
        raise UsageError(
            f"threshold: auto_per_group: the source has no column {per!r}; {hint} Name a task, a topic or a length class: "
            "`{threshold: auto_per_group, per: COLUMN}`."
        )
    return np.unique(group_names(groups)).tolist()


def _value(name: str, c: Calibration) -> DatasetValue:
    """τ with the range that it has over the left-out runs; n: the checkpoints that it rests on."""
    others = list(c.left_out.values())
    low, high = (min(others), max(others)) if others else (None, None)
    return DatasetValue(name, c.threshold, low, high, c.in_sample.n)


def _lines(c: Calibration, where: str) -> list[str]:
    runs = max(len(c.left_out), 1)
    text = f"τ{where} = {c.threshold:.4g} nats/token, calibrated on {c.in_sample.n} checkpoints of {runs} run{'s' * (runs > 1)}"
    text += f": R² about y = x {c.in_sample.r2:.3f}"
    others = c.leave_one_run_out
    if others is None:
        return [text + ".", *(f"Note: {note}." for note in c.notes)]
    low, high = min(c.left_out.values()), max(c.left_out.values())
    lines = [f"{text}; {others.r2:.3f} with τ from the other runs ({low:.4g} to {high:.4g})."]
    if others.r2 < c.in_sample.r2 - LOOSE or high > WIDE * low:
        lines.append(
            f"This τ{where} does not transfer from run to run: do not use it for a run without held-out accuracies."
        )
    return lines + [f"Note: {note}." for note in c.notes]


def floors(store: Store, train: Columns, *, per: str, lengths: bool) -> list[str]:
    """Warnings where one τ cannot fit all: values of the column `per` (else sources), and classes of length, whose lowest NLL a token lies
    far apart.
    """
    from curate.scores.calibration import nll_floors

    series = train.runs("checkpoints")
    nll = train.column("", "target_nll", "checkpoints", series[0]) if series else None
    if nll is None or not len(nll):
        return []
    groupings: list[Any] = []
    own = train.own(per, False)
    if own is None:
        sources = dict(store.sql("SELECT row_id, source FROM rows").rows())
        own = np.array([sources.get(row_id) or "" for row_id in train.row_ids], dtype=object)
    groupings.append(own)
    tokens = train.column("", "completion_tokens", None, None) if lengths else None
    if tokens is not None and np.isfinite(tokens).any():
        classes = np.digitize(tokens, np.nanquantile(tokens, [1 / 3, 2 / 3]))
        groupings.append(np.array(CLASSES, dtype=object)[classes])
    known = np.isfinite(nll).any(axis=1)
    warnings = [nll_floors(nll[known], np.asarray(g)[known])[1] for g in groupings] if known.any() else []
    return [f"{w[:1].upper()}{w[1:]}" for w in warnings if w]
