"""The export step: a selection's rows, the scores beside them, and the card that says where they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.console import Progress
from curate.errors import UsageError, ValidationError, did_you_mean
from curate.models.layouts import own_code_notes
from curate.passes.chat import as_chat
from curate.plan.beta import asks_for_beta, beta_of, deviation_text
from curate.plan.rendering import card_notes, measured_as, styles_of
from curate.plan.requests import requested_scores
from curate.recipe.doors import travelling
from curate.recipe.load import Loaded
from curate.recipe.select import Export
from curate.scores.flags import ADVICE
from curate.store.sql import quote
from curate.workflow.current import export_hash, exported, mark_of
from curate.workflow.read import noted, source_types

if TYPE_CHECKING:
    from curate.data import Card, ExportResult, ExportRow
    from curate.data.parts import Parts
    from curate.plan.roles import Roles
    from curate.store import Selection, Store


REFERENCE = ("chosen_logp", "rejected_logp")  # columns of `scored` that export.reference_logps is of


def export_selection(
    loaded: Loaded,
    store: Store,
    selection: Selection,
    sources: list[str],
    roles: Roles,
    *,
    made_of: str = "",
    progress: Progress | None = None,
) -> ExportResult:
    """Write the kept rows where the recipe says, the dropped ones beside them; the control to <to>_control, where the recipe exports it.

    made_of: the hash of what the selection is of; an export that is of the same is left as it is. Raises ValidationError where nothing is kept.
    """
    asked = loaded.recipe.export
    assert asked is not None
    progress = progress or Progress(quiet=True)
    result = _export(loaded, store, selection, sources, asked, roles, made_of, progress)
    if not asked.control:
        return result
    control = selection.control
    assert control is not None
    beside = asked.model_copy(update={"to": f"{asked.to.rstrip('/')}_control", "push_to_hub": None})
    drawn = _export(loaded, store, control, sources, beside, roles, made_of, progress)
    said = f"The control, {drawn.n_rows:,} rows, is in {drawn.path}."
    return replace(result, notes=(*result.notes, said))


def _export(
    loaded: Loaded,
    store: Store,
    selection: Selection,
    sources: list[str],
    asked: Export,
    roles: Roles,
    of_selection: str,
    progress: Progress,
) -> ExportResult:
    from curate.data.export import Files, export, export_parts
    from curate.workflow.export_tables import ByRows, parts_of

    to, head = loaded.resolve(asked.to), _card_head(loaded, store, selection, sources, roles)
    made_of = export_hash(
        loaded, selection, asked, of_selection, [asdict(head), [one.number for one in store.imports()]]
    )
    if of_selection and not asked.push_to_hub and (there := exported(to.absolute(), made_of)) is not None:
        progress.say(f"The export in {there.path} is up to date.")
        return there
    columns = _columns(loaded, store)
    if asked.weight:
        _check_weights(asked.weight, loaded, store, selection)
    chat = bool(measured_as(store, loaded.name).get("chat"))  # it trains as it was measured
    own = _own_of(loaded, store)
    beside = [name for name in columns if name not in own and name != "row_id"]
    beside += [name for name in REFERENCE if asked.reference_logps and name not in beside]
    by_rank = asked.order == "order_by"
    hidden = tuple(name for name in REFERENCE if name not in columns) if asked.reference_logps else None
    files = Files(asked.layout, asked.rows_per_file, _source_name(sources), by_rank, hidden)
    common: dict[str, Any] = {
        "split": loaded.recipe.source.split if loaded.recipe.source else "train",
        "card": _card(head, loaded, store, selection, sources),
        "sources": [loaded.resolve(name) for name in sources],
        "resample": asked.resample,
        "seed": loaded.recipe.engine.seed,
        "push_to_hub": asked.push_to_hub,
        "trainer": _trained_as(loaded),
        "mark": lambda result, folder: mark_of(made_of, result, folder),
        "files": files,
    }
    types = _types(store, sources)

    def fill(work: Path) -> AbstractContextManager[Parts]:
        return parts_of(
            selection,
            work,
            format=asked.format,
            chat=chat,
            asked=beside,
            weight=asked.weight,
            types=types,
            by_rank=by_rank,
        )

    try:
        if asked.weight in own:
            raise ByRows
        return export_parts(to, fill, **common)
    except ByRows:
        of_rows = Beside(loaded, store, [*columns, *beside, *([asked.weight] if asked.weight else [])])
        kept, dropped = (
            _rows(rows, weight, [*columns, *beside], of_rows, chat=chat)
            for rows, weight in ((selection.kept(by_rank=by_rank), asked.weight), (selection.dropped(), None))
        )
        return export(
            to, kept, dropped, format=asked.format, types=types, as_json=selection.holds_more_than_text, **common
        )


def _source_name(sources: Sequence[str]) -> str:
    """What a trainer may call the source: a hub dataset's name, a file's without its ending; "" where there are several."""
    if len(sources) != 1:
        return ""
    return Path(sources[0]).stem if Path(sources[0]).suffix else sources[0]


def _own_of(loaded: Loaded, store: Store) -> set[str]:
    """The user's columns that keep their names in `scored`: they come with each row."""
    own = store.frame(recipe=loaded.name).own["scored"]
    return {column.name for column in own if not column.taken_by and not column.imported}


