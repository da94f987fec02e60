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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curate.errors import StoreError, UsageError
from curate.locks import holder, locked
from curate.rows import Row
from curate.storage import conjuncts, coverage, imports, misread, query, readings, sources, syntax, tables, views
from curate.storage.coverage import Coverage
from curate.storage.database import Database, one, process_alive
from curate.storage.entries import (
    RECENT,
    DatasetValue,
    Ingested,
    Measured,
    Place,
    Role,
    SelectedRow,
    SourceRecord,
    Speeds,
    Trajectories,
)
from curate.storage.imports import Forgotten, Import
from curate.storage.selection import Selection
from curate.storage.shards import Shards

if TYPE_CHECKING:
    import polars as pl

    from curate.decide import Decisions

__all__ = [
    "DatasetValue",
    "Forgotten",
    "Import",
    "Ingested",
    "Measured",
    "Place",
    "Role",
    "SelectedRow",
    "Selection",
    "Store",
    "Trajectories",
]

VALUE_FIELDS = "name, value, low, high, n, run, checkpoint, step"


class Store:
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
        self.folder = Path(folder)
        self.database = Database(self.folder / "curate.duckdb", patience=patience, on_wait=on_wait)
        self.shards = Shards(self.folder / "shards")
        self._waiting: dict[str, list[str]] = {}  # source -> its readings that this object sees in its place
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

    def source_is_current(self, source: str, fingerprint: str, *, role: Role = "train") -> bool:
        """Whether this content of the source has been read already, so that `add_source` can be skipped: in its place, or waiting for it."""
        reading = readings.waiting_name(source, fingerprint)
        with self.database.read() as con:
            text = "SELECT source FROM data.source_state WHERE role = ? AND ((source = ? AND fingerprint = ?) OR source = ?) ORDER BY source = ? DESC"
            found = one(con, text, [role, source, fingerprint, reading, source])
        if found is not None and found[0] == reading:
            self._see(source, reading)
        return found is not None

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

    def _see(self, source: str, reading: str) -> None:
        seen = self._waiting.setdefault(source, [])
        if reading not in seen:
            seen.append(reading)

    def _read_as(self, names: Sequence[str] | None) -> list[str] | None:
        """Sources as the tables have them for this object."""
        return None if names is None else [kept for name in names for kept in self._waiting.get(name, [name])]

    def add_foreign_rows(self, source: str, keys: Sequence[Any], *, kind: str = "sft") -> list[str]:
        """Rows known only by somebody else's ids: no text. Returns their row ids, aligned to `keys`. Adding them again changes nothing."""
        return sources.add_foreign(self.folder, self.database, source, keys, kind=kind)

    def sources(self) -> list[dict[str, Any]]:
        """One dict a source and role: source, role, fingerprint, n_records, n_bad, n_rows, read_at."""
        with self.database.read() as con:
            found = query.dicts(con, "SELECT * FROM data.source_state ORDER BY read_at, source")
        seen = {kept for own in self._waiting.values() for kept in own}
        kept = [
            s
            for s in found
            if s["source"] in seen or s["source"] == readings.plain_name(s["source"]) not in self._waiting
        ]
        return [{**s, "source": readings.plain_name(s["source"])} for s in kept]

    def row_ids_of(
        self, sources: Sequence[str] | None = None, *, kind: str | None = None, role: Role | None = None
    ) -> list[str]:
        """The distinct rows that occur in these sources (all, if None), by position. Rows without text are in."""
        with self.database.read() as con:
            return [row_id for _, row_id in query.rows_of(con, self._read_as(sources), kind=kind, role=role)]

    def rows_with_text(
        self, sources: Sequence[str] | None = None, *, kind: str | None = None, role: Role | None = None
    ) -> list[str]:
        """As `row_ids_of`, without the rows that an import knows only by their ids."""
        with self.database.read() as con:
            names = self._read_as(sources)
            return [row_id for _, row_id in query.rows_of(con, names, kind=kind, role=role, with_text=True)]

    def missing(
        self,
        fingerprint: str,
        sources: Sequence[str] | None = None,
        *,
        kind: str | None = None,
        role: Role | None = None,
        row_ids: Sequence[str] | None = None,
    ) -> list[tuple[int, str]]:
        """(position, row_id) of the rows with text that this measurement has no line for, by position; NULL values count as measured.

        A row's position never changes, so `position // shard_size` gives shards of fixed membership. `row_ids` narrows further.
        """
        with self.database.read() as con:
            names = self._read_as(sources)
            return query.rows_of(con, names, kind=kind, role=role, row_ids=row_ids, without=fingerprint)

    def coverage(
        self, fingerprints: Sequence[str], sources: Sequence[str] | None = None, *, kind: str | None = None
    ) -> Coverage:
        """Which rows with text these measurements have no line for, all asked at once; NULL values count as measured."""
        with self.database.read() as con:
            return coverage.coverage(con, self._read_as(sources), kind, fingerprints)

    def positions(self, row_ids: Sequence[str]) -> np.ndarray:
        """(rows,) int64; -1 where the store does not know the row."""
        with self.database.read() as con:
            return query.positions(con, row_ids)

    def iter_rows(self, row_ids: Sequence[str], *, batch: int = 2048) -> Iterator[Row | None]:
        """The rows in the order of `row_ids`, a batch in memory at a time. None for a row without text. Raises StoreError for an unknown id."""
        with self.database.read() as con:
            positions = query.positions(con, row_ids)
        if len(positions) and positions.min() < 0:
            raise StoreError(
                f"{self.folder}: no row {row_ids[int(positions.argmin())]} in this store. "
                "Row ids: `curate sql STORE 'SELECT row_id FROM rows'`."
            )
        for start in range(0, len(row_ids), batch):
            with self.database.read() as con:
                found = query.rows_at(con, positions[start : start + batch])
            yield from found

    def occurrence_counts(
        self, row_ids: Sequence[str], sources: Sequence[str] | None = None, *, role: Role | None = None
    ) -> np.ndarray:
        """(rows,) float64: how often each row occurs in these sources."""
        with self.database.read() as con:
            return query.occurrence_counts(con, row_ids, self._read_as(sources), role)

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

    def measured_by(self) -> int | None:
        """The id of the process that is measuring now; None if nobody is."""
        return holder(self.folder / "run.lock")

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

    def imports(self) -> list[Import]:
        """What was imported, one entry a file, by number."""
        with self.database.read() as con:
            return imports.listed(con)

    def worst_ends(self) -> dict[str, Literal["high", "low"]]:
        """imported column -> the end that is bad, where its import said so."""
        return imports.worst_ends(self.imports())

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

    def measured(self, **wanted: Any) -> list[Measured]:
        """What has been measured, in the order run, step, created. Narrow by field: measured(measurement="accuracy", run="sft")."""
        with self.database.read() as con:
            return tables.measured(con, wanted)

    def measured_columns(self) -> dict[str, list[str]]:
        """measurement -> the names of its columns, for everything measured or imported."""
        with self.database.read() as con:
            names = [
                row[0] for row in con.execute("SELECT DISTINCT measurement FROM data.measured ORDER BY 1").fetchall()
            ]
            return {name: list(tables.columns_of(con, tables.table_of(name))) for name in names}

    def known_columns(self, names: Sequence[str] | None = None) -> dict[str, list[str]]:
        """fingerprint -> its columns that are known for some row (of `names`, or of all). Imports of several kinds share one table."""
        with self.database.read() as con:
            return tables.known_columns(con, names)

    def columns(self, fingerprint: str, names: Sequence[str], row_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """name -> (rows,) float64 aligned to `row_ids`; NaN where there is no value. Booleans are 0 and 1.

        Raises UsageError for a column that this measurement does not have.
        """
        series = self.series([fingerprint], names, row_ids)
        return {name: values[:, 0] for name, values in series.items()}

    def series(
        self, fingerprints: Sequence[str | None], names: Sequence[str], row_ids: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """name -> (rows, K) float64 for K fingerprints of one measurement, in their order; a fingerprint of None is all NaN."""
        with self.database.read() as con:
            return tables.series(con, fingerprints, names, row_ids)

    def texts(self, fingerprint: str, name: str, row_ids: Sequence[str]) -> list[str | None]:
        """A text column, such as token_problem, aligned to `row_ids`."""
        with self.database.read() as con:
            return tables.texts(con, fingerprint, name, row_ids)

    def samples(self, fingerprint: str, row_ids: Sequence[str]) -> list[list[dict[str, Any]]]:
        """The sampled answers of each row, in sample order: text, correct, n_tokens, logp, finished; [] where there are none."""
        with self.database.read() as con:
            return tables.samples(con, fingerprint, row_ids)

    def n_answers(self, fingerprint: str, row_ids: Sequence[str]) -> dict[str, int]:
        """row id -> how many sampled answers are kept under a fingerprint, of the rows that it has a line for."""
        with self.database.read() as con:
            return tables.n_answers(con, fingerprint, row_ids)

    def log_throughput(self, key: str, tokens: int, seconds: float) -> None:
        """Remember how fast something ran, for `curate plan`. key: free text, such as "sample/vllm-cpu/<model fingerprint>"."""
        with self.database.write() as con:
            con.execute("INSERT INTO data.throughput VALUES (?, ?, ?, now()::TIMESTAMP)", [key, tokens, seconds])

    def throughput(self, key: str, *, alike: str | None = None) -> float | None:
        """`Speeds.of` of what is logged here."""
        return self.speeds().of(key, alike=alike)

    def speeds(self) -> Speeds:
        """How fast everything ran that was logged here."""
        with self.database.read() as con:
            text = (
                "SELECT key, tokens, seconds, noted FROM data.throughput "
                f"QUALIFY row_number() OVER (PARTITION BY key ORDER BY noted DESC) <= {RECENT} ORDER BY noted DESC"
            )
            return Speeds(con.execute(text).fetchall())

    def answer_lengths(self) -> dict[str, tuple[int, int]]:
        """fingerprint -> how many of its sampled answers have a known length, and the tokens of these together."""
        with self.database.read() as con:
            text = "SELECT fingerprint, count(n_tokens), sum(n_tokens)::BIGINT FROM data.samples GROUP BY fingerprint HAVING count(n_tokens) > 0"
            return {fingerprint: (n, tokens) for fingerprint, n, tokens in con.execute(text).fetchall()}

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

    def kept(self, recipe: str) -> dict[str, Any] | None:
        """What a recipe's values rested on when it was measured last (`curate.kept`); None where nobody noted it."""
        with self.database.read() as con:
            found = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"kept of {recipe}"])
        return json.loads(found[0]) if found else None

    def keep(self, recipe: str, record: Mapping[str, Any]) -> None:
        """Note what a recipe's values rest on, as `kept` gives it back."""
        with self.database.write() as con:
            tables.note(con, f"kept of {recipe}", json.dumps(record))

    def note_source(self, source: str, role: Role, fingerprint: str, said: Mapping[str, Any]) -> None:
        """Keep what reading a source in has found, as `noted_of` gives it back; it stands for this content and way of reading alone."""
        with self.database.write() as con:
            tables.note(con, f"notes of {role} {source} {fingerprint}", json.dumps(said))

    def noted_of(self, source: str, role: Role, fingerprint: str) -> dict[str, Any]:
        """What was noted when a source was read in; empty where nothing was, as by earlier versions."""
        with self.database.read() as con:
            found = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"notes of {role} {source} {fingerprint}"])
        return json.loads(found[0]) if found else {}

    def places(self, recipe: str) -> dict[str, list[Place]]:
        """fingerprint -> (run, checkpoint, step) of the models that a recipe means by it; nothing of what it has no names of its own for."""
        with self.database.read() as con:
            return tables.places(con, recipe)

    def recipes(self) -> list[dict[str, Any]]:
        """One dict a recipe, the one scored last first: name, text, sources, uses, plain, updated."""
        with self.database.read() as con:
            listed = f"SELECT * EXCLUDE (scores_table) FROM data.recipes WHERE {readings.NO_RECIPE_WAITS} ORDER BY updated DESC"
            return query.dicts(con, listed)

    def write_scores(
        self,
        recipe: str,
        row_ids: Sequence[str],
        scores: Mapping[str, Any],
        *,
        trajectories: Sequence[Trajectories] = (),
        made_of: str | None = None,
    ) -> None:
        """Replace the scores of a recipe. name -> (rows,) numbers, booleans or text; NaN, infinities and None become NULL.

        trajectories: those with a value at every checkpoint, one entry a run, for the view `trajectories`. made_of: what they were
        computed from, as `made_of` gives it back.
        """
        with self.database.write() as con:
            tables.write_scores(con, recipe, row_ids, scores, trajectories)
            tables.note(con, f"scores of {recipe}", made_of)
            views.define(con)

    def made_of(self, what: Literal["scores", "selection"], name: str) -> str | None:
        """What a recipe's scores, or a selection, were made of; None where nobody said, "" where values were imported over what they read."""
        with self.database.read() as con:
            found = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"{what} of {name}"])
        return found[0] if found else None

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
        made_of: str | None = None,
        control: Decisions | None = None,
    ) -> Selection:
        """Keep what was decided, in place of an earlier selection of this name. made_of: what it was decided from, as `made_of` gives it back.

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
            tables.note(con, f"selection of {name}", made_of)
            if widened:
                views.define(con)
        return self.selection(name)

    def selection(self, name: str | None = None) -> Selection:
        """A selection by name; the latest if None. Raises UsageError naming those that exist."""
        with self.database.read() as con:
            found = query.dicts(con, "SELECT * FROM data.selections ORDER BY created DESC, length(name), name")
        chosen = [s for s in found if name is None or s["name"] == name]
        if not chosen:
            names = ", ".join(s["name"] for s in found)
            wanted = f"no selection {name!r}" if name is not None else "no selection"
            hint = f"There are: {names}." if names else "Make one with `curate select RECIPE`."
            raise UsageError(f"{self.folder}: {wanted} in this store. {hint}")
        first = chosen[0]
        spec, counts = json.loads(first["spec"] or "{}"), json.loads(first["counts"])
        return Selection(self, first["name"], first["recipe"], spec, counts, first["created"])

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

    # ---- reading ------------------------------------------------------------------------------------------------------------------------

    def sql(
        self,
        text: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        recipe: str | None = None,
        source: str | Sequence[str] | None = None,
    ) -> pl.DataFrame:
        """Query the views; reading only. recipe, source: narrow every view to a recipe (its sources, scores and fingerprints) or to sources.

        Raises UsageError for SQL that does not parse or names no column (the nearest is named), or that wants to write.
        """
        names = self._read_as((source,) if isinstance(source, str) else source)
        with self.database.read() as con:
            if recipe is not None or names is not None or views.outdated(con):
                views.narrow(con, text, recipe=recipe, sources=names)
            return query.run(con, text, params)

    def own_names(self) -> dict[str, str]:
        """The user's columns -> what `occurrences` calls them."""
        with self.database.read() as con:
            return {column.name: column.shown for column in views.own_names(con, None)["occurrences"]}

    def frame(self, *, recipe: str | None = None, planned: Sequence[str] = ()) -> misread.Frame:
        """What a recipe's SQL sees as `scored`, with the columns that are still to come (`planned`) as NULL."""
        with self.database.read() as con:
            views.narrow(con, "scored", recipe=recipe, sources=None)
            return misread.frame(con, recipe, planned)

    def check_sql(
        self, text: str, key: str, *, recipe: str | None = None, planned: Sequence[str] = (), is_order: bool = False
    ) -> str:
        """A recipe's SQL expression over `scored`, as it is to be asked. is_order: rows are ordered by its value.

        Raises UsageError naming `key` for a name that two columns have, and where numbers would be ordered as text.
        """
        with self.database.read() as con:
            views.narrow(con, f"scored occurrences {text}", recipe=recipe, sources=None)
            return misread.checked(con, text, key, misread.frame(con, recipe, planned), is_order=is_order)

    def numbers_in(self, column: str, *, recipe: str | None = None) -> misread.Numbers | None:
        """Of a column of `scored` that is text: which of it are numbers, and the cast that reads them. None where less than half are."""
        with self.database.read() as con:
            views.narrow(con, "scored", recipe=recipe, sources=None)
            return misread.numbers_in(con, misread.quoted(column), "scored")

    def conjuncts(self, where: str) -> list[conjuncts.Conjunct]:
        """The parts of a condition that AND joins, with what they compare."""
        with self.database.read() as con:
            return conjuncts.conjuncts(con, where)

    def unclear_names(self, text: str, *, recipe: str | None = None) -> list[str]:
        """A sentence for every name in a query that curate and the user have a column of; what it means is curate's."""
        with self.database.read() as con:
            tree = syntax.parse(con, text)
            return list(misread.ambiguous(con, tree, views.own_names(con, recipe))) if tree else []

    def scored(self, *, recipe: str | None = None, source: str | Sequence[str] | None = None) -> pl.DataFrame:
        """The view `scored`, one line a row, by position."""
        return self.sql("SELECT * FROM scored ORDER BY position", recipe=recipe, source=source)

    def find_row(self, text: str) -> str:
        """The row that `text` means: a row id, the unique beginning of one (6 digits or more), source#row (rows from 1, as messages number them), or
        source:index (from 0, as the views number them).
        """
        with self.database.read() as con:
            return query.find_row(con, text, str(self.folder))

    def status(self) -> dict[str, Any]:
        """What is in the store: counts by table, sources, measurements with rows done, shards not taken in yet, the last ten runs, the last
        command if it was refused (such a command is no run; the view `runs` has it), who is measuring.
        """
        with self.database.read() as con:
            found = query.status(con)
        for run in found["runs"]:  # the next command that writes marks them for good
            if run.pop("host") == socket.gethostname() and run["outcome"] is None and not process_alive(run["pid"]):
                run["outcome"] = "killed"
        return {
            "folder": str(self.folder),
            **found,
            "shards_pending": len(self.shards.pending()),
            "measured_by_process": self.measured_by(),
        }
