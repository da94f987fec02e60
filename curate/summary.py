"""What a store says about whole datasets: `curate summary`.

Summaries read dataset values as they were scored, and calibrate τ of pre-memorization accuracy where held-out accuracies are known (imported
as `test_accuracy`, or measured on the recipe's `heldout` rows).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.show import table
from curate.store import Measured, Store

if TYPE_CHECKING:
    from curate.scores.calibration import Calibration

HELDOUT = ("test_accuracy", "heldout_accuracy")


@dataclass(frozen=True)
class Summary:
    """values: the lines of the view dataset_values. calibration: None where held-out accuracies are not known."""

    recipe: str | None
    values: list[dict[str, Any]]
    calibration: Calibration | None
    threshold: float | None

    def text(self) -> str:
        lines = []
        if self.values:
            head = ("value", "run", "checkpoint", "", "95% interval", "n")
            lines.append(
                table(
                    [
                        (v["name"], v["run"] or "-", v["checkpoint"] or "-", v["value"], _interval(v), v["n"])
                        for v in self.values
                    ],
                    head=head,
                )
            )
        else:
            lines.append("No dataset values yet: `curate score RECIPE` computes them.")
        if self.calibration is not None:
            lines += ["", *_calibration_lines(self.calibration, self.threshold)]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "values": self.values,
            "calibration": None if self.calibration is None else _plain(asdict(self.calibration)),
        }


def summarise(store: Store, *, recipe: str | None = None) -> Summary:
    """Dataset-level values with intervals, and τ against held-out accuracy. recipe: as this one measured (None: the one scored last)."""
    values = store.sql(
        "SELECT name, run, checkpoint, step, value, low, high, n FROM dataset_values ORDER BY run, name, step",
        recipe=recipe,
    ).to_dicts()
    known = store.recipes()
    mine = next((r for r in known if recipe in (None, r["name"])), None)
    threshold = _threshold(mine)
    return Summary(mine["name"] if mine else None, values, _calibrate(store, mine, values, threshold), threshold)


def _threshold(recipe: dict[str, Any] | None) -> float | None:
    """τ as the recipe sets it for premem_accuracy."""
    import yaml

    for entry in (yaml.safe_load(recipe["text"]) or {}).get("scores", []) if recipe else []:
        if isinstance(entry, dict) and isinstance(given := entry.get("premem_accuracy"), dict):
            value = given.get("threshold")
            return float(value) if isinstance(value, int | float) else None
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
    uses = set(recipe["uses"]) if recipe else None
    columns = store.measured_columns()
    series: dict[str, dict[int, dict[str, str]]] = {}
    measured: list[Measured] = store.measured()
    for m in measured:
        if (uses is None or m.fingerprint in uses) and m.step is not None:
            for column in ("accuracy", "target_nll", "trained"):
                if column in columns.get(m.measurement, ()):
                    series.setdefault(m.run, {}).setdefault(m.step, {})[column] = m.fingerprint
    row_ids = store.row_ids_of(None, kind="sft", role="train")
    row_ids = row_ids or store.row_ids_of(None, kind="sft")
    runs = []
    for run, steps in sorted(series.items()):
        order = [s for s in sorted(steps) if {"accuracy", "target_nll"} <= steps[s].keys()]
        if not any((run, s) in heldout for s in order):
            continue
        read = {c: store.series([steps[s][c] for s in order], [c], row_ids)[c] for c in ("accuracy", "target_nll")}
        if all("trained" in steps[s] for s in order):
            trained = (store.series([steps[s]["trained"] for s in order], ["trained"], row_ids)["trained"] != 0).all(
                axis=1
            )
            read = {c: v[trained] for c, v in read.items()}
        known = np.isfinite(read["accuracy"]).any(axis=1)
        heldout_of = np.array([heldout.get((run, s), math.nan) for s in order], float)
        runs.append(Run(run, read["accuracy"][known], read["target_nll"][known], heldout_of))
    return calibrate(runs, threshold=threshold) if runs else None


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