def check_columns(asked: Export, known: Sequence[str]) -> None:
    """UsageError for an extra column or a weight that `scored` does not have; the nearest is named."""
    named = asked.columns if isinstance(asked.columns, list) else []
    for key, name in [*(("columns", n) for n in named), *([("weight", asked.weight)] if asked.weight else [])]:
        if name not in known:
            raise UsageError(
                f"export.{key}: {name!r} is not a column of `scored`" + did_you_mean(name, known, ".", before="; ")
            )
    if asked.reference_logps and not set(REFERENCE) <= set(known):
        raise UsageError(
            "export.reference_logps: the reference's log-probabilities (chosen_logp, rejected_logp) are not measured: name models.reference, and a "
            "score that reads them, such as ranking_gap."
        )


def _columns(loaded: Loaded, store: Store) -> list[str]:
    """The extra columns that the recipe asks for."""
    asked = loaded.recipe.export
    assert asked is not None
    check_columns(asked, store.sql("SELECT * FROM scored LIMIT 0", recipe=loaded.name).columns)
    if asked.columns == "scores":
        return [request.name for request in loaded.recipe.scores]
    return list(asked.columns) if isinstance(asked.columns, list) else []


def _trained_as(loaded: Loaded) -> Any:
    from curate.data import TrainedAs

    recipe = loaded.recipe
    beta = beta_of(recipe) if asks_for_beta(recipe) else None
    unlike = [] if beta is None else deviation_text(requested_scores(loaded), beta)
    tokens, asked = recipe.tokens, recipe.export
    return TrainedAs(
        tokens.max_length,
        tokens.truncation,
        beta,
        bool(_flagged(loaded)),
        tuple(unlike),
        tokens.turns,
        in_order=asked is not None and asked.order == "order_by",
        given_reference=asked is not None and asked.reference_logps,
        sampling=_as_rollouts(loaded),
    )


def _as_rollouts(loaded: Loaded) -> tuple[tuple[str, Any], ...]:
    """How answers were sampled, as GRPO would sample them; () where no score is of sampled answers."""
    if all(want.score.cost != "sampling" for want in requested_scores(loaded)):
        return ()
    sampling = loaded.recipe.sampling
    named = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_completion_length": sampling.max_new_tokens,
    }
    return tuple(named.items())


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
        f"SELECT count(*) AS n FROM scored s JOIN selections d USING (row_id) WHERE d.selection = ? AND d.kept AND s.{quote(column)} {sign}",
        [selection.name],
        recipe=loaded.name,
        names_columns=True,
    )["n"][0]
    steps = "; ".join(f"({i}) {text}" for i, text in enumerate(ADVICE, 1))
    return [
        f"{n:,} of the kept pairs are squeezing-prone (a ranking, not a forecast of how far). In this order: {steps}."
    ]


class Beside:
    """Columns of `scored` that stand beside the rows of an export: ours as the view has them, the user's own as each row came with them."""

    def __init__(self, loaded: Loaded, store: Store, names: Sequence[str]):
        self.own = _own_of(loaded, store).intersection(names)  # any other name is ours there
        self.names = [name for name in dict.fromkeys(names) if name not in self.own | {"row_id"}]
        picked = ", ".join(["row_id", *map(quote, self.names)])
        frame = store.sql(f"SELECT {picked} FROM scored", recipe=loaded.name, names_columns=True)
        self.frame, self.at = frame, {row_id: i for i, row_id in enumerate(frame["row_id"])}

    def of(self, row_id: str) -> dict[str, Any]:
        """name -> value of a row, None where the view does not know it."""
        at = self.at.get(row_id)
        return {name: None if at is None else self.frame[name][at] for name in self.names}


def _rows(
    selected: Iterator[Any], weight: str | None, columns: list[str], beside: Beside, *, chat: bool = False
) -> Iterator[ExportRow]:
    """chat: rows of plain text become messages, as they were measured."""
    from curate.data import ExportRow

    for row in selected:
        found = beside.of(row.row_id)
        value = None
        if weight:
            value = (row.columns if weight in beside.own else found).get(weight)
        asked = {name: found[name] for name in columns if name in found}
        shown = as_chat(row.row) if chat and row.row is not None else row.row
        yield ExportRow(
            shown, row.row_id, row.columns, None if value is None else float(value), row.reason, asked=asked
        )


