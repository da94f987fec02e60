"""The rows step: a recipe's sources into the store where they changed, and every bad row named.

A source is read once and again only when its content or the recipe's way of reading it changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.console import Progress
from curate.data.notes import repeated_prompt
from curate.data.records import Record
from curate.data.sections import in_both_roles, open_rows, said_otherwise
from curate.errors import UsageError, ValidationError
from curate.models.fingerprints import FingerprintCache
from curate.plan.kept import Kept
from curate.plan.recorded import recorded_runs
from curate.plan.requests import requested_scores
from curate.recipe.load import Loaded, load_recipe
from curate.recipe.sources import Source
from curate.rows import content_id
from curate.store import Role, Store
from curate.store.openings import let_go
from curate.store.sharing import check_sources

if TYPE_CHECKING:
    from curate.data import Reading, Validation
    from curate.data.blocks import Block
    from curate.data.notes import Notes


def read_sources(loaded: Loaded, store: Store, progress: Progress, kept: Kept | None = None) -> dict[str, list[str]]:
    """Read the recipe's sources into the store where they changed. role -> the names of its sources.

    kept: of a run: what is read in waits until the run is whole (`Store.take_sources`), and a source that is not there is taken as it was read last,
    where the run measures nothing.
    """
    recipe = loaded.recipe
    given: dict[Role, Source] = {}
    if recipe.source is not None:
        given["train"] = recipe.source
    if recipe.heldout is not None:
        given["heldout"] = recipe.heldout
    openings = {role: _open(loaded, source, role, store, kept) for role, source in given.items()}
    for opening in openings.values():
        check_sources(loaded, store, opening.prints)
    old = {
        name
        for role, opening in openings.items()
        for name, key in opening.prints.items()
        if not store.source_is_current(name, key, role=role)
    }
    names: dict[str, list[str]] = {}
    for role, opening in openings.items():  # a file that is both is read for both, or for neither
        again = not old.isdisjoint(opening.prints)
        names[role] = (
            _read_source(loaded, given[role], role, opening, store, progress, kept) if again else list(opening.prints)
        )
        for line in noted(store, role, opening.prints, counts=not again):
            progress.say(f"{_setting(role)}: {line}")
    formats = {role: opening.reading.formats() for role, opening in openings.items() if opening.reading is not None}
    for line in said_otherwise(loaded, formats):  # type: ignore[arg-type]
        progress.say(line)
    if names.get("train") and names.get("heldout"):
        held = store.row_ids_of(names["heldout"], kind=recipe.kind, role="heldout")
        both = len(set(held).intersection(store.row_ids_of(names["train"], kind=recipe.kind, role="train")))
        if both:
            progress.say(in_both_roles(both, len(held)))
    if recipe.source is None and not store.measured(reads="import") and not recorded_runs(store):
        raise UsageError(
            f"{loaded.path or 'recipe'}: there is no `source`, and nothing was imported into {store.folder}. Name your data: `source: {{path: …}}`."
        )
    return names


@dataclass(frozen=True)
class Opening:
    """Sources of one role before their rows are read. prints: name -> fingerprint, of content and of the way to read it. reading: None where they
    are not there, and known.
    """

    prints: dict[str, str]
    reading: Reading | None


def _open(loaded: Loaded, source: Source, role: Role, store: Store, kept: Kept | None) -> Opening:
    """UsageError for a source that is not there and that the recipe now reads in another way than the store has it."""
    from curate.data.reading import VERSION

    question = f"{role} source {source.path}"
    readings: dict[str, Reading] = {}

    def fingerprints() -> list[list[str]]:
        readings["reading"] = open_rows(loaded, source, _setting(role), digest_of=_digests(store).source)
        return [[info.name, info.fingerprint] for info in readings["reading"].sources]

    infos = (kept or Kept()).ask(question, fingerprints)
    if role == "train" and readings:
        loaded.formats = readings["reading"].formats_of_all
    settings = [
        loaded.recipe.kind,
        source.on_bad_row,
        source.split,
        source.revision,
        source.format,
        source.columns,
        source.limit,
        VERSION,
    ]
    prints = {name: content_id(fingerprint, *settings) for name, fingerprint in infos}
    if kept is None or readings:
        return Opening(prints, readings.get("reading"))
    read_in = {s["source"] for s in store.sources() if s["role"] == role}
    prints = {name: key for name, key in prints.items() if name in read_in}  # `limit` may end before a list's last file
    gone = [name for name in prints if not loaded.resolve(name).exists()] or list(prints)
    if not all(store.source_is_current(name, key, role=role) for name, key in prints.items()):
        raise UsageError(
            f"{gone[0]} is not here, and the store holds its rows as they were read in another way (columns, format, split, limit or on_bad_row of "
            f"`{_setting(role)}`). Bring the file, or take the recipe's change back."
        )
    for name in prints:
        if name in gone:
            kept.say_gone(name)
        else:
            _check_same(loaded, source, role, store, name, dict(infos)[name])
    return Opening(prints, None)


def _digests(store: Store) -> FingerprintCache:
    return FingerprintCache(store.folder / "weights.json", slow=let_go)


def _check_same(loaded: Loaded, source: Source, role: Role, store: Store, name: str, fingerprint: str) -> None:
    """Of several files some are there: UsageError where one of those has changed."""
    opened = source.model_copy(update={"path": name})
    alone = open_rows(loaded, opened, _setting(role), digest_of=_digests(store).source)
    if [info.fingerprint for info in alone.sources] != [fingerprint]:
        raise UsageError(
            f"{name} has changed since it was read, and other files of `{_setting(role)}` are not here. Bring them, too."
        )


def _setting(role: Role) -> str:
    return "source" if role == "train" else "heldout"


def _read_source(
    loaded: Loaded, source: Source, role: Role, opening: Opening, store: Store, progress: Progress, kept: Kept | None
) -> list[str]:
    from curate.data.notes import Notes

    reading, prints, setting = opening.reading, opening.prints, _setting(role)
    assert reading is not None
    target = str(loaded.path or source.path)
    pieces = reading.blocks(source.on_bad_row, limit=source.limit, setting=setting, target=target)
    seen, good = set(), 0
    waits = kept is not None and bool(store.recipes())  # before that there are no views to keep
    let_go()  # reading takes as long as there are rows
    with progress.bar(f"reading {role}" if role != "train" else "reading", 0) as count:
        for name, group in itertools.groupby(pieces, key=lambda piece: piece.source):
            seen.add(name)
            notes = Notes()
            ingested = store.add_source(name, prints[name], _counted(group, count, notes), role=role, waits=waits)
            note: dict[str, Any] = {
                "lines": reading.notes(),
                "traits": dict(notes.seen),
                "prompt": reading.prompt_column,
                "bad": ingested.bad,
                "types": reading.types(name),
            }
            store.note_source(name, role, prints[name], note)
            good += ingested.records
            again = (
                f", {ingested.duplicates:,} of them occur more than once (measured once)" if ingested.duplicates else ""
            )
            bad = f", bad rows left out: {ingested.bad:,} (`curate validate` names them)" if ingested.bad else ""
            progress.say(f"{name}: {ingested.records:,} rows, {ingested.new_rows:,} new to the store{again}{bad}")
    if not good:
        list(
            reading.good("drop", setting=setting, target=target)
        )  # raises where all are bad, naming what is wrong with them
        raise ValidationError(
            f"{target}: none of the first {source.limit:,} rows can be used (`curate validate {target}` names them); later ones can. "
            f"Raise {setting}.limit."
        )
    return [name for name in prints if name in seen or store.source_is_current(name, prints[name], role=role)]


def noted(store: Store, role: Role, prints: Mapping[str, str], *, counts: bool = True) -> list[str]:
    """What was found when these sources were read in, a sentence each: it holds as long as they do, so every plan and run says it.

    prints: name -> fingerprint. counts: bad rows that were left out, too.
    """
    from curate.data.notes import Notes

    lines: dict[str, None] = {}
    notes, bad, column = Notes(), 0, ""
    for name, fingerprint in prints.items():
        note = store.noted_of(name, role, fingerprint)
        lines |= dict.fromkeys(note.get("lines", ()))
        notes.seen.update(note.get("traits", {}))
        bad, column = bad + note.get("bad", 0), column or note.get("prompt", "")
    left_out = [f"Bad rows left out: {bad:,} (`curate validate` names them)."] if bad and counts else []
    return [*left_out, *lines, *notes.left_out(column)]


def source_types(store: Store, sources: Mapping[str, str]) -> dict[str, str]:
    """The Arrow types of columns that all of these training sources have alike. sources: name -> fingerprint."""
    types = [store.noted_of(name, "train", fingerprint).get("types", {}) for name, fingerprint in sources.items()]
    first, *others = types or [{}]
    return {name: kind for name, kind in first.items() if all(other.get(name) == kind for other in others)}


def _counted(pieces: Iterator[Record | Block], count: Any, notes: Notes) -> Iterator[Record | Block]:
    for piece in pieces:
        if isinstance(piece, Record):
            count(1)
            notes.add(piece, repeated=True)
            if piece.row is not None and (repeats := repeated_prompt(piece.row)):
                notes.seen[f"repeats:{repeats}"] += 1
        else:
            count(len(piece))
            notes.seen.update(piece.traits())
        yield piece


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
    """Every bad row of some data, or of a recipe's rows: "source", and of a recipe "heldout" and "targets.NAME" where it has them.

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
    requested_scores(loaded)
    if loaded.recipe.source is None:
        raise UsageError(f"{source}: there is no `source` to validate.")
    return validate_rows(loaded)


def validate_rows(loaded: Loaded) -> dict[str, Validation]:
    """The recipe's rows by their section: source, heldout, targets.NAME."""
    from curate.data import validate_reading

    recipe, validated = loaded.recipe, {}
    ids: dict[str, set[bytes]] = {"source": set(), "heldout": set()}
    formats: dict[str, dict[str, str]] = {}
    for role, name, rows in (("train", "source", recipe.source), ("heldout", "heldout", recipe.heldout)):
        if rows is not None:
            reading = open_rows(loaded, rows, name)
            formats[role] = reading.formats()
            validated[name] = validate_reading(reading, ids=ids[name])
    for name, target in recipe.targets.items():
        validated[f"targets.{name}"] = validate_reading(open_rows(loaded, target, f"targets.{name}", kind=target.kind))
    lines = said_otherwise(loaded, formats)
    if both := len(ids["source"] & ids["heldout"]):
        lines.append(in_both_roles(both, len(ids["heldout"])))
    last = list(validated)[-1]
    validated[last] = replace(validated[last], notes=(*validated[last].notes, *lines))
    return validated
