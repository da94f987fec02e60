"""What a store says about whole datasets and single rows: `curate summary`, `curate explain`, `curate status`.

Summaries read dataset values as they were scored, and calibrate τ of pre-memorization accuracy where held-out accuracies are known (imported
as `test_accuracy`, or measured on the recipe's `heldout` rows).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import UsageError
from curate.show import cell, table
from curate.store import Measured, Store

if TYPE_CHECKING:
    from curate.data import Validation
    from curate.scores import Score
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


@dataclass(frozen=True)
class Explanation:
    """One row: its text, every score with what it means and where it stands among the others, and what a selection decided."""

    row_id: str
    row: dict[str, Any]
    scores: list[dict[str, Any]]
    measured: dict[str, Any]
    decision: dict[str, Any] | None
    selection: str | None

    def text(self) -> str:
        lines = [f"row {self.row_id}  ({self.row['kind']}, {self.row['source']}:{self.row['index']})"]
        for name in ("prompt", "chosen", "rejected", "completion", "answer"):
            if self.row.get(name):
                lines.append(f"{name:>10}  {_excerpt(str(self.row[name]))}")
        if self.decision is not None:
            lines.append(
                f"{'kept' if self.decision['kept'] else 'dropped'} by selection {self.selection!r}: {self.decision['reason'].removeprefix('kept: ')}"
            )
        if self.scores:
            head = ("score", "value", "unit", "percentile", "worst", "high means")
            lines += [
                "",
                table(
                    [
                        (s["name"], s["value"], s["unit"], s["percentile"], s["worst"], s["high_means"])
                        for s in self.scores
                    ],
                    head=head,
                ),
            ]
        if self.measured:
            lines += ["", "measured: " + ", ".join(f"{k} {cell(v)}" for k, v in self.measured.items())]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain_row(store: Store, row: str, selection: str | None = None) -> Explanation:
    """Why a row scored and was kept or dropped as it was. row: an id, its first digits, or source:index."""
    from curate.recipe import ScoreRequest
    from curate.scores import SCORES

    row_id = store.find_row(row)
    decision, name, recipe = None, None, None
    try:
        chosen = store.selection(selection)
        name, recipe = chosen.name, chosen.recipe
        found = store.sql(
            "SELECT kept, rank, reason FROM data.decisions WHERE selection = ? AND row_id = ?", [name, row_id]
        ).to_dicts()
        decision = found[0] if found else None
    except UsageError:
        if selection is not None:
            raise
    frame = store.sql("SELECT * FROM scored WHERE row_id = ?", [row_id], recipe=recipe)
    if frame.is_empty():
        raise UsageError(
            f"{store.folder}: row {row_id} is not among the rows of recipe {recipe!r}. Name another selection with --selection."
        )
    line = frame.to_dicts()[0]
    known = next((r for r in store.recipes() if recipe in (None, r["name"])), None)
    requests = {}
    if known is not None:
        import yaml

        requests = {r.name: r for r in map(ScoreRequest.read, (yaml.safe_load(known["text"]) or {}).get("scores", []))}
    scores = []
    for column, request in requests.items():
        if column not in line:
            continue
        declared = SCORES.get(request.score)
        share = store.sql(
            f'SELECT count(*) FILTER ("{column}" <= ?) / nullif(count("{column}"), 0) AS p FROM scored',
            [line[column]],
            recipe=recipe,
        )["p"][0]
        scores.append(
            {
                "name": column,
                "value": line[column],
                "unit": declared.unit if declared else "",
                "percentile": None if line[column] is None or share is None else round(100 * share, 1),
                "worst": declared.worst if declared else "none",
                "high_means": declared.high_means if declared else f"a score of your own: {request.score}",
                "params": request.params,
            }
        )
    base = (
        "kind",
        "source",
        "index",
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "answer",
        "label",
        "style",
        "role",
        "n_occurrences",
    )
    own = set(store.sql("SELECT * FROM occurrences LIMIT 0").columns)
    measured = {
        k: v
        for k, v in line.items()
        if k not in (*base, "row_id", "position") and k not in requests and k not in own and v is not None
    }
    return Explanation(row_id, {k: line.get(k) for k in base}, scores, measured, decision, name)


def describe_score(score: Score) -> str:
    """A score in full: formula's docstring, what it needs, its parameters."""
    import inspect

    lines = [f"{score.name}  ({score.kind}, {score.unit or 'no unit'}, cost: {score.cost})", ""]
    lines += (inspect.getdoc(score.function) or "").splitlines()
    lines += [
        "",
        f"high means: {score.high_means}",
        f"worst end:  {score.worst}",
        f"needs:      {', '.join(score.needs)}" + (" over checkpoints" if score.over else ""),
    ]
    if score.optional:
        lines.append(f"optional:   {', '.join(score.optional)}")
    if score.parameters:
        shown = ", ".join(
            f"{p.name}: {p.default}" if not p.required else f"{p.name} (no default)" for p in score.parameters.values()
        )
        lines.append(f"parameters: {shown}")
    return "\n".join([*lines, f"source:     {score.source}"])


