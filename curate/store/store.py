"""The store: one folder that keeps rows, what was measured on them, scores, selections and runs.

    store = Store("store")
    store.sql("SELECT run, checkpoint, avg(accuracy) FROM trajectories GROUP BY ALL")     # -> polars

`curate.duckdb` holds the tables (schema `data`) and the views that people query; `shards/` holds what passes measured, one parquet file a
shard. Every method opens the database for one short transaction and closes it again, so that other processes can read while one measures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from curate.errors import StoreError
from curate.store import forgetting, imports, readings, recipes, sources, tables, views
from curate.store.database import half_made
from curate.store.entries import (
    DatasetValue,
    Ingested,
    Measured,
    Role,
    SourceBlock,
    SourceRecord,
)
from curate.store.forgetting import Forgotten
from curate.store.imports import Import
from curate.store.locks import locked
from curate.store.results import StoreResults
from curate.store.sql import Connection


class Store(StoreResults):
    """A store's folder. Safe for threads; many processes may hold one, see `measuring`.

    create: make it where there is none (else StoreError says how to). patience: seconds to wait for another process that has the database
    open (30 to read and 300 to write, if None). on_wait: called once with a line to show while waiting. on_damage: called with a sentence for every
    shard that is not what was written, and was set aside (a Python warning, if None).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        create: bool = False,
        patience: float | None = None,
        on_wait: Callable[[str], None] | None = None,
        on_damage: Callable[[str], None] | None = None,
    ):
        super().__init__(folder, patience=patience, on_wait=on_wait)
        self.on_damage = on_damage
        if not self.database.path.exists():
            if not create:
                raise StoreError(
                    f"{self.folder}: no store there (found {_what_is(self.folder)}). `curate run RECIPE` and `curate import` make one."
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
        try:
            self.shards.all_pending()  # a new database beside old shards is made again from them, killed meanwhile or not
        except OSError as error:
            raise StoreError(f"{error.filename}: cannot be moved ({error.strerror}).") from None
        try:
            made = self.database.create(__version__, views.define)
        except StoreError:
            with suppress(OSError):  # what is in it is not ours to remove
                self.folder.rmdir()
            raise
        if made:
            self.ingest()

    @contextmanager
    def transaction(self, *, undo: bool = False) -> Iterator[None]:
        """What this thread writes inside is there as a whole afterwards, or, after an exception or a kill, not at all; meanwhile others wait.
        undo: it is there inside alone, to ask what would be.

        Nothing of the user's belongs in it: an SQL error ends it, even one that is caught.
        """
        waiting, done = dict(self._waiting), False
        try:
            with self.database.transaction(undo=undo):
                yield
            done = not undo
        finally:
            if not done:
                self._waiting = waiting

    # ---- rows and their sources -------------------------------------------------------------------------------------------------------

    def add_source(
        self,
        source: str,
        fingerprint: str,
        records: Iterable[SourceRecord | SourceBlock],
        *,
        role: Role = "train",
        waits: bool = False,
    ) -> Ingested:
        """Read a source in: new rows are appended, and the source's earlier occurrences (of this role) are replaced, in one transaction.

        `records`, one by one or many at once (`SourceBlock`), is streamed to disk first, so the database is locked only for the transaction
        itself. Records with defects (row None) are counted and left out. A row keeps its position for ever. NaN in the user's columns becomes NULL.
        waits: for this object alone until `take_sources`; whoever else reads sees the source as it was.
        """
        ingested = sources.add(self.folder, self.database, source, fingerprint, records, role=role, waits=waits)
        if waits:
            self._see(source, readings.waiting_name(source, fingerprint))
        return ingested

    def take_sources(self, names: Sequence[str]) -> None:
        """Put what was read of these sources, and waits, in their places, for everybody."""
        with self.database.write() as con:
            readings.take(con, {name: self._waiting.get(name, []) for name in names}, names)
            self._waiting = {name: kept for name, kept in self._waiting.items() if name not in names}
            self.database.before_commit(views.define)

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
            for left in half_made(self.folder):
                left.unlink(missing_ok=True)
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

    def ingest(self, throughput: Sequence[tuple[str, int, float]] = ()) -> int:
        """Bring finished shards into the tables, all in one short transaction. Returns how many. Doing it twice changes nothing.

        A shard that is not what was written is set aside and told to `on_damage`: its rows count as not measured.
        throughput: how fast they were made, as in `log_throughput`.
        """
        paths, damaged = self.shards.whole(self.shards.pending())
        for file in damaged:
            if self.on_damage is None:
                warnings.warn(str(file), stacklevel=2)
            else:
                self.on_damage(str(file))
        if paths:
            with self.database.write() as con:
                _log_throughput(con, throughput)
                # True where the views are about it: a run that is not whole yet changes nothing of them
                if tables.ingest(con, paths):
                    self.database.before_commit(views.define)
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
            recipes.outdate(con, [record.fingerprint for record in measured])
            self.database.before_commit(views.define)

    def write_import(
        self,
        one: Import,
        measured: Sequence[Measured],
        values: Any = None,
        dataset_values: Sequence[DatasetValue] = (),
        *,
        keys: Sequence[Any] = (),
        kind: str = "sft",
    ) -> tuple[Import, tuple[int, ...]]:
        """Keep an import, all of it or nothing. Returns it with its number, and the numbers of the earlier ones that it replaces whole.

        values: a pyarrow table with fingerprint, row_id and the columns, NULL = unknown, a line a fingerprint and row.
        dataset_values: those that the file gives. keys: ids of rows that only the file knows, of this kind; they are added first.
        """
        staging = sources.foreign_staged(self.folder, one.origin, keys, kind=kind) if keys else nullcontext()
        with staging as staged, self.database.write() as con:
            if staged is not None:
                sources.ingest_foreign(con, staged, one.origin)
            numbered = imports.write(con, one, measured, values, dataset_values)
            self.database.before_commit(views.define)
        return numbered

    def forget_import(self, number: int, *, dry_run: bool = False) -> Forgotten:
        """Take an import back whole: its values, the rows that nothing else knows, its dataset values. Scores and selections made with it are
        known to be old then. dry_run: only say what would go. Raises UsageError where there is no import of this number.
        """

        with self.transaction(undo=dry_run), self.database.write() as con:
            forgotten = replace(forgetting.forget(con, number), dry_run=dry_run)
            self.database.before_commit(views.define)
        return forgotten

    def log_throughput(self, key: str, tokens: int, seconds: float) -> None:
        """Remember how fast something ran, for `curate plan`. key: free text, such as "sample/vllm-cpu/<model fingerprint>"."""
        with self.database.write() as con:
            _log_throughput(con, [(key, tokens, seconds)])

    def remember(self, measured: Iterable[Measured]) -> None:
        """Bring the names (run, checkpoint, step) of what is measured already up to date."""
        with self.database.write() as con:
            for one in measured:
                tables.remember(con, one)


def _log_throughput(con: Connection, lines: Iterable[tuple[str, int, float]]) -> None:
    for line in lines:
        con.execute("INSERT INTO data.throughput VALUES (?, ?, ?, now()::TIMESTAMP)", list(line))


def _what_is(folder: Path) -> str:
    """What stands where a store should be, in words."""
    if folder.is_file():
        return "a file"
    return "a folder without curate.duckdb" if folder.is_dir() else "nothing"
