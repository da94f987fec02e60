"""One row of a store: what it scored, where that stands among the others, its flags in words, and why a selection kept or dropped it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from curate.console import cell, wrapped
from curate.errors import UsageError
from curate.recipe.yaml import read_yaml
from curate.report.answers import answers_of, answers_text
from curate.scores import SCORES
from curate.scores.flags import ADVICE, REASONS, reasons
from curate.store import Store
from curate.store.decisions import Reason
from curate.store.sql import quote
from curate.store.views import BASE

if TYPE_CHECKING:
    from curate.recipe.schema import ScoreRequest


# what is said of the row itself
ABOUT = (*(name for name in BASE if name not in ("row_id", "position")), "index")


@dataclass(frozen=True)
class Explanation:
    """One row: its text, every score with what it means and where it stands among the others, and what a selection decided."""

    row_id: str
    row: dict[str, Any]
    scores: list[dict[str, Any]]
    measured: dict[str, Any]
    decision: dict[str, Any] | None
    selection: str | None
    flags: list[str] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    every_answer: bool = False

    def text(self) -> str:
        source, index = self.row["source"], self.row["index"]
        foreign = self.row.get("prompt") is None  # its index may be somebody else's id
        at = "" if index is None else f":{index}" if foreign else f", row {index + 1}"
        lines = [f"row {self.row_id}  ({self.row['kind']}, {source}{at})"]
        for name in ("prompt", "chosen", "rejected", "completion", "answer"):
            if self.row.get(name):
                lines.append(f"{name:>10}  {_excerpt(str(self.row[name]))}")
        if self.decision is not None:
            lines.append(_decided(self.decision, self.selection or ""))
        if self.scores:
            lines.append("")
            for s in self.scores:
                value = s["value_name"] or f"{cell(s['value'])} {s['unit'] if s['value'] is not None else ''}".strip()
                lines.append(f"{_with_settings(s)}: {value}{_standing(s)}")
                lines.append(f"    {s['plain']}")
        if self.flags:
            lines += [
                "",
                f"squeezing-prone ({len(self.flags)} of {len(REASONS)} signs; a ranking, not a forecast of how far):",
            ]
            lines += [f"  - {flag}" for flag in self.flags]
            lines += [
                "what retraining has shown to help, in this order:",
                *(f"  {i}. {text}" for i, text in enumerate(ADVICE, 1)),
            ]
        lines += answers_text(self.answers, every=self.every_answer)
        if self.measured:
            lines += ["", "measured: " + ", ".join(f"{k} {cell(v)}" for k, v in self.measured.items())]
        return wrapped("\n".join(lines))

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "every_answer"}


def explain_row(store: Store, row: str, selection: str | None = None, *, every_answer: bool = False) -> Explanation:
    """Why a row scored and was kept or dropped as it was. row: an id, its first digits, source#row (from 1), or source:index (from 0).
    every_answer: its text shows all of the row's sampled answers, not a few.
    """
    row_id = store.find_row(row)
    decision, name, recipe = _decision(store, row_id, selection)
    frame = store.sql("SELECT * FROM scored WHERE row_id = ?", [row_id], recipe=recipe)
    if frame.is_empty():
        deciding = store.sql("SELECT DISTINCT selection FROM selections WHERE row_id = ? ORDER BY 1", [row_id])
        others = ", ".join(f"--selection {name}" for name in deciding["selection"])
        raise UsageError(
            f"{store.folder}: row {row_id} is not among the rows of recipe {recipe!r}; "
            + (f"it is decided on in: {others}." if others else "no selection decided on it.")
        )
    line = frame.to_dicts()[0]
    requests = _requests(store, recipe)
    return Explanation(
        row_id,
        {key: line.get(key) for key in ABOUT},
        _scores(store, recipe, line, requests),
        _measured(store, line, requests),
        decision,
        name,
        _flags(store, row_id, recipe, line, requests),
        answers_of(store, row_id, recipe),
        every_answer,
    )


def _decision(store: Store, row_id: str, selection: str | None) -> tuple[dict[str, Any] | None, str | None, str | None]:
    """What a selection (the last, if None) decided about a row, its name, and its recipe's; None where there is none. UsageError for a name that
    no selection has.
    """
    try:
        chosen = store.selection(selection)
    except UsageError:
        if selection is not None:
            raise
        return None, None, None
    text = "SELECT kept, rank, reason, rule, value, cut FROM selections WHERE selection = ? AND row_id = ?"
    decisions = store.sql(text, [chosen.name, row_id]).to_dicts()
    return next(iter(decisions), None), chosen.name, chosen.recipe


def _requests(store: Store, recipe: str | None) -> dict[str, ScoreRequest]:
    """The scores of a recipe (of the one scored last, if None) as it asks for them: column -> request."""
    from curate.recipe.schema import ScoreRequest

    kept = next((r for r in store.recipes() if recipe in (None, r["name"])), None)
    if kept is None:
        return {}
    return {r.name: r for r in map(ScoreRequest.read, (read_yaml(kept["text"])[0] or {}).get("scores", []))}


def _scores(
    store: Store, recipe: str | None, line: dict[str, Any], requests: dict[str, ScoreRequest]
) -> list[dict[str, Any]]:
    """A dict for each of the row's scores: its value, what it means, where it stands among the others, its settings."""
    text = "SELECT name, value FROM dataset_values WHERE starts_with(name, 'premem_threshold')"
    calibrated = dict(store.sql(text, recipe=recipe).rows())
    shares = _shares(store, recipe, {name: line[name] for name in requests if name in line})
    scores = []
    for column, request in requests.items():
        if column not in line:
            continue
        declared, share = SCORES.get(request.score), shares[column]
        code = f"{column}_name" if declared and declared.names else None
        scores.append(
            {
                "name": column,
                "value": line[column],
                "value_name": line.get(code) if code else None,
                "unit": declared.unit if declared else "",
                "percentile": None if share is None or code else round(100 * share, 1),
                "worst": declared.worst if declared else "none",
                "plain": declared.plain if declared else f"A score of your own: {request.score}.",
                "high_means": declared.high_means if declared else f"a score of your own: {request.score}",
                "params": _with_thresholds(dict(request.params), calibrated),
            }
        )
    return scores


