"""Scores, sources and stores in words, as the command line prints them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curate.console import counted, table, wrapped
from curate.scores.words import FAMILIES
from curate.store import Import, Store

if TYPE_CHECKING:
    from curate.data import Validation
    from curate.scores import Score


def describe_score(score: Score) -> str:
    """A score in full: formula's docstring, what it needs, its parameters."""
    import inspect

    lines = [f"{score.name}  ({score.kind}, {score.unit or 'no unit'}, cost: {score.cost})", "", score.plain, ""]
    lines += (inspect.getdoc(score.function) or "").splitlines()
    lines += [
        "",
        f"high means: {score.high_means}",
        f"worst end:  {score.worst}",
        f"needs:      {', '.join(score.needs)}" + (" over checkpoints" if score.over else ""),
    ]
    if score.optional:
        lines.append(f"optional:   {', '.join(score.optional)}")
    if score.names and score.names != ("{target}",):  # else the recipe's target has them
        lines.append(f"codes:      {', '.join(f'{code} {name}' for code, name in enumerate(score.names))}")
    if score.parameters:
        shown = ", ".join(
            f"{p.name}: {p.default}" if not p.required else f"{p.name} (no default)" for p in score.parameters.values()
        )
        lines.append(f"parameters: {shown}")
    if score.source:
        lines.append(f"source:     {score.source}")
    facts = next(i for i, line in enumerate(lines) if line.startswith("high means:"))
    return wrapped("\n".join(lines[:facts])) + "\n" + wrapped("\n".join(lines[facts:]), " " * 12)


KINDS = {
    "any": "Pairs, and rows of a prompt and its answer",
    "preference": "Pairs of a chosen and a rejected response",
    "sft": "Rows of a prompt and its answer",
}


def score_list(scores: Sequence[Score]) -> str:
    """Every score in two or three lines, under the kind of row and the question that it answers."""
    lines: list[str] = []
    for kind in dict.fromkeys(s.kind for s in scores):
        lines += ["", KINDS[kind], "=" * len(KINDS[kind])]
        of_kind = [s for s in scores if s.kind == kind]
        questions = {s.name: FAMILIES.get(s.path.partition(":")[0].rpartition(".")[2], "") for s in of_kind}
        for question in sorted(set(questions.values()), key=list(FAMILIES.values()).index):
            lines += ["", question]
            for s in (s for s in of_kind if questions[s.name] == question):
                end = f"{s.worst} is bad, " if s.worst != "none" else ""
                lines += [f"  {s.name}  ({end}{s.unit}, {COSTS[s.cost]})", f"      {s.plain}"]
    lines += ["", "`curate scores NAME` tells what a score needs, its settings, and the paper that it is from."]
    return wrapped("\n".join(lines[1:]), "")


COSTS = {
    "free": "no model run",
    "forward": "a forward pass",
    "sampling": "sampled answers",
    "backward": "a backward pass",
    "direction": "gradients of the whole set",
}


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
        "names",
        "plain",
        "least",
    )
    return {name: getattr(score, name) for name in names}


def validation_text(validation: Validation) -> str:
    """What a source holds, in a few lines."""
    files = ", ".join(s.name for s in validation.sources)
    lines = [
        f"{files}: {validation.n_rows:,} rows, kind {validation.kind}, format {validation.format}; "
        f"{validation.n_bad:,} bad, {validation.n_distinct:,} distinct."
    ]
    if validation.duplicates:
        lines.append(f"{validation.duplicates:,} rows repeat an earlier one; they are measured once.")
    lines += validation.notes
    if validation.n_bad:
        lines.append("Drop the bad ones with `on_bad_row: drop` in the recipe's source, or mend the file.")
    return counted("\n".join(lines))


LISTED = 60  # measurements that the text of a status shows


