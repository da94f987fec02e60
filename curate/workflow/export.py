"""The export step: a selection's rows, the scores beside them, and the card that says where they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.console import Progress
from curate.errors import UsageError, ValidationError, did_you_mean
from curate.passes.chat import as_chat
from curate.plan.rendering import measured_as
from curate.recipe.load import Loaded
from curate.recipe.select import Export
from curate.store.sql import quote
from curate.workflow.current import export_hash, exported, mark_of
from curate.workflow.export_card import card, card_head, prints, trained_as
from curate.workflow.read import source_types

if TYPE_CHECKING:
    from curate.data import ExportResult, ExportRow
    from curate.plan.roles import Roles
    from curate.store import Selection, Store
    from curate.store.misread import Frame


REFERENCE = ("chosen_logp", "rejected_logp")  # columns of `scored` that export.reference_logps is of


def export_selection(
    loaded: Loaded,
    store: Store,
    selection: Selection,
    sources: list[str],
    roles: Roles,
    *,
    inputs_hash: str = "",
    progress: Progress | None = None,
) -> ExportResult:
    """Write the kept rows where the recipe says, the dropped ones beside them; the control to <to>_control, where the recipe exports it.

    inputs_hash: the hash of what the selection is of; an export that is of the same is left as it is. Raises ValidationError where nothing is kept.
    """
    asked = loaded.recipe.export
    assert asked is not None
    progress = progress or Progress(quiet=True)
    result = _export(loaded, store, selection, sources, asked, roles, inputs_hash, progress)
    if not asked.control:
        return result
    control = selection.control
    assert control is not None
    beside = asked.model_copy(update={"to": f"{asked.to.rstrip('/')}_control", "push_to_hub": None})
    try:
        drawn = _export(loaded, store, control, sources, beside, roles, inputs_hash, progress)
    except ValidationError as error:
        raise ValidationError(
            f"The selection is exported to {result.path}, its control is not: {error}{_of_all(loaded)}"
        ) from error
    note = f"The control, {drawn.n_rows:,} rows, is in {drawn.path}."
    return replace(result, notes=(*result.notes, note))


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

    to, head = loaded.resolve(asked.to), card_head(loaded, store, selection, sources, roles)
    inputs_hash = export_hash(
        loaded, selection, asked, of_selection, [asdict(head), [one.number for one in store.imports()]]
    )
    if of_selection and not asked.push_to_hub and (there := exported(to.absolute(), inputs_hash)) is not None:
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
        "card": card(head, loaded, store, selection, sources),
        "sources": [loaded.resolve(name) for name in sources],
        "resample": asked.resample,
        "seed": loaded.recipe.engine.seed,
        "push_to_hub": asked.push_to_hub,
        "trainer": trained_as(loaded, store),
        "mark": lambda result, folder: mark_of(inputs_hash, result, folder),
        "files": files,
    }
    types = _types(store, sources)
    if asked.weight not in own:
        by_tables: dict[str, Any] = {
            "format": asked.format,
            "chat": chat,
            "asked": beside,
            "weight": asked.weight,
            "types": types,
        }
        with suppress(ByRows):
            return export_parts(to, lambda work: parts_of(selection, work, by_rank=by_rank, **by_tables), **common)
    of_rows = Beside(loaded, store, [*columns, *beside, *([asked.weight] if asked.weight else [])])
    kept, dropped = (
        _rows(rows, weight, [*columns, *beside], of_rows, chat=chat)
        for rows, weight in ((selection.kept(by_rank=by_rank), asked.weight), (selection.dropped(), None))
    )
    return export(to, kept, dropped, format=asked.format, types=types, as_json=selection.holds_more_than_text, **common)


def _of_all(loaded: Loaded) -> str:
    """What else to do about rows of a control that `select.where` does not keep out of it."""
    if loaded.recipe.select is None or loaded.recipe.select.control != "random_of_all":
        return ""
    return (
        " This control is drawn from all rows, those that select.where drops too; to draw it from those that where keeps: `--set "
        "select.control=random --set export.control=true`."
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


def check_columns(asked: Export, scored: Frame) -> None:
    """UsageError for an extra column or a weight that `scored` does not have, the nearest is named; and for reference log-probabilities that are
    not measured, whatever columns of the user's are called so.
    """
    known, users = scored.columns, {column.shown for column in scored.own["scored"]}
    named = asked.columns if isinstance(asked.columns, list) else []
    for key, name in [*(("columns", n) for n in named), *([("weight", asked.weight)] if asked.weight else [])]:
        if name not in known:
            raise UsageError(
                f"export.{key}: {name!r} is not a column of `scored`" + did_you_mean(name, known, ".", before="; ")
            )
    if asked.reference_logps and not set(REFERENCE) <= set(known) - users:
        raise UsageError(
            "export.reference_logps: the reference's log-probabilities (chosen_logp, rejected_logp) are not measured: name models.reference, and a "
            "score that reads them, such as ranking_gap."
        )


def _columns(loaded: Loaded, store: Store) -> list[str]:
    """The extra columns that the recipe asks for."""
    asked = loaded.recipe.export
    assert asked is not None
    check_columns(asked, store.frame(recipe=loaded.name))
    if asked.columns == "scores":
        return [request.name for request in loaded.recipe.scores]
    return list(asked.columns) if isinstance(asked.columns, list) else []


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
        beside_row = beside.of(row.row_id)
        value = None
        if weight:
            value = (row.columns if weight in beside.own else beside_row).get(weight)
        asked = {name: beside_row[name] for name in columns if name in beside_row}
        shown = as_chat(row.row) if chat and row.row is not None else row.row
        yield ExportRow(
            shown, row.row_id, row.columns, None if value is None else float(value), row.reason, asked=asked
        )


def _check_weights(name: str, loaded: Loaded, store: Store, selection: Selection) -> None:
    """UsageError where a column holds no numbers; ValidationError where a kept row has none, a negative one, or all are 0."""
    column = quote(name)
    wrong_weights = store.sql(
        f"SELECT s.source, s.index, s.{column} AS weight FROM scored s JOIN selections d USING (row_id) WHERE d.selection = ? AND d.kept "
        "ORDER BY s.position",
        [selection.name],
        recipe=loaded.name,
    )
    if not (wrong_weights["weight"].dtype.is_numeric() or str(wrong_weights["weight"].dtype) in ("Boolean", "Null")):
        raise UsageError(
            f"export.weight: the column {name!r} holds text, expected numbers. Write them without quotes in the source, or name another column."
        )
    weights = [None if w is None or math.isnan(w) else float(w) for w in wrong_weights["weight"]]
    wrong: dict[str, list[str]] = {}
    for source, index, weight in zip(wrong_weights["source"], wrong_weights["index"], weights, strict=True):
        why = "unknown" if weight is None else "infinite" if math.isinf(weight) else "below 0" if weight < 0 else ""
        if why:
            wrong.setdefault(why, []).append(f"{source}, row {index + 1}" + (f": {weight:g}" if weight else ""))
    if wrong:
        finite = (
            f"isfinite({column}::DOUBLE) AND "
            if any(w is not None and not math.isfinite(w) for w in wrong_weights["weight"])
            else ""
        )
        faults = "; ".join(
            f"{why} in {len(places):,} ({', '.join(places[:3])}{', …' if len(places) > 3 else ''})"
            for why, places in wrong.items()
        )
        raise ValidationError(
            f"export.weight: {name!r} cannot weight {sum(map(len, wrong.values())):,} of the {len(weights):,} kept rows: {faults}. A weight is a "
            f"number of at least 0. Leave these rows out with select.where: '{column} IS NOT NULL AND {finite}{column} >= 0', or name another column."
        )
    if weights and not any(weights):
        raise ValidationError(
            f"export.weight: {name!r} is 0 in all {len(weights):,} kept rows: nothing would be trained on. Name another column."
        )


def _types(store: Store, sources: Sequence[str]) -> dict[str, str]:
    return source_types(store, {name: key for name, key in prints(store).items() if name in sources})
