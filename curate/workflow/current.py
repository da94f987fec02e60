"""What of a run is up to date, by a hash of what it was made of: scores, the selection, the export. It is said in a line each, and not made again.

Made again whatever the hash: what a user's own Python or a subquery of a rule may read, in a store with imports, what another version of curate made,
what goes to the hub.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate import __version__
from curate.rows import content_id
from curate.workflow.inputs import selection_hash
from curate.workflow.thresholds import calibrates

if TYPE_CHECKING:
    from curate.data import ExportResult
    from curate.plan.plan import Plan
    from curate.recipe.load import Loaded
    from curate.recipe.select import Export
    from curate.store import Selection, Store

BESIDE = ("README.md", ".curate-export")  # a person may write into the card; the mark holds what is known of the others


def scores_noted(loaded: Loaded, store: Store, plan: Plan, of_scores: str) -> dict[str, Any] | None:
    """What was noted with scores that are what they would be made now: names, what was said of them. None where they are to be made."""
    if plan.missing or calibrates(plan.wanted) or not all(_is_ours(want.score) for want in plan.wanted):
        return None
    if _asks(loaded) or _imported(store) or store.inputs_hash("scores", loaded.name) != of_scores:
        return None
    noted = store.made(loaded.name)
    return noted if noted is not None and noted.get("of") == _of(plan, of_scores) else None


def note_scores(
    loaded: Loaded,
    store: Store,
    plan: Plan,
    of_scores: str,
    scores: list[str],
    warnings: list[str],
    too_long: list[str] | None = None,
) -> None:
    """Keep what `scores_noted` gives back. too_long: what was said of rows beyond a model's positions; None where nobody has looked."""
    record = {"of": _of(plan, of_scores), "scores": scores, "warnings": warnings}
    store.note_made(loaded.name, record if too_long is None else record | {"too_long": too_long})


def _of(plan: Plan, of_scores: str) -> list[str]:
    """What scores and dataset values are made of: beside what `of_scores` holds, DPO's β and the names, steps and learning rates of checkpoints."""
    labels = sorted((fingerprint, list(map(list, places))) for fingerprint, places in plan.labels.items())
    series = [(c.fingerprint, c.run, c.checkpoint, c.step, c.rate) for c in plan.roles.series]
    return [__version__, of_scores, content_id(plan.beta, labels, series)]


def _imported(store: Store) -> bool:
    """Whether anything in the store was imported: its values may have changed under the same names."""
    return bool(store.imports()) or any(measured.reads == "import" for measured in store.measured())


def is_selected(loaded: Loaded, store: Store, of_scores: str) -> bool:
    """Whether the recipe's selection is what it would be now, of scores that are."""
    asks = _asks(loaded) or _imported(store)
    return not asks and store.inputs_hash("selection", loaded.name) == selection_hash(loaded, of_scores)


def _is_ours(score: Any) -> bool:
    return str(getattr(score.function, "__module__", "")).startswith("curate.")


def _asks(loaded: Loaded) -> bool:
    """Whether a rule has a query of its own, which may be about anything in the store."""
    asked = loaded.recipe.select
    rules = (
        ()
        if asked is None
        else (asked.where, asked.order_by, *([asked.per] if isinstance(asked.per, str) else asked.per or ()))
    )
    return any(word in (text or "").lower() for text in rules for word in ("select", "from", "table"))


def export_hash(loaded: Loaded, selection: Selection, asked: Export, of_selection: str, about: Any) -> str:
    """What an export is made of. of_selection: the selection's hash. about: what its card and its trainer's settings say beside the recipe."""
    try:
        trl = version("trl")
    except PackageNotFoundError:
        trl = ""
    made = [selection.name, selection.created.isoformat(), of_selection, asked.model_dump(), loaded.text, about]
    return content_id(__version__, trl, json.dumps(made, sort_keys=True, default=str))


def exported(target: Path, inputs_hash: str) -> ExportResult | None:
    """The export that is there, if it was made of this and nothing of it has changed since."""
    from curate.data import ExportResult
    from curate.data.replace import MARK

    try:
        _, _, written = (target / MARK).read_text(encoding="utf-8").partition("\n")
        kept = json.loads(written) if written.strip() else {}
    except (OSError, ValueError):
        return None
    there = kept.get("of") == inputs_hash and (target / "README.md").is_file()
    if not there or not all(_stat(target / name) == stat for name, stat in kept["files"].items()):
        return None
    values = {**kept["result"], "path": target}
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ExportResult(**given)


def mark_of(inputs_hash: str, result: ExportResult, folder: Path) -> str:
    """What `exported` reads in the mark. folder: where the files lie now."""
    values = {name: value for name, value in asdict(result).items() if name != "path"}
    return json.dumps({"of": inputs_hash, "result": values, "files": files_of(folder)}) + "\n"


def files_of(folder: Path) -> dict[str, list[int]]:
    """name -> size and time of an export's files."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in BESIDE)
    return {file.relative_to(folder).as_posix(): _stat(file) for file in files}


def _stat(file: Path) -> list[int]:
    try:
        stat = file.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]
