"""What a recipe's values rest on beside its rows and settings, as its last whole measurement found it: models, tokenizers, engines, files.

The store keeps the answers, so that scores, selections and exports need no model and no source file: measured on one machine, selected on another.
What is there is asked anew, so that a change is noticed; only what is not there is taken as it was, and that is said.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from curate.errors import BrokenCheckpoint, CurateError, ModelError, UsageError
from curate.models.checkpoints import Checkpoint
from curate.models.fingerprints import WEIGHTS
from curate.models.hub import HUB_ID

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store import Store

Answer = TypeVar("Answer")


class Kept:
    """The answers that a recipe's plan rests on.

    known: question -> answer of `when`. anew: everything is asked now (what measures has to have it). now: the answers of this run.
    """

    def __init__(self, known: dict[str, Any] | None = None, when: str = "", *, anew: bool = True):
        self.known, self.when, self.anew = known or {}, when, anew
        self.now: dict[str, Any] = {}
        self._gone: set[str] = set()  # where models would be that are not there
        self._said: dict[str, None] = {}

    def ask(self, question: str, find: Callable[[], Answer], *, gone: bool = False, before: bool = False) -> Answer:
        """An answer (of JSON's types): found now, or as it was where that fails. gone: there is nothing to ask. before: as it was, if known."""
        if not self.anew and question in self.known and (gone or before):
            answer = self.known[question]
        else:
            try:
                answer = find()
            except (CurateError, OSError):
                if self.anew or question not in self.known:
                    raise
                answer = self.known[question]
        self.now[question] = answer
        return answer

    def of_model(
        self, what: str, checkpoint: Checkpoint, find: Callable[[], Answer], *, before: bool = False
    ) -> Answer:
        """An answer about a model."""
        question = f"{what} of {checkpoint.label} {checkpoint.fingerprint}"
        return self.ask(question, find, gone=checkpoint.home in self._gone, before=before)

    def model(self, role: str, name: str, base: str | None, folder: Path, find: Callable[[], Checkpoint]) -> Checkpoint:
        """A model of the recipe."""
        question = _question(role, name, base)
        if not self.anew and question in self.known and is_gone(name, folder):
            return self._as_it_was([self.known[question]], question, folder)[0]
        try:
            model = find()
        except ModelError as error:
            if self.anew or not _base_gone(self.known.get(question), error):
                raise
            return self._as_it_was([self.known[question]], question, folder)[0]
        self.now[question] = _record(model, name)
        return model

    def series(
        self, asked: str | Sequence[str], base: str | None, folder: Path, find: Callable[[Any], Sequence[Checkpoint]]
    ) -> list[Checkpoint]:
        """The checkpoints of the recipe. find: those of a folder, or of a list. UsageError where some are gone and others are not as they were."""
        question = _question("checkpoints", asked if isinstance(asked, str) else list(asked), base)
        known = [] if self.anew else self.known.get(question, [])
        gone = [one for one in known if is_gone(one["place"], folder)]
        if not gone:
            try:
                checkpoints = list(find(asked))
            except ModelError as error:
                if not known or not _base_gone(known[0], error):
                    raise
                return self._as_it_was(known, question, folder)
            self.now[question] = [_record(s, _place(s, asked, folder)) for s in checkpoints]
            return checkpoints
        here = [one for one in known if one not in gone]
        as_known = {(one["checkpoint"], one["fingerprint"]) for one in here}
        there = find([one["place"] for one in here]) if here else []
        changed = [s.checkpoint for s in there if (s.checkpoint, s.fingerprint) not in as_known]
        if isinstance(asked, str) and (root := folder / Path(asked).expanduser()).is_dir():
            names = {one["checkpoint"] for one in known}
            changed += sorted(
                p.name for p in root.glob("checkpoint-*") if p.name not in names and not is_gone(p.name, root)
            )
        if changed:
            raise UsageError(
                f"{gone[0]['place']} is not here, and {changed[0]} is not as it was measured on {self.when}. "
                "`curate measure`, where all of models.checkpoints is, takes them together."
            )
        return self._as_it_was(known, question, folder)

    def _as_it_was(self, records: list[dict[str, Any]], question: str, folder: Path) -> list[Checkpoint]:
        checkpoints = []
        for record in records:
            path, base = folder / Path(record["place"]).expanduser(), record["base"]
            fields = {name: value for name, value in record.items() if name != "place"}
            where = str(path.resolve() if path.is_dir() else path)
            checkpoint = Checkpoint(**fields | {"path": where, "base": base and str(folder / base)})
            if is_gone(record["place"], folder) or base:
                self._gone.add(where)
                self._said[record["place"]] = None
            checkpoints.append(checkpoint)
        self.now[question] = records if question.startswith("checkpoints") else records[0]
        return checkpoints

    def say_gone(self, name: str) -> None:
        """A file of the recipe that is not there."""
        self._said[name] = None

    def notes(self) -> list[str]:
        """One sentence on what is not there."""
        if not self._said:
            return []
        names = list(self._said)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
        return [f"{shown} {'is' if len(names) == 1 else 'are'} not here: as measured on {self.when}."]

    def record(self) -> dict[str, Any]:
        """What the store keeps of this run."""
        today = datetime.datetime.now().astimezone().date().isoformat()
        return {"when": today if self.anew or not self.when else self.when, "answers": self.now}


def open_kept(loaded: Loaded, store: Store, *, anew: bool) -> Kept:
    """Of this recipe, or of another of the same folder."""
    from curate.store.sharing import recipe_file

    own = store.kept(loaded.name)
    if own is None and not anew:
        for other in store.recipes():
            place = recipe_file(store, other["text"])
            if own is None and place is not None and place.parent.resolve() == loaded.folder.resolve():
                own = store.kept(other["name"])
    own = own or {}
    return Kept(own.get("answers"), own.get("when", ""), anew=anew)


def is_gone(name: str, folder: Path) -> bool:
    """Whether a model's folder holds no weights, or a hub's model is not in the cache of this machine."""
    path = folder / Path(name).expanduser()
    if os.path.isdir(path):
        return not any(any(path.glob(pattern)) for pattern in WEIGHTS)
    of_hub = HUB_ID.fullmatch(name)
    if os.path.exists(path) or of_hub is None or name.startswith("."):
        return not os.path.exists(path)
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "adapter_config.json")
    return not any(
        isinstance(try_to_load_from_cache(of_hub["repo"], f, revision=of_hub["revision"]), str) for f in files
    )