def _with_thresholds(params: dict[str, Any], calibrated: dict[str, float]) -> dict[str, Any]:
    """A score's settings, with the thresholds that were calibrated in the place of auto and auto_per_group."""
    threshold = params.get("threshold")
    if threshold == "auto":
        params["threshold"] = calibrated.get("premem_threshold", "auto")
    elif threshold == "auto_per_group":
        groups = {k.removeprefix("premem_threshold_"): v for k, v in calibrated.items() if "_threshold_" in k}
        params["threshold"] = groups
    return params


def _measured(store: Store, line: dict[str, Any], requests: dict[str, ScoreRequest]) -> dict[str, Any]:
    """What was measured of the row: the known columns that are neither of the row itself, nor scores, nor the user's own."""
    other = {*ABOUT, "row_id", "position", *requests, *store.sql("SELECT * FROM occurrences LIMIT 0").columns}
    return {
        name: value
        for name, value in line.items()
        if value is not None and name not in other and name.removesuffix("_name") not in requests
    }


def _shares(store: Store, recipe: str | None, scores: dict[str, Any]) -> dict[str, float | None]:
    """name -> the share of the known values that are at most the row's; None where the row's is unknown."""
    known = {name: value for name, value in scores.items() if value is not None}
    picked = ", ".join(f"count(*) FILTER ({quote(name)} <= ?) / count({quote(name)})" for name in known)
    shares = store.sql(f"SELECT {picked} FROM scored", list(known.values()), recipe=recipe).row(0) if known else ()
    return dict.fromkeys(scores) | dict(zip(known, shares, strict=True))


def _flags(
    store: Store, row_id: str, recipe: str | None, line: dict[str, Any], requests: dict[str, ScoreRequest]
) -> list[str]:
    """Why a pair is squeezing-prone, in words; the ranks are among the rows that were scored. Empty where nothing says so."""
    names = [name for name in dict.fromkeys(name for reason in REASONS for name in reason.columns) if name in line]
    if line["kind"] != "preference" or not names:
        return []
    picked = ", ".join(map(quote, names))
    frame = store.sql(
        f"SELECT row_id, {picked} FROM scored WHERE role = 'train' OR row_id = ?", [row_id], recipe=recipe
    )
    at = frame["row_id"].to_list().index(row_id)
    columns = {name: frame[name].cast(float).fill_null(float("nan")).to_numpy() for name in names}
    params: dict[str, Any] = next(
        (r.params for r in requests.values() if r.score in ("squeezing_prone", "squeezing_weight")), {}
    )
    signs = reasons(columns, SCORES["squeezing_prone"].check(params)["share"])
    return [reason.says(values, at) for reason, values, holds in signs.values() if holds[at] == 1]


def _decided(decision: dict[str, Any], selection: str) -> str:
    """What a selection decided about the row, with its numbers."""
    reason = Reason(
        decision["rule"] or "", decision["reason"].removeprefix("kept: "), decision["value"], decision["cut"]
    )
    rank = f", rank {decision['rank']:,}" if decision["rank"] and decision["rule"] else ""
    return f"{'kept' if decision['kept'] else 'dropped'} by selection {selection!r}: {reason}{rank}"


def _with_settings(score: dict[str, Any]) -> str:
    """The score's name, with the settings that it was computed with."""
    shown = ", ".join(f"{k} {cell(v)}" for k, v in score["params"].items())
    return f"{score['name']} ({shown})" if shown else str(score["name"])


def _standing(score: dict[str, Any]) -> str:
    """Where the row stands among the others, and whether that is the bad end."""
    share = score["percentile"]
    if share is None:
        return ""
    return f" (percentile {share:g}{'' if score['worst'] == 'none' else '; ' + score['worst'] + ' is bad'})"


def _excerpt(text: str, width: int = 110) -> str:
    text = text.strip().replace("\n", "\\n")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
