"""What a store says about whole datasets: `curate summary`.

Summaries read dataset values as they were scored, calibrate τ of pre-memorization accuracy where held-out accuracies are known (imported
as `test_accuracy`, or measured on the recipe's `heldout` rows), and tell which pairs a DPO run has flipped (flips.py) where log-probabilities of both
responses are known at two of its checkpoints or more.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.console import table, wrapped
from curate.plan.beta import dpo_beta
from curate.plan.imported import imported_values
from curate.recipe.yaml import read_yaml
from curate.report.cut import cut_answers, cut_lines
from curate.report.flips import LINES, Flips, comparable, flip_lines, flips_of
from curate.scores.words import heading
from curate.store import Store
from curate.store.runs import stored_runs
from curate.store.sql import quote

if TYPE_CHECKING:
    from curate.scores.calibration import Calibration

HELDOUT = ("test_accuracy", "heldout_accuracy")
OF_FLIPS = ("flips_", "flipped_")  # dataset values that the flip table shows better
OF_PHASES = "phase_"


@dataclass(frozen=True)
class Summary:
    """values: the lines of the view dataset_values. calibration: None where held-out accuracies are not known. flips: one a run of DPO.

    scores: a dict for each score of the recipe: name, known (rows that have a value), rows. scored: whether the recipe has been. imported: of
    `imported_values`. cut: of `cut_answers`.
    """

    recipe: str | None
    values: list[dict[str, Any]]
    calibration: Calibration | None
    threshold: float | None
    flips: list[Flips]
    scores: list[dict[str, Any]] = field(default_factory=list)
    scored: bool = False
    imported: list[dict[str, Any]] = field(default_factory=list)
    cut: list[dict[str, Any]] = field(default_factory=list)

    def text(self, *, everything: bool = False) -> str:
        """For people: values under plain headings. everything: the idealised ranking accuracies one by one, too."""
        shown = {f.run for f in self.flips}
        phases = [v for v in self.values if v["name"].startswith(OF_PHASES)]
        values = [v for v in self.values if not (v["run"] in shown and _in_flips(v["name"])) and v not in phases]
        parts = self._scores()
        for name in dict.fromkeys(heading(v["name"]) for v in values):
            parts.append([name + ":", *_value_lines([v for v in values if heading(v["name"]) == name], everything)])
        if self.cut:
            parts.append(cut_lines(self.cut))
        if self.imported:
            parts.append(_imported_lines(self.imported))
        parts += [flip_lines(flips) for flips in self.flips]
        for run in dict.fromkeys(v["run"] for v in phases):
            parts.append(_phase_lines(run, [v for v in phases if v["run"] == run]))
        if self.calibration is not None:
            parts.append(_calibration_lines(self.calibration, self.threshold))
        return wrapped("\n\n".join("\n".join(part) for part in parts))

    def _scores(self) -> list[list[str]]:
        """What is scored, what of it is unknown, and why there are no values about the whole set where there are none."""
        if not self.scored:
            if self.values or self.flips:
                return []
            why = (
                f"recipe {self.recipe!r} is not scored yet"
                if self.recipe
                else "no recipe has been scored into this store yet"
            )
            return [[f"No values: {why}. `curate score RECIPE` does that, `curate run RECIPE` measures first."]]
        known = ", ".join(f"{s['name']} ({s['known']:,} of {s['rows']:,} rows)" for s in self.scores)
        lines = [f"Scored by recipe {self.recipe!r}: {known or 'nothing, it names no scores'}."]
        nothing = [s["name"] for s in self.scores if s["rows"] and not s["known"]]
        if nothing:
            lines.append(
                f"Unknown in every row: {', '.join(nothing)}. What they need is not measured, or not known of any row: `curate score RECIPE` says "
                "which, `curate measure RECIPE` measures what is missing."
            )
        if not (self.values or self.flips):
            lines.append(
                "There are no values about the whole set: they come with log-probabilities of both responses (ranking accuracy), with answers or "
                "likelihoods over checkpoints (accuracy, pre-memorization accuracy), and with scores that need them."
            )
        return [lines]

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "scored": self.scored,
            "scores": self.scores,
            "values": self.values,
            "imported": _plain(self.imported),
            "cut": _plain(self.cut),
            "calibration": None if self.calibration is None else _plain(asdict(self.calibration)),
            "flips": [_plain({**asdict(f), "cells": [c._asdict() for c in f.cells]}) for f in self.flips],
        }


def summarise(store: Store, *, recipe: str | None = None, between: tuple[int, int] | None = None) -> Summary:
    """Dataset-level values with intervals, τ against held-out accuracy, flips. recipe: as this one measured (None: the one scored last).

    between: the two steps of the flip table (None: a run's first and last). UsageError where no run has both.
    """
    values = store.sql(
        "SELECT name, run, checkpoint, step, value, low, high, n FROM dataset_values "
        "ORDER BY run, contains(name, 'idealised'), name, step",  # 16 idealised ones come after what was measured
        recipe=recipe,
    ).to_dicts()
    known = store.recipes()
    mine = next((r for r in known if recipe in (None, r["name"])), None)
    threshold = setting(mine, "threshold", of="premem_accuracy")
    beta = _beta(mine)
    runs = stored_runs(store, ("chosen_logp", "rejected_logp"), kind="preference", recipe=mine)
    flips = [flips_of(run, beta, between or (run.steps[0], run.steps[-1])) for run in comparable(runs, between)]
    name = mine["name"] if mine else None
    calibration = _calibrate(store, mine, values, threshold)
    scored = name is not None and store.inputs_hash("scores", name) is not None
    of_scores = _known(store, mine) if mine and scored else []
    imported, cut = imported_values(store, recipe or name), cut_answers(store, recipe or name)
    return Summary(name, values, calibration, threshold, flips, of_scores, scored, imported, cut)


def _known(store: Store, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """name, known, rows of every score that a recipe has in the view `scored`."""
    from curate.recipe.schema import ScoreRequest

    requests = [ScoreRequest.read(entry) for entry in (read_yaml(recipe["text"])[0] or {}).get("scores") or []]
    there = store.sql("SELECT * FROM scored LIMIT 0", recipe=recipe["name"]).columns
    names = [request.name for request in requests if request.name in there]
    picked = ", ".join(["count(*)", *(f"count({quote(name)})" for name in names)])
    rows, *known = store.sql(
        f"SELECT {picked} FROM scored WHERE role = 'train' OR role IS NULL", recipe=recipe["name"]
    ).row(0)
    return [{"name": name, "known": n, "rows": rows} for name, n in zip(names, known, strict=True)]


def _value_lines(values: list[dict[str, Any]], everything: bool) -> list[str]:
    """One heading's values as a table; columns that say nothing are left out, idealised accuracies shown by their range."""
    idealised = [v for v in values if "idealised" in v["name"]]
    lines = []
    if idealised and not everything:
        for name in dict.fromkeys(v["name"].rpartition("_")[0] for v in idealised):
            of_name = [v for v in idealised if v["name"].rpartition("_")[0] == name and v["value"] is not None]
            ends = {v["name"].rpartition("_")[2]: v["value"] for v in of_name}
            if {"min", "max"} <= ends.keys():
                lines.append(
                    f"{name}: {ends['min']:.4g} to {ends['max']:.4g} over β from 0.01 to 10 ({of_name[0]['n']:,} rows)"
                )
        lines.append(f"(`--all` lists the {len(idealised)} of them)")
        values = [v for v in values if v not in idealised]
    if not values:
        return lines
    rows = [(v["name"], v["run"] or None, v["checkpoint"] or None, v["value"], _interval(v), v["n"]) for v in values]
    head = ("what", "run", "checkpoint", "estimate", "95% interval", "rows")
    used = [i for i in range(len(head)) if i in (0, 3) or any(row[i] not in (None, "-") for row in rows)]
    return [*lines, table([[row[i] for i in used] for row in rows], head=[head[i] for i in used])]


def _imported_lines(columns: list[dict[str, Any]]) -> list[str]:
    """A line an imported column: numbers by their spread, others by how many different values they have."""
    lines = []
    for view, title in (("scored", "Imported columns"), ("trajectories", "Imported, at each checkpoint")):
        in_view = [c for c in columns if c["over"] == view]
        numbers, others = [c for c in in_view if c["min"] is not None], [c for c in in_view if c["min"] is None]
        parts = []
        if numbers:
            rows = [(c["name"], c["rows"], c["min"], c["median"], c["max"], c["import"]) for c in numbers]
            parts.append(table(rows, head=("column", "rows with a value", "min", "median", "max", "import")))
        if others:
            other = [(c["name"], c["rows"], c["distinct"], c["import"]) for c in others]
            parts.append(table(other, head=("column", "rows with a value", "different values", "import")))
        lines += [title + ":", *parts] if parts else []
    return lines


def _beta(recipe: dict[str, Any] | None) -> float:
    """DPO's β of a kept recipe."""
    from curate.recipe.schema import ScoreRequest

    raw = (read_yaml(recipe["text"])[0] or {}) if recipe else {}
    given = (raw.get("forecast") or {}).get("beta")
    return dpo_beta(given, [ScoreRequest.read(entry) for entry in raw.get("scores") or []])


def setting(recipe: dict[str, Any] | None, key: str, *, of: str | None = None) -> float | None:
    """A number that the recipe sets for a score (of any, if None), the first one."""
    for entry in (read_yaml(recipe["text"])[0] or {}).get("scores") or [] if recipe else []:
        for score, params in entry.items() if isinstance(entry, dict) else ():
            value = params.get(key) if isinstance(params, dict) and of in (None, score) else None
            if isinstance(value, int | float):
                return float(value)
    return None


def _calibrate(
    store: Store, recipe: dict[str, Any] | None, values: list[dict[str, Any]], threshold: float | None
) -> Calibration | None:
    from curate.scores.calibration import Run, calibrate

    heldout = {
        (v["run"], v["step"]): v["value"]
        for name in reversed(HELDOUT)
        for v in values
        if v["name"] == name and v["value"] is not None
    }
    if not heldout:
        return None
    runs = []
    for run in stored_runs(store, ("accuracy", "target_nll"), kind="sft", recipe=recipe, optional=("trained",)):
        if not any((run.run, s) in heldout for s in run.steps):
            continue
        known = np.isfinite(run.values["accuracy"]).any(axis=1)
        if "trained" in run.values:
            known &= (run.values["trained"] != 0).all(axis=1)
        heldout_of = np.array([heldout.get((run.run, s), math.nan) for s in run.steps], float)
        runs.append(Run(run.run, run.values["accuracy"][known], run.values["target_nll"][known], heldout_of))
    return calibrate(runs, threshold=threshold) if runs else None


def _in_flips(name: str) -> bool:
    return name.startswith(OF_FLIPS) or name == "ranking_accuracy"


def _phase_lines(run: str, values: list[dict[str, Any]]) -> list[str]:
    """A line a checkpoint: the share of the rows in every phase with its interval."""
    from curate.scores.phases import NAMES

    at = {(v["step"], v["name"]): v for v in values}
    steps = sorted({v["step"] for v in values if v["step"] is not None})
    lines = [f"Phases of the rows that {run or 'the run'} trained on: shares with 95% intervals."]
    rows = []
    for k in np.unique(np.linspace(0, len(steps) - 1, LINES).round().astype(int)) if steps else ():
        line = [at[steps[k], f"{OF_PHASES}{name}"] for name in NAMES]
        shares = ["-" if v["value"] is None else f"{v['value']:.2f} ({v['low']:.2f} to {v['high']:.2f})" for v in line]
        rows.append((line[0]["checkpoint"] or str(steps[k]), *shares, line[0]["n"]))
    lines.append(table(rows, head=("checkpoint", *NAMES, "n")))
    changed = at.get((None, f"{OF_PHASES}smoothed"))
    if changed and changed["value"] is not None:
        lines.append(f"Smoothing changed {changed['value']:.1%} of {changed['n']:,} labels ({OF_PHASES}smoothed).")
    return lines


def _calibration_lines(c: Calibration, threshold: float | None) -> list[str]:
    runs = len(c.left_out) or 1
    lines = [
        f"Does pre-memorization accuracy predict held-out accuracy? {c.in_sample.n} checkpoints of {runs} run{'s' * (runs > 1)}; R² is about y = x."
    ]
    rows = []
    if c.given is not None:
        rows.append((f"pre-memorization accuracy, τ = {threshold:.4g} as in the recipe", c.given))
    rows.append((f"pre-memorization accuracy, best τ in-sample = {c.threshold:.4g}", c.in_sample))
    if c.leave_one_run_out is not None:
        low, high = min(c.left_out.values()), max(c.left_out.values())
        rows.append(
            (f"pre-memorization accuracy, τ from the other runs ({low:.4g} to {high:.4g})", c.leave_one_run_out)
        )
    rows += list(c.baselines.items())
    head = ("predictor", "R²", "95% interval", "correlation²", "mean |error|")
    lines.append(table([(n, f.r2, _span(f.low, f.high), f.correlation2, f.mean_error) for n, f in rows], head=head))
    return lines + [f"Note: {note}." for note in c.notes]


def _interval(value: dict[str, Any]) -> str:
    return _span(value["low"], value["high"])


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None or math.isnan(low) else f"{low:.4g} to {high:.4g}"


def _plain(value: Any) -> Any:
    """NaN as None, for JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