@dataclass(frozen=True)
class Status:
    """What a store holds, what ran on it last, and who is measuring into it now."""

    contents: dict[str, Any]

    def text(self) -> str:
        tables = [self._sources(), self._measured(), self._imports(), self._selections(), self._runs(), self._refused()]
        lines = self._counts()
        for table_lines in tables:
            lines += ["", *table_lines] if table_lines else []
        return wrapped("\n".join(lines))

    def _counts(self) -> list[str]:
        f = self.contents
        without_text = f", {f['rows_without_text']:,} of the rows known only by somebody else's id"
        lines = [
            f"{f['folder']}: {f['rows']:,} rows, {f['samples']:,} samples{without_text if f['rows_without_text'] else ''}"
        ]
        if f["measured_by_process"]:
            lines.append(f"Process {f['measured_by_process']} is measuring now.")
        if f["shards_pending"]:
            lines.append(
                f"{f['shards_pending']} finished shards wait to be taken in; the next `curate run` or `measure` does."
            )
        if f["set_aside"]:
            lines.append(
                f"Damaged files set aside in {f['folder']}/damaged: {len(f['set_aside'])}; `curate check {f['folder']}` says more."
            )
        return lines

    def _sources(self) -> list[str]:
        rows = [
            (s["source"], s["role"], s["n_records"], s["n_bad"], s["n_rows"], _time(s["read_at"]))
            for s in self.contents["sources"]
        ]
        return [table(rows, head=("source", "role", "rows", "bad", "distinct", "read"))] if rows else []

    def _measured(self) -> list[str]:
        measured = self.contents["measured"]
        rows = [
            (
                m["measurement"] + difference,
                m["run"] or "-",
                m["checkpoint"] or m["model"] or "-",
                m["n_rows"],
                m["engine"],
            )
            for m, difference in zip(measured, differences(measured), strict=True)
        ]
        if not rows:
            return []
        shown = table(rows[:LISTED], head=("measurement", "run", "checkpoint", "rows", "engine"))
        return [shown, *([f"… and {len(rows) - LISTED} more (--json prints all)"] if len(rows) > LISTED else [])]

    def _imports(self) -> list[str]:
        return [imports_text(self.contents["imports"])] if self.contents["imports"] else []

    def _selections(self) -> list[str]:
        kept = [f"{s['name']} ({json.loads(s['counts'])['kept']:,} kept)" for s in self.contents["selections"]]
        return [f"selections: {', '.join(kept)}"] if kept else []

    def _runs(self) -> list[str]:
        rows = [
            (r["id"], r["recipe"], r["command"], r["version"], _time(r["started"]), _outcome(r))
            for r in self.contents["runs"]
        ]
        return [table(rows, head=("run", "recipe", "command", "version", "started", "outcome"))] if rows else []

    def _refused(self) -> list[str]:
        r = self.contents["refused"]
        if not r:
            return []
        command = f"`curate {r['command']}` ({r['recipe']}, {_time(r['started'])})"
        return [f"The last command, {command}, was {_outcome(r)}"]

    def to_json(self) -> dict[str, Any]:
        return self.contents


def imports_text(imports: Sequence[Import]) -> str:
    """What was imported, a line each."""
    if not imports:
        return "Nothing was imported into this store."
    lines = [
        (
            one.number,
            one.file,
            one.how or "dataset values",
            one.n_rows if one.fingerprints else "-",
            _time(one.created),
            ", ".join(one.columns),
        )
        for one in imports
    ]
    return table(lines, head=("import", "file", "joined by", "rows", "when", "columns"))


def store_status(store: Store) -> Status:
    return Status({**store.status(), "imports": store.imports()})


def differences(measured: Sequence[dict[str, Any]]) -> list[str]:
    """What tells each entry from others of the same measurement, run and checkpoint: " (samples 8)"; "" where there are no others."""
    flat = [_flat(m.get("params") or {}) | {"weights": (m["model_fingerprint"] or "")[:8]} for m in measured]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, m in enumerate(measured):
        alike.setdefault((m["measurement"], m["run"], m["checkpoint"] or m["model"]), []).append(i)
    notes = [""] * len(measured)
    for entries in alike.values():
        keys = dict.fromkeys(key for i in entries for key in flat[i])
        differing = [key for key in keys if len({str(flat[i].get(key)) for i in entries}) > 1]
        for i in entries if differing else ():
            notes[i] = f" ({', '.join(f'{key} {_setting(flat[i].get(key))}' for key in differing)})"
    return notes


def _setting(value: Any) -> str:
    text = "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _flat(params: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"sampling": {"samples": 8}} as {"samples": 8}; a key that stands in two places keeps its path."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        inner = _flat(value, f"{before}{key}.") if isinstance(value, dict) else {key: value}
        flat |= {(f"{before}{key}.{k}" if k in flat else k): v for k, v in inner.items()}
    return flat


def _outcome(run: dict[str, Any]) -> str:
    message = (run["message"] or "").splitlines()
    return (run["outcome"] or "running") + (f": {message[0]}" if message else "")


def _time(value: Any) -> str:
    return value.strftime("%Y-%m-%d %H:%M") if value is not None else "-"