def score_json(score: Score) -> dict[str, Any]:
    """A score's declaration, for machines."""
    names = (
        "name",
        "kind",
        "over",
        "unit",
        "worst",
        "high_means",
        "cost",
        "needs",
        "optional",
        "source",
        "description",
        "defaults",
    )
    return {name: getattr(score, name) for name in names}


def validation_text(found: Validation) -> str:
    """What a source holds, in a few lines."""
    files = ", ".join(s.name for s in found.sources)
    lines = [
        f"{files}: {found.n_rows:,} rows, kind {found.kind}, format {found.format}; {found.n_bad:,} bad, {found.n_distinct:,} distinct."
    ]
    if found.duplicates:
        lines.append(f"{found.duplicates:,} rows repeat an earlier one; they are measured once.")
    lines += found.notes
    if found.n_bad:
        lines.append("Drop the bad ones with `on_bad_row: drop` in the recipe's source, or mend the file.")
    return "\n".join(lines)


@dataclass(frozen=True)
class Status:
    """What a store holds, what ran on it last, and who is measuring into it now."""

    found: dict[str, Any]

    def text(self) -> str:
        f = self.found
        lines = [
            f"{f['folder']}: {f['rows']:,} rows, {f['samples']:,} samples"
            + (
                f", {f['rows_without_text']:,} of the rows known only by somebody else's id"
                if f["rows_without_text"]
                else ""
            )
        ]
        if f["measured_by_process"]:
            lines.append(f"Process {f['measured_by_process']} is measuring now.")
        if f["shards_pending"]:
            lines.append(
                f"{f['shards_pending']} finished shards wait to be taken in; the next `curate run` or `measure` does."
            )
        if f["sources"]:
            heading = ("source", "role", "rows", "bad", "distinct", "read")
            lines += [
                "",
                table(
                    [
                        (s["source"], s["role"], s["n_records"], s["n_bad"], s["n_rows"], _time(s["read_at"]))
                        for s in f["sources"]
                    ],
                    head=heading,
                ),
            ]
        if f["measured"]:
            head = ("measurement", "run", "checkpoint", "rows", "engine")
            rows = [
                (m["measurement"], m["run"] or "-", m["checkpoint"] or m["model"] or "-", m["n_rows"], m["engine"])
                for m in f["measured"]
            ]
            lines += [
                "",
                table(rows[:60], head=head),
                *([f"… and {len(rows) - 60} more (--json prints all)"] if len(rows) > 60 else []),
            ]
        if f["selections"]:
            lines += [
                "",
                "selections: "
                + ", ".join(f"{s['name']} ({json.loads(s['counts'])['kept']:,} kept)" for s in f["selections"]),
            ]
        if f["runs"]:
            columns = ("run", "recipe", "command", "version", "started", "outcome")
            lines += [
                "",
                table(
                    [
                        (r["id"], r["recipe"], r["command"], r["version"], _time(r["started"]), _outcome(r))
                        for r in f["runs"]
                    ],
                    head=columns,
                ),
            ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return self.found


def store_status(store: Store) -> Status:
    return Status(store.status())


def _outcome(run: dict[str, Any]) -> str:
    message = (run["message"] or "").splitlines()
    return (run["outcome"] or "running") + (f": {message[0]}" if message else "")


def _time(value: Any) -> str:
    return value.strftime("%Y-%m-%d %H:%M") if value is not None else "-"


def _interval(value: dict[str, Any]) -> str:
    return _span(value["low"], value["high"])


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None or math.isnan(low) else f"{low:.4g} to {high:.4g}"


def _excerpt(text: str, width: int = 110) -> str:
    text = text.strip().replace("\n", "\\n")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"


def _plain(value: Any) -> Any:
    """NaN as None, for JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
