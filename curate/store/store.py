"""The store: one folder that keeps rows, what was measured on them, scores, selections and runs.

    store = Store("store")
    store.sql("SELECT run, checkpoint, avg(accuracy) FROM trajectories GROUP BY ALL")     # -> polars

`curate.duckdb` holds the tables (schema `data`) and the views that people query; `shards/` holds what passes measured, one parquet file a
shard. Every method opens the database for one short transaction and closes it again, so that other processes can read while one measures.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import StoreError, UsageError
from curate.store import imports, readings, sources, tables, views
from curate.store.database import one, process_alive
from curate.store.entries import (
    DatasetValue,
    Ingested,
    Measured,
    Place,
    Role,
    SourceRecord,
    Trajectories,
)
from curate.store.imports import Forgotten, Import
from curate.store.locks import locked
from curate.store.reader import StoreReader
from curate.store.selection import Selection, find_selection

if TYPE_CHECKING:
    from curate.store.decisions import Decisions


VALUE_FIELDS = "name, value, low, high, n, run, checkpoint, step"


class Store(StoreReader):
    """A store's folder. Safe for threads; many processes may hold one, see `measuring`.

    create: make it where there is none (else StoreError says how to). patience: seconds to wait for another process that has the database
    open (30 to read and 300 to write, if None). on_wait: called once with a line to show while waiting.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        create: bool = False,
        patience: float | None = None,
        on_wait: Callable[[str], None] | None = None,
    ):
        super().__init__(folder, patience=patience, on_wait=on_wait)
        if not self.database.path.exists():
            if not create:
                found = (
                    "a file"
                    if self.folder.is_file()
                    else "a folder without curate.duckdb"
                    if self.folder.is_dir()
                    else "nothing"
                )
                raise StoreError(
                    f"{self.folder}: no store there (found {found}). `curate run RECIPE` and `curate import` make one."
                )
            self._create()
        else:
            self.database.open_once()

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r})"

    def _create(self) -> None:
        from curate import __version__

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot make this folder ({error.strerror}).") from None
        if self.database.create(__version__):
            with self.database.write() as con:
                views.define(con)
            self._ingest(self.shards.all_files())  # a new database beside old shards is made again from them

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What this thread writes inside is there as a whole afterwards, or, after an exception or a kill, not at all; meanwhile others wait.

        Nothing of the user's belongs in it: an SQL error ends it, even one that is caught.
        """
        waiting, done = dict(self._waiting), False
        try:
            with self.database.transaction():
                yield
            done = True
        finally:
            if not done:
                self._waiting = waiting

    # ---- rows and their sources -------------------------------------------------------------------------------------------------------

    def add_source(
        self,
        source: str,
        fingerprint: str,
        records: Iterable[SourceRecord],
        *,
        role: Role = "train",
        waits: bool = False,
    ) -> Ingested:
        """Read a source in: new rows are appended, and the source's earlier occurrences (of this role) are replaced, in one transaction.

        `records` is streamed to disk first, so the database is locked only for the transaction itself. Records with defects (row None) are
        counted and left out. A row keeps its position for ever. NaN in the user's columns becomes NULL.
        waits: for this object alone until `take_sources`; whoever else reads sees the source as it was.
        """
        found = sources.add(self.folder, self.database, source, fingerprint, records, role=role, waits=waits)
        if waits:
            self._see(source, readings.waiting_name(source, fingerprint))
        return found

    def take_sources(self, names: Sequence[str]) -> None:
        """Put what was read of these sources, and waits, in their places, for everybody."""
        with self.database.write() as con:
            readings.take(con, {name: self._waiting.get(name, []) for name in names}, names)
            self._waiting = {name: kept for name, kept in self._waiting.items() if name not in names}
            views.define(con)

    def add_foreign_rows(self, source: str, keys: Sequence[Any], *, kind: str = "sft") -> list[str]:
        """Rows known only by somebody else's ids: no text. Returns their row ids, aligned to `keys`. Adding them again changes nothing."""
        return sources.add_foreign(self.folder, self.database, source, keys, kind=kind)

    # ---- what passes measured -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the store for measuring: one process at a time, others may read. Takes in finished shards and removes half-written ones first.

        Raises StoreError naming the holder's process id.
        """

        def taken(holder: str) -> StoreError:
            return StoreError(
                f"{self.folder}: process {holder} is measuring into this store. Wait for it (`curate status {self.folder}`), "
                "or give this recipe a store of its own with --store."
            )

        with locked(self.folder / "run.lock", taken):
            self.shards.sweep()
            sources.sweep(self.folder)
            self.ingest()
            yield

    def write_shard(
        self,
        measured: Measured,
        index: int,
        row_ids: Sequence[str],
        columns: Mapping[str, Any],
        samples: Sequence[Sequence[Any]] | None = None,
    ) -> Path:
        """Keep one shard for good; `ingest` brings it into the tables (now, or when the store is next held for measuring).

        columns: name -> (rows,) numbers (NaN becomes NULL), booleans, or text (None becomes NULL). samples: a list a row of mappings or objects
        with text, correct, n_tokens, logp, finished. Raises StoreError when the disk is full: nothing half-written stays.
        """
        return self.shards.write(measured, index, row_ids, columns, samples)

    def ingest(self) -> int:
        """Bring finished shards into the tables, all in one short transaction. Returns how many. Doing it twice changes nothing."""
        return self._ingest(self.shards.pending())

    def _ingest(self, paths: list[Path]) -> int:
        if paths:
            with self.database.write() as con:
                if tables.ingest(
                    con, paths
                ):  # what the views are about; a run that is not whole yet changes nothing of them
                    views.define(con)
            self.shards.ingested(paths)
        return len(paths)

    def put_values(self, measured: Sequence[Measured], values: Any) -> None:
        """Write values that no pass of ours measured (imports): a pyarrow table with fingerprint, row_id and the columns, NULL = unknown.

        All of `measured` are of one measurement. Where a line for (fingerprint, row_id) exists its columns are updated.
        """
        with self.database.write() as con:
            for record in measured:
                tables.remember(con, record)
            tables.put(con, measured[0].measurement, values)
            tables.outdate(con, [record.fingerprint for record in measured])
            views.define(con)

    def write_import(
        self,
        one: Import,
        measured: Sequence[Measured],
        values: Any = None,
        said: Sequence[DatasetValue] = (),
        *,
        keys: Sequence[Any] = (),
        kind: str = "sft",
    ) -> tuple[Import, tuple[int, ...]]:
        """Keep an import, all of it or nothing. Returns it with its number, and the numbers of the earlier ones that it replaces whole.

        values: a pyarrow table with fingerprint, row_id and the columns, NULL = unknown, a line a fingerprint and row. said: dataset values.
        keys: ids of rows that only the file knows, of this kind; they are added first.
        """
        staging = sources.foreign_staged(self.folder, one.origin, keys, kind=kind) if keys else nullcontext()
        with staging as staged, self.database.write() as con:
            if staged is not None:
                sources.ingest_foreign(con, staged, one.origin)
            found = imports.write(con, one, measured, values, said)
            views.define(con)
        return found

    def forget_import(self, number: int, *, dry_run: bool = False) -> Forgotten:
        """Take an import back whole: its values, the rows that nothing else knows, its dataset values. Scores and selections made with it are
        known to be old then. dry_run: only say what would go. Raises UsageError where there is no import of this number.
        """

        class Undone(Exception):
            pass

        try:
            with self.database.write() as con:
                found = replace(imports.forget(con, number), dry_run=dry_run)
                views.define(con)
                if dry_run:
                    raise Undone
        except Undone:
            pass
        return found

    def log_throughput(self, key: str, tokens: int, seconds: float) -> None:
        """Remember how fast something ran, for `curate plan`. key: free text, such as "sample/vllm-cpu/<model fingerprint>"."""
        with self.database.write() as con:
            con.execute("INSERT INTO data.throughput VALUES (?, ?, ?, now()::TIMESTAMP)", [key, tokens, seconds])

    # ---- recipes, scores, selections, runs ----------------------------------------------------------------------------------------------

    def remember(self, measured: Iterable[Measured]) -> None:
        """Bring the names (run, checkpoint, step) of what is measured already up to date."""
        with self.database.write() as con:
            for one in measured:
                tables.remember(con, one)

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
        with self.database.write() as con:
            tables.register_recipe(con, name, text, sources, uses, plain)
            tables.note_places(con, name, places or {})
            tables.note(
                con, f"roles of {name}", json.dumps({role: list(n) for role, n in roles.items()}) if roles else None
            )
            views.define(con)

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
            tables.register_recipe(con, waiting, "", [n for group in seen.values() for n in group], uses, plain)
            tables.note_places(con, waiting, places)
            tables.note(con, f"roles of {waiting}", json.dumps(seen))
        return waiting

    def unstage_recipe(self, name: str) -> None:
        """Forget what `stage_recipe` made."""
        with self.database.write() as con:
            tables.forget_recipe(con, readings.waiting_recipe(name))

    def keep(self, recipe: str, record: Mapping[str, Any]) -> None:
        """Note what a recipe's values rest on, as `kept` gives it back."""
        with self.database.write() as con:
            tables.note(con, f"kept of {recipe}", json.dumps(record))

    def note_source(self, source: str, role: Role, fingerprint: str, said: Mapping[str, Any]) -> None:
        """Keep what reading a source in has found, as `noted_of` gives it back; it stands for this content and way of reading alone."""
        with self.database.write() as con:
            tables.note(con, f"notes of {role} {source} {fingerprint}", json.dumps(said))

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
            tables.write_scores(con, recipe, row_ids, scores, trajectories)
            tables.note(con, f"scores of {recipe}", inputs_hash)
            views.define(con)

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
            tables.drop_control(con, name)
            widened = tables.write_selection(con, name, decisions, recipe, spec)
            if control is not None:
                beside = tables.control_name(name)
                if one(con, "SELECT 1 FROM data.selections WHERE name = ?", [beside]):
                    raise UsageError(
                        f"select.control: it would be called {beside!r}, and this store has a selection of that name. Rename one of the recipes."
                    )
                tables.write_selection(con, beside, control, recipe, {**(spec or {}), "control_of": name})
            tables.note(con, f"selection of {name}", inputs_hash)
            if widened:
                views.define(con)
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
                [outcome, message, json.dumps(dict(counts or {}), default=str), run],
            )
