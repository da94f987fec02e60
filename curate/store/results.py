"""The store, written: recipes, their scores and selections, and the runs of commands. store.py has what rows and measurements need."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import UsageError, without_secrets
from curate.store import readings, recipes, views
from curate.store.entries import DatasetValue, Place, Role, Trajectories
from curate.store.locks import process_alive
from curate.store.reader import StoreReader
from curate.store.selection import Selection, find_selection
from curate.store.sql import one

if TYPE_CHECKING:
    from curate.store.decisions import Decisions


VALUE_FIELDS = "name, value, low, high, n, run, checkpoint, step"


class StoreResults(StoreReader):
    """A store's folder, as results are written into it. Every method is one short transaction. See `Store`."""

    def register_recipe(
        self,
        name: str,
        text: str,
        *,
        sources: Sequence[str] = (),
        uses: Sequence[str] = (),
        plain: Sequence[str] = (),
        places: Mapping[str, Sequence[Place]] | None = None,
        roles: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Say what a recipe is about, before its scores are written; the views follow the recipe registered or scored last.

        sources: the names of its sources, held-out ones too. uses: the fingerprints that its views may show. plain: those of them whose columns
        stand in `scored` (the tokens, the reference's, the last checkpoint's): at most one a measurement. places: fingerprint -> what the recipe
        calls the models that it is of; of others what they were called last. roles: "train" and "heldout" -> the sources that the recipe takes
        such rows from; its views show no others.
        """
        noted = json.dumps({role: list(names) for role, names in roles.items()}) if roles else None
        with self.database.write() as con:
            recipes.register_recipe(con, name, text, sources, uses, plain)
            recipes.note_places(con, name, places or {})
            recipes.note(con, f"roles of {name}", noted)
            self.database.before_commit(views.define)

    def stage_recipe(
        self,
        name: str,
        *,
        uses: Sequence[str],
        plain: Sequence[str],
        places: Mapping[str, Sequence[Place]],
        roles: Mapping[str, Sequence[str]],
    ) -> str:
        """A recipe as it will be, seen by nobody who does not ask for it by the name that is returned; `write_scores` takes that name, too."""
        waiting = readings.waiting_recipe(name)
        seen = {role: self._read_as(names) or [] for role, names in roles.items()}
        self.unstage_recipe(name)
        with self.database.write() as con:
            recipes.register_recipe(con, waiting, "", [n for group in seen.values() for n in group], uses, plain)
            recipes.note_places(con, waiting, places)
            recipes.note(con, f"roles of {waiting}", json.dumps(seen))
        return waiting

    def unstage_recipe(self, name: str) -> None:
        """Forget what `stage_recipe` made."""
        with self.database.write() as con:
            recipes.forget_recipe(con, readings.waiting_recipe(name))

    def keep(self, recipe: str, record: Mapping[str, Any]) -> None:
        """Note what a recipe's values rest on, as `kept` gives it back."""
        with self.database.write() as con:
            recipes.note(con, f"kept of {recipe}", json.dumps(record))

    def note_made(self, recipe: str, record: Mapping[str, Any]) -> None:
        """Note what is to be known of a recipe's scores, as `made` gives it back."""
        with self.database.write() as con:
            recipes.note(con, f"made of {recipe}", json.dumps(record))

    def note_source(self, source: str, role: Role, fingerprint: str, note: Mapping[str, Any]) -> None:
        """Keep what reading a source in has found, as `noted_of` gives it back; it stands for this content and way of reading alone."""
        with self.database.write() as con:
            recipes.note(con, f"notes of {role} {source} {fingerprint}", json.dumps(note))

    def write_scores(
        self,
        recipe: str,
        row_ids: Sequence[str],
        scores: Mapping[str, Any],
        *,
        trajectories: Sequence[Trajectories] = (),
        inputs_hash: str | None = None,
    ) -> None:
        """Replace the scores of a recipe. name -> (rows,) numbers, booleans or text; NaN, infinities and None become NULL.

        trajectories: those with a value at every checkpoint, one entry a run, for the view `trajectories`. inputs_hash: what they were
        computed from, as `inputs_hash` gives it back.
        """
        with self.database.write() as con:
            recipes.write_scores(con, recipe, row_ids, scores, trajectories)
            recipes.note(con, f"scores of {recipe}", inputs_hash)
            self.database.before_commit(views.define)

    def write_dataset_values(self, origin: str, values: Iterable[DatasetValue]) -> None:
        """Replace the dataset values of an origin: a recipe's name, or "import:<file>" (shown whatever the recipe)."""
        with self.database.write() as con:
            con.execute("DELETE FROM data.dataset_values WHERE origin = ?", [origin])
            for value in values:
                row = [origin, *(None if isinstance(v, float) and not np.isfinite(v) else v for v in astuple(value))]
                con.execute(
                    f"INSERT INTO data.dataset_values (origin, {VALUE_FIELDS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row
                )

    def write_selection(
        self,
        name: str,
        decisions: Decisions,
        *,
        recipe: str | None = None,
        spec: Mapping[str, Any] | None = None,
        inputs_hash: str | None = None,
        control: Decisions | None = None,
    ) -> Selection:
        """Keep what was decided, in place of an earlier selection of this name. inputs_hash: what it was decided from, as `inputs_hash` gives it
        back.

        control: a second selection drawn beside it, kept as <name>_control in the same transaction; an earlier one goes.
        """
        with self.database.write() as con:
            recipes.drop_control(con, name)
            widened = recipes.write_selection(con, name, decisions, recipe, spec)
            if control is not None:
                beside = recipes.control_name(name)
                if one(con, "SELECT 1 FROM data.selections WHERE name = ?", [beside]):
                    raise UsageError(
                        f"select.control: it would be called {beside!r}, and this store has a selection of that name. Rename one of the recipes."
                    )
                recipes.write_selection(con, beside, control, recipe, {**(spec or {}), "control_of": name})
            recipes.note(con, f"selection of {name}", inputs_hash)
            if widened:
                self.database.before_commit(views.define)
        return self.selection(name)

    def selection(self, name: str | None = None) -> Selection:
        """A selection by name; the latest if None. Raises UsageError naming those that exist."""
        return find_selection(self, name)

    def begin_run(self, recipe: str, command: str, version: str) -> int:
        """Note the start of a command; returns the run's id. Unfinished runs whose process is gone are marked as killed."""
        host, pid = socket.gethostname(), os.getpid()
        with self.database.write() as con:
            open_runs = con.execute(
                "SELECT id, pid FROM data.runs WHERE outcome IS NULL AND host = ?", [host]
            ).fetchall()
            for run, other in open_runs:
                if not process_alive(other):
                    con.execute(
                        "UPDATE data.runs SET outcome = 'killed', finished = now()::TIMESTAMP WHERE id = ?", [run]
                    )
            run = con.execute("SELECT coalesce(max(id), 0) + 1 FROM data.runs").fetchall()[0][0]
            con.execute(
                "INSERT INTO data.runs VALUES (?, ?, ?, ?, now()::TIMESTAMP, NULL, NULL, NULL, NULL, ?, ?)",
                [run, recipe, command, version, host, pid],
            )
        return int(run)

    def finish_run(self, run: int, outcome: str, message: str = "", counts: Mapping[str, Any] | None = None) -> None:
        """Note how a command ended. outcome: "done", "failed", "stopped", or "refused": wrong use, before anything was done."""
        with self.database.write() as con:
            con.execute(
                "UPDATE data.runs SET finished = now()::TIMESTAMP, outcome = ?, message = ?, counts = ? WHERE id = ?",
                [outcome, without_secrets(message), json.dumps(dict(counts or {}), default=str), run],
            )