def _check_weights(name: str, loaded: Loaded, store: Store, selection: Selection) -> None:
    """UsageError where a column holds no numbers; ValidationError where a kept row has none, a negative one, or all are 0."""
    column = quote(name)
    found = store.sql(
        f"SELECT s.source, s.index, s.{column} AS weight FROM scored s JOIN selections d USING (row_id) WHERE d.selection = ? AND d.kept "
        "ORDER BY s.position",
        [selection.name],
        recipe=loaded.name,
    )
    if not (found["weight"].dtype.is_numeric() or str(found["weight"].dtype) in ("Boolean", "Null")):
        raise UsageError(
            f"export.weight: the column {name!r} holds text, expected numbers. Write them without quotes in the source, or name another column."
        )
    weights = [None if w is None or math.isnan(w) else float(w) for w in found["weight"]]
    wrong: dict[str, list[str]] = {}
    for source, index, weight in zip(found["source"], found["index"], weights, strict=True):
        why = "unknown" if weight is None else "infinite" if math.isinf(weight) else "below 0" if weight < 0 else ""
        if why:
            wrong.setdefault(why, []).append(f"{source}, row {index + 1}" + (f": {weight:g}" if weight else ""))
    if wrong:
        finite = (
            f"isfinite({column}::DOUBLE) AND "
            if any(w is not None and not math.isfinite(w) for w in found["weight"])
            else ""
        )
        told = "; ".join(
            f"{why} in {len(places):,} ({', '.join(places[:3])}{', …' if len(places) > 3 else ''})"
            for why, places in wrong.items()
        )
        raise ValidationError(
            f"export.weight: {name!r} cannot weight {sum(map(len, wrong.values())):,} of the {len(weights):,} kept rows: {told}. A weight is a "
            f"number of at least 0. Leave these rows out with select.where: '{column} IS NOT NULL AND {finite}{column} >= 0', or name another column."
        )
    if weights and not any(weights):
        raise ValidationError(
            f"export.weight: {name!r} is 0 in all {len(weights):,} kept rows: nothing would be trained on. Name another column."
        )


def _types(store: Store, sources: Sequence[str]) -> dict[str, str]:
    return source_types(store, {name: key for name, key in _prints(store).items() if name in sources})


def _named_sources(found: Sequence[tuple[str, str]]) -> dict[str, str]:
    """name -> what it is; names that are the same without their folders are numbered."""
    named: dict[str, str] = {}
    for name, what in found:
        free = next(n for n in (name, *(f"{name} ({i})" for i in range(2, len(found) + 2))) if n not in named)
        named[free] = what
    return named


def _card(head: Card, loaded: Loaded, store: Store, selection: Selection, sources: Sequence[str]) -> Card:
    """The card with what is counted over the rows."""
    from curate.data import distribution

    names = [request.name for request in loaded.recipe.scores]
    picked = ", ".join(map(quote, names)) or "NULL"
    frame = store.sql(f"SELECT {picked} FROM scored WHERE role = 'train'", recipe=loaded.name, names_columns=True)
    scores = {
        name: distribution(frame[name].cast(float).fill_null(math.nan).to_numpy())
        for name in names
        if name in frame.columns
    }
    known = _prints(store)
    of_sources = noted(store, "train", {name: known[name] for name in sources if name in known})
    more = [travelling(note, loaded.folder) for note in (*_advice(loaded, store, selection), *of_sources)]
    return replace(head, scores=scores, notes=[*head.notes, *more])


def _prints(store: Store) -> dict[str, str]:
    """The training sources and their fingerprints."""
    return {s["source"]: s["fingerprint"] for s in store.sources() if s["role"] == "train"}


def _card_head(loaded: Loaded, store: Store, selection: Selection, sources: list[str], roles: Roles) -> Card:
    """What the card says of sources, models, recipe and counts."""
    from curate import __version__
    from curate.data import Card

    source = loaded.recipe.source
    known = _prints(store)
    about = f"revision {source.revision}" if source and source.revision else None
    models = {
        role: checkpoint
        for role, checkpoint in (("reference", roles.reference), ("policy", roles.policy))
        if checkpoint
    }
    models |= {f"checkpoint {s.label}": s for s in roles.series}
    counts = {"rows": selection.counts["rows"], "kept": selection.counts["kept"]}
    counts |= {f"dropped: {step}": n for step, n in selection.counts["dropped_by"].items()}
    folder = loaded.folder
    return Card(
        title=f"{selection.name}, curated",
        sources=_named_sources(
            [(travelling(name, folder), about or f"fingerprint {known.get(name, 'unknown')}") for name in sources]
        ),
        models={role: f"{checkpoint.label} (weights {checkpoint.fingerprint})" for role, checkpoint in models.items()},
        recipe=travelling(loaded.text, folder),
        counts=counts,
        notes=[
            travelling(note, folder)
            for note in [
                f"Made by curate {__version__}; `curate explain {store.folder.name} <row_id>` says why a row was kept or dropped.",
                *own_code_notes(roles.folders),
                *card_notes(
                    measured_as(store, loaded.name),
                    loaded.recipe.tokens.chat,
                    styles_of(store, sources, loaded.recipe.kind),
                ),
            ]
        ],
    )
