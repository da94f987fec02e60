"""The export step: a selection's rows, the scores beside them, and the card that says where they come from."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from curate.errors import UsageError
from curate.fingerprints import FingerprintCache
from curate.recipe import Export, Loaded
from curate.scores import resolve
from curate.scores.flags import ADVICE
from curate.subjects import find_subjects

if TYPE_CHECKING:
    from curate.data import ExportResult, ExportRow
    from curate.store import Selection, Store


def export_selection(loaded: Loaded, store: Store, selection: Selection, sources: list[str]) -> ExportResult:
    """Write the kept rows where the recipe says, the dropped ones beside them. Raises ValidationError where nothing is kept."""
    from curate.data import TrainedAs, export

    asked = loaded.recipe.export
    assert asked is not None
    columns = _columns(loaded, store)
    extra = [*columns, *([asked.weight] if asked.weight and asked.weight not in columns else [])]
    return export(
        loaded.resolve(asked.to),
        _rows(selection.kept(extra), asked.weight, columns),
        _rows(selection.dropped(extra), None, columns),
        format=asked.format,
        split=loaded.recipe.source.split if loaded.recipe.source else "train",
        card=_card(loaded, store, selection, sources, columns),
        sources=[loaded.resolve(name) for name in sources],
        resample=asked.resample,
        seed=loaded.recipe.engine.seed,
        push_to_hub=asked.push_to_hub,
        trainer=TrainedAs(
            loaded.recipe.tokens.max_length, loaded.recipe.tokens.truncation, _beta(loaded), bool(_flagged(loaded))
        ),
    )


def check_columns(asked: Export, known: Sequence[str]) -> None:
    """UsageError for an extra column or a weight that `scored` does not have; the nearest is named."""
    named = asked.columns if isinstance(asked.columns, list) else []
    for key, name in [*(("columns", n) for n in named), *([("weight", asked.weight)] if asked.weight else [])]:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"export.{key}: {name!r} is not a column of `scored`"
                + (f"; did you mean {near[0]!r}?" if near else ".")
            )


def _columns(loaded: Loaded, store: Store) -> list[str]:
    """The extra columns that the recipe asks for."""
    asked = loaded.recipe.export
    assert asked is not None
    check_columns(asked, store.sql("SELECT * FROM scored LIMIT 0", recipe=loaded.name).columns)
    if asked.columns == "scores":
        return [request.name for request in loaded.recipe.scores]
    return list(asked.columns) if isinstance(asked.columns, list) else []


def _beta(loaded: Loaded) -> float | None:
    """β of the first score that has one."""
    for request in loaded.recipe.scores:
        params = resolve(request.score, folder=loaded.folder).check(request.params)
        if "beta" in params:
            return float(params["beta"])
    return None


def _flagged(loaded: Loaded) -> str:
    """The name of the column that counts a pair's signs of squeezing, "" where the recipe scores none."""
    found = {request.score: request.name for request in loaded.recipe.scores}
    return found.get("squeezing_prone") or found.get("squeezing_weight", "")


def _advice(loaded: Loaded, store: Store, selection: Selection) -> list[str]:
    """How many kept pairs are squeezing-prone, and what to do, in the order that retraining has shown so far."""
    column = _flagged(loaded)
    if not column:
        return []
    sign = "> 0" if column == {r.score: r.name for r in loaded.recipe.scores}.get("squeezing_prone") else "< 1"
    n = store.sql(
        f'SELECT count(*) AS n FROM scored JOIN selections USING (row_id) WHERE selection = ? AND kept AND "{column}" {sign}',
        [selection.name],
        recipe=loaded.name,
    )["n"][0]
    steps = "; ".join(f"({i}) {text}" for i, text in enumerate(ADVICE, 1))
    return [
        f"{n:,} of the kept pairs are squeezing-prone (a ranking, not a forecast of how far). In this order: {steps}."
    ]


def _rows(selected: Iterator[Any], weight: str | None, columns: list[str]) -> Iterator[ExportRow]:
    from curate.data import ExportRow

    for row in selected:
        own = dict(row.columns)
        value = own.get(weight) if weight else None
        if weight and weight not in columns:
            own.pop(weight, None)
        yield ExportRow(row.row, row.row_id, own, None if value is None else float(value), row.reason)


def _card(loaded: Loaded, store: Store, selection: Selection, sources: list[str], columns: list[str]) -> Any:
    from curate import __version__
    from curate.data import Card, distribution

    source = loaded.recipe.source
    known = {s["source"]: s["fingerprint"] for s in store.sources()}
    about = f"revision {source.revision}" if source and source.revision else None
    subjects = find_subjects(loaded, FingerprintCache(store.folder / "weights.json"))
    models = {
        role: subject for role, subject in (("reference", subjects.reference), ("policy", subjects.policy)) if subject
    }
    models |= {f"checkpoint {s.label}": s for s in subjects.series}
    names = [request.name for request in loaded.recipe.scores]
    picked = ", ".join(f'"{name}"' for name in names) or "NULL"
    frame = store.sql(f"SELECT {picked} FROM scored WHERE role = 'train'", recipe=loaded.name)
    counts = {"rows": selection.counts["rows"], "kept": selection.counts["kept"]}
    counts |= {f"dropped: {step}": n for step, n in selection.counts["dropped_by"].items()}
    return Card(
        title=f"{loaded.name}, curated",
        sources={name: about or f"fingerprint {known.get(name, 'unknown')}" for name in sources},
        models={role: f"{subject.label} (weights {subject.fingerprint})" for role, subject in models.items()},
        recipe=loaded.text,
        counts=counts,
        scores={name: distribution(frame[name].to_list()) for name in names if name in frame.columns},
        notes=[
            f"Made by curate {__version__}; `curate explain {store.folder.name} <row_id>` says why a row was kept or dropped.",
            *_advice(loaded, store, selection),
        ],
    )
