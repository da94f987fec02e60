"""The rows step: a recipe's sources into the store where they changed, and every bad row named.

A source is read once and again only when its content or the recipe's way of reading it changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.errors import UsageError, ValidationError
from curate.progress import Progress
from curate.recipe import Loaded, Source, load_recipe
from curate.recordings import recorded_runs
from curate.rows import content_id
from curate.sharing import check_sources
from curate.store import Store
from curate.wanted import wanted_scores

if TYPE_CHECKING:
    from curate.data import Validation


def read_sources(loaded: Loaded, store: Store, progress: Progress) -> dict[str, list[str]]:
    """Read the recipe's sources into the store where they changed. role -> the names of its sources."""
    recipe = loaded.recipe
    names: dict[str, list[str]] = {}
    for role, source in (("train", recipe.source), ("heldout", recipe.heldout)):
        if source is not None:
            names[role] = _read_source(loaded, source, role, store, progress)
    if names.get("train") and names.get("heldout"):
        held = store.row_ids_of(names["heldout"], kind=recipe.kind, role="heldout")
        both = len(set(held).intersection(store.row_ids_of(names["train"], kind=recipe.kind, role="train")))
        if both:
            progress.say(
                f"{both:,} of {len(held):,} held-out rows are training rows too: what is said about held-out rows is partly about those."
            )
    if recipe.source is None and not store.measured(reads="import") and not recorded_runs(store):
        raise UsageError(
            f"{loaded.path or 'recipe'}: there is no `source`, and nothing was imported into {store.folder}. Name your data: `source: {{path: …}}`."
        )
    return names


def _read_source(loaded: Loaded, source: Source, role: str, store: Store, progress: Progress) -> list[str]:
    from curate.data import read

    setting = "source" if role == "train" else "heldout"
    reading = read(
        source.path,
        kind=loaded.recipe.kind,
        split=source.split,
        revision=source.revision,
        format=source.format,
        columns=source.columns,
        base=loaded.folder,
        setting=setting,
    )
    settings = [
        loaded.recipe.kind,
        source.on_bad_row,
        source.split,
        source.revision,
        source.format,
        source.columns,
        source.limit,
    ]
    prints = {info.name: content_id(info.fingerprint, *settings) for info in reading.sources}
    check_sources(loaded, store, prints)
    if all(store.source_is_current(name, key, role=role) for name, key in prints.items()):  # type: ignore[arg-type]
        return list(prints)
    target = str(loaded.path or source.path)
    records = iter(reading) if source.on_bad_row == "drop" else reading.good("error", setting=setting, target=target)
    seen, good = set(), 0
    with progress.bar(f"reading {role}" if role != "train" else "reading", 0) as count:
        for name, group in itertools.groupby(itertools.islice(records, source.limit), key=lambda record: record.source):
            seen.add(name)
            found = store.add_source(name, prints[name], _counted(group, count), role=role)  # type: ignore[arg-type]
            good += found.records
            again = f", {found.duplicates:,} of them occur more than once (measured once)" if found.duplicates else ""
            bad = f", {found.bad:,} bad rows left out (`curate validate` names them)" if found.bad else ""
            progress.say(f"{name}: {found.records:,} rows, {found.new_rows:,} new to the store{again}{bad}")
    if not good:
        list(
            reading.good("drop", setting=setting, target=target)
        )  # raises where all are bad, naming what is wrong with them
        raise ValidationError(
            f"{target}: none of the first {source.limit:,} rows can be used (`curate validate {target}` names them); later ones can. "
            f"Raise {setting}.limit."
        )
    return [name for name in prints if name in seen or store.source_is_current(name, prints[name], role=role)]  # type: ignore[arg-type]


def _counted(records: Iterator[Any], count: Any) -> Iterator[Any]:
    for record in records:
        count(1)
        yield record


def validate_source(
    source: str,
    *,
    kind: Literal["preference", "sft"] | None = None,
    format: str = "auto",
    split: str = "train",
    columns: dict[str, str] | None = None,
    set: list[str] | None = None,
    store: str | Path | None = None,
) -> dict[str, Validation]:
    """Every bad row of some data, or of a recipe's rows. "source", and "heldout" where a recipe has held-out rows, -> what was found.

    Raises UsageError where data is given with what only a recipe takes (set, store), or a recipe with what it says itself.
    """
    from curate.data import validate

    if not source.endswith((".yaml", ".yml")):
        if set or store:
            raise UsageError(
                f"--set and --store are for recipes; {source} is data. `--column prompt=question` names a column."
            )
        try:
            return {"source": validate(source, kind=kind, format=format, split=split, columns=columns or {})}
        except ValidationError as problem:  # its advice is for recipes; data has options of its own
            advice = str(problem).replace("--set source.columns.", "--column ").replace("--set kind=", "--kind ")
            raise ValidationError(advice) from problem
    if kind or columns or format != "auto" or split != "train":
        raise UsageError(
            f"{source} is a recipe, which says kind, format, split and columns itself; change them with --set."
        )
    loaded = load_recipe(source, set=set, store=store)
    wanted_scores(loaded)
    if loaded.recipe.source is None:
        raise UsageError(f"{source}: there is no `source` to validate.")
    given = {"source": loaded.recipe.source, "heldout": loaded.recipe.heldout}
    return {
        name: validate(
            rows.path,
            kind=loaded.recipe.kind,
            split=rows.split,
            revision=rows.revision,
            format=rows.format,
            columns=rows.columns,
            base=loaded.folder,
        )
        for name, rows in given.items()
        if rows is not None
    }
