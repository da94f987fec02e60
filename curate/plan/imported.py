"""What was imported, as a recipe without models reads it: scores from other people's measurements."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from curate.errors import UsageError
from curate.store.sql import quote

if TYPE_CHECKING:
    from curate.plan.step import RequestedScore
    from curate.store import Store


def check_imported_names(store: Store, requested: Iterable[RequestedScore]) -> None:
    """UsageError for a score that would take the name of an imported column: `where` would mean another thing than before."""
    import_of = {column: one for one in store.imports() for column in one.columns if one.fingerprints}
    for want in requested:
        if want.name in import_of and want.name not in {*want.score.needs, want.score.name}:
            raise UsageError(
                f"scores: {want.name!r} is an imported column of this store (import {import_of[want.name].number}, {import_of[want.name].file}). "
                "Give the score another name with `as:`."
            )


def imported_bindings(
    store: Store, requested: Iterable[RequestedScore], kind: str, sources: list[str]
) -> dict[tuple[str, str, str | None], list[str]]:
    """Without models in the recipe, scores are computed from what was imported: every fingerprint that has the column.

    A plain column of pairs is that of a run's first checkpoint, which stands for the reference; one of SFT rows that of the last.
    UsageError where nothing was imported, or nothing about the rows of `sources` (none: whatever rows the imports are about).
    """
    known = store.measured(reads="import")
    about = f" --source {sources[0]}" if sources else ""
    if not known:
        raise UsageError(
            "This recipe names no model, and nothing was imported into its store. Set models.reference, or "
            f"`curate import {store.folder} FILE{about} --map row=… checkpoint=… …`."
        )
    if sources:
        imported = store.coverage([m.fingerprint for m in known], sources, kind=kind)
        if all(lacking.all() for lacking in imported.lacking.values()):
            raise UsageError(
                f"What was imported into {store.folder} is about other rows than those of {', '.join(sources)}: its ids are the file's own. If they "
                f"are row numbers, import it again with `{about.strip()}`; if they are in a column of your data, put our row_id in their place "
                f"(`curate sql {store.folder} 'SELECT * FROM occurrences' --csv`, then --map row_id=…); to score them without texts, "
                "leave `source` out of the recipe."
            )
    columns = store.known_columns()
    bindings: dict[tuple[str, str, str | None], list[str]] = {}
    for want in requested:
        for text in (*want.score.needs, *want.score.optional):
            role, column = want.need(text)
            if role == "row":
                continue
            fingerprints = [m.fingerprint for m in known if column in columns.get(m.fingerprint, ()) and not role]
            if kind == "preference" and want.score.over is None:
                first = {
                    m.run: m.fingerprint for m in reversed(known) if m.fingerprint in fingerprints
                }  # known is in step order
                fingerprints = list(first.values())
            if fingerprints:
                bindings[(role, column, want.score.over)] = fingerprints
            elif text in want.score.needs:
                have = sorted({name for names in columns.values() for name in names})
                raise UsageError(f"{want.name} needs {column}, which was not imported; there are: {', '.join(have)}.")
    return bindings


def imported_values(store: Store, recipe: str | None = None) -> list[dict[str, Any]]:
    """A dict for each imported column: name (as `scored` or `trajectories` has it), import, file, rows that have a value, min, median and max
    of numbers, distinct: how many values other columns have. over: whether it is of rows, or of rows at checkpoints.
    """
    if not store.imports():
        return []
    shown = {column.name: column.shown for column in store.frame(recipe=recipe).own["scored"] if column.imported}
    of_rows = store.sql("SELECT * FROM scored LIMIT 0", recipe=recipe).columns
    of_series = store.sql("SELECT * FROM trajectories LIMIT 0", recipe=recipe).columns
    values: dict[tuple[str, str], dict[str, Any]] = {}
    for one in store.imports():
        for column in one.columns if one.fingerprints else ():
            name = shown.get(column, column)
            if column in shown or (one.per_row and name in of_rows):
                view = "scored"
            elif column in of_series:
                view = "trajectories"
            else:
                continue
            about = {"name": name, "import": one.number, "file": one.file, "over": view}
            values[view, name] = about | _spread(store, recipe, view, name)
    return list(values.values())


def _spread(store: Store, recipe: str | None, view: str, name: str) -> dict[str, Any]:
    column = quote(name)
    frame = store.sql(f"SELECT row_id, {column} AS value FROM {view} WHERE {column} IS NOT NULL", recipe=recipe)
    values = frame["value"]
    spread: dict[str, Any] = {"rows": frame["row_id"].n_unique(), "min": None, "median": None, "max": None}
    if values.dtype.is_numeric() and len(values):
        spread |= {"min": values.min(), "median": values.median(), "max": values.max()}
    return spread | {"distinct": values.n_unique()}