def _base_gone(known: dict[str, Any] | None, error: ModelError) -> bool:
    """Whether it is an adapter's base that was not found: the adapter itself is there."""
    return known is not None and known["base"] is not None and not isinstance(error, BrokenCheckpoint)


def _question(role: str, name: str | list[str], base: str | None) -> str:
    return f"{role} {name}" + (f" on {base}" if base else "")


def _record(checkpoint: Checkpoint, place: str) -> dict[str, Any]:
    """A checkpoint as the store keeps it, with its place in the recipe instead of folders of this machine."""
    base = checkpoint.base and Path(checkpoint.base).name
    kept = asdict(replace(checkpoint, base=base))
    return {name: value for name, value in kept.items() if name not in ("path", "start")} | {"place": place}


def _place(checkpoint: Checkpoint, asked: str | Sequence[str], folder: Path) -> str:
    """Where a checkpoint is, as the recipe says it."""
    names = [asked] if isinstance(asked, str) else asked
    for name in names:
        path = (folder / Path(name).expanduser()).resolve()
        if checkpoint.path == str(path):
            return name
        if checkpoint.path == str(path / checkpoint.checkpoint):
            return f"{name.rstrip('/')}/{checkpoint.checkpoint}"
    of_hub = [
        name for name in names if name.partition("@")[2] == checkpoint.checkpoint or name == checkpoint.checkpoint
    ]
    return of_hub[0] if of_hub else os.path.relpath(checkpoint.path, folder)
