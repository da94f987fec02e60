"""`curate check`: is what a store's folder holds what was written there? And what is not, mended from what is.

Read whole are every shard (its checksum, see wholeness.py), every table of the database (DuckDB keeps a checksum of every block of its file) and
what was derived; then shards and database are compared, since each holds what the other has. Nothing is deleted but half-written files.
"""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from curate.errors import DamagedStore, StoreError
from curate.passes.tensor_files import fault_of_tensors
from curate.store import comparing, recipes, sources
from curate.store.comparing import Compared, compare, fingerprint_of
from curate.store.damage import explain
from curate.store.database import DATABASE, half_made
from curate.store.locks import locked
from curate.store.shards import Shards
from curate.store.sql import quote
from curate.store.store import Store
from curate.store.wholeness import checksum, fault_of, has_checksum, named_with, number_of


@dataclass(frozen=True)
class Problem:
    """file: relative to the store. why: what is wrong with it. done: what was done about it; "" where nothing was."""

    file: str
    why: str
    done: str = ""


@dataclass
class Checked:
    """What was found. shards: how many there are, without_checksum: of them written by an earlier version. pending: not taken in yet. derived: other
    files that were read. database: "whole", "damaged", "missing" or "made again".
    """

    folder: str
    shards: int = 0
    without_checksum: int = 0
    pending: int = 0
    derived: int = 0
    database: str = "whole"
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def unmended(self) -> int:
        return sum(not problem.done for problem in self.problems)


def check(folder: Path, *, repair: bool = False, say: Callable[[str], None] = lambda _: None) -> Checked:
    """Read a store whole. repair: set aside what is damaged, and make it again from what is whole; nobody else may be measuring.

    StoreError where there is no store, or one of another version.
    """
    if not (folder / DATABASE).is_file() and not (folder / "shards").is_dir():
        raise StoreError(
            f"{folder}: no store there (no {DATABASE} and no shards). `curate run RECIPE` and `curate import` make one."
        )

    def taken(holder: str) -> StoreError:
        return StoreError(
            f"{folder}: process {holder} is measuring into this store. Repair it when that has ended; checking alone can be done now."
        )

    with ExitStack() as held:
        if repair:
            held.enter_context(locked(folder / "run.lock", taken))
        return _Check(folder, repair, say).all()


class _Check:
    def __init__(self, folder: Path, repair: bool, say: Callable[[str], None]):
        self.folder, self.repair, self.say = folder, repair, say
        self.shards, self.found = Shards(folder / "shards"), Checked(str(folder))

    def all(self) -> Checked:
        whole = list(self._whole_shards())
        self.found.without_checksum = sum(not has_checksum(path) for path in whole)
        store = self._database()
        if store is not None:
            self._compare(store, whole)
        self._derived()
        self._half_written()
        aside = self.shards.damaged()
        if aside:
            self.found.notes.append(
                f"Damaged files set aside in {self.shards.damaged_folder}: {len(aside)}; delete them when nobody misses them."
            )
        return self.found

    def _problem(self, path: Path, why: str, done: str = "") -> None:
        self.found.problems.append(Problem(path.relative_to(self.folder).as_posix(), why, done))

    def _whole_shards(self) -> Iterator[Path]:
        for path in self.shards.all_files():
            try:
                why = fault_of(path)
            except FileNotFoundError:  # taken in by whoever is measuring
                continue
            self.found.shards += 1
            self.found.pending += path.parent == self.shards.pending_folder
            if why is None:
                yield path
            elif self.repair:
                self._problem(path, why, f"set aside as {self.shards.set_aside(path, why).now}")
            else:
                self._problem(path, why)

    # ---- the database -------------------------------------------------------------------------------------------------------------------

    def _database(self) -> Store | None:
        """The store, where its database is whole or has been made again."""
        path = self.folder / DATABASE
        if not path.is_file():
            why = "there is none"
            self.found.database = "missing"
        else:
            try:
                store = Store(self.folder, on_wait=self.say)
                _read_all(store)
                return store
            except DamagedStore as error:
                why = str(error).split(". `curate check")[0].removeprefix(f"{path} ")
                self.found.database = "damaged"
        if not self.repair:
            self._problem(path, why)
            return None
        done = "made again from the shards. Run the recipe again: rows come from the sources; what was imported has to be imported again"
        for file in (path, path.with_name(f"{DATABASE}.wal")):
            if file.exists():
                done = f"set aside as {self.shards.set_aside(file, why).now}, {done}" if file == path else done
        store = Store(self.folder, create=True, on_wait=self.say)
        self.found.database = "made again"
        self._problem(path, why, done)
        return store

    def _compare(self, store: Store, whole: list[Path]) -> None:
        of: dict[str, list[Path]] = defaultdict(list)
        for path in whole:
            path = path if path.exists() else self.folder / "shards" / path.name.split("-")[0] / path.name
            if path.exists() and (self.found.database == "made again" or path.parent != self.shards.pending_folder):
                of[fingerprint_of(path)].append(path)
        measured = [m for m in store.measured() if m.reads != "import"]
        for fingerprint in of.keys() - {m.fingerprint for m in measured}:
            for path in of[fingerprint]:
                self._take_in(store, path, "the database does not have it", [])
        for one in measured:
            with store.database.read() as con:
                compared = compare(con, one, of[one.fingerprint])
            self._settle(store, compared, of[one.fingerprint])

    def _settle(self, store: Store, compared: Compared, files: list[Path]) -> None:
        """Say, and mend, what shards and database have not alike."""
        fingerprint = compared.measured.fingerprint
        lines = set(compared.uncovered)
        for path in files:
            if path in compared.other and not has_checksum(path):
                why = f"it has other values than the database in {compared.other[path]:,} rows, and no checksum"
                if self.repair:
                    import pyarrow.parquet as pq

                    lines |= set(pq.read_table(path, columns=["row_id"])["row_id"].to_pylist())
                    self._problem(
                        path,
                        why,
                        f"set aside as {self.shards.set_aside(path, why).now}, and written again from the database",
                    )
                else:
                    self._problem(path, why)
            elif path in compared.other:
                self._take_in(
                    store, path, f"the database has other values in {compared.other[path]:,} of its rows", [fingerprint]
                )
            elif path in compared.lost:
                self._take_in(store, path, "the database does not have all of its rows", [fingerprint])
            elif self.repair and not has_checksum(path):
                content = path.read_bytes()
                path.rename(path.with_name(named_with(path.stem, checksum(content))))
                self.found.without_checksum -= 1
        if not compared.uncovered and not (lines and self.repair):
            return
        where = self.shards.folder / fingerprint.split("-")[0]
        why = f"{len(compared.uncovered):,} rows of {compared.measured.measurement} {compared.measured.checkpoint} are in the database alone"
        if not self.repair:
            self._problem(where, why)
            return
        numbers = [number_of(path) for path in where.glob("*.parquet")]
        with store.database.read() as con:
            written = comparing.write_again(
                con, self.shards, compared.measured, sorted(lines), max(numbers, default=-1) + 1
            )
        self.shards.ingested(written)
        if compared.uncovered:
            self._problem(where, why, "written to shards again")

    def _take_in(self, store: Store, path: Path, why: str, fingerprints: list[str]) -> None:
        if not self.repair:
            self._problem(path, why)
            return
        path.rename(self.shards.pending_folder / path.name)
        store.ingest()
        if fingerprints:
            with store.database.write() as con:
                recipes.outdate(con, fingerprints)
        self._problem(path, why, "taken in again")

    # ---- the rest -----------------------------------------------------------------------------------------------------------------------

    def _derived(self) -> None:
        """What is made again where it is needed, so that it may be set aside at once."""
        faults: dict[str, Callable[[Path], str | None]] = {
            "directions/**/*.safetensors": fault_of_tensors,
            "directions/*.json": _fault_of_json,
            "polca/*/*.npz": _fault_of_arrays,
            "polca/*/*.json": _fault_of_json,
            "weights.json": _fault_of_json,
            "servers.json": _fault_of_json,
        }
        for pattern, fault in faults.items():
            for path in sorted(self.folder.glob(pattern)):
                self.found.derived += 1
                why = fault(path)
                if why is not None:
                    done = (
                        f"set aside as {self.shards.set_aside(path, why).now}; it is made again where it is needed"
                        if self.repair
                        else ""
                    )
                    self._problem(path, why, done)

    def _half_written(self) -> None:
        left = [*half_made(self.folder), *self.shards.half_written(), *sources.left_behind(self.folder)]
        if not left:
            return
        if self.repair:
            self.shards.sweep()
            sources.sweep(self.folder)
            for path in half_made(self.folder):
                path.unlink(missing_ok=True)
        verb = "removed" if self.repair else "to be removed by --repair or the next `curate run`"
        self.found.notes.append(f"{len(left)} half-written files of killed processes {verb}.")


def _read_all(store: Store) -> None:
    """Read every block that a table has. DamagedStore where DuckDB finds one that is not what was written."""
    try:
        with store.database.read() as con:
            for (table,) in con.execute(
                "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'data' ORDER BY 1"
            ).fetchall():
                con.execute(f"SELECT bit_xor(hash(t)) FROM data.{quote(table)} t").fetchall()
    except duckdb.Error as error:
        raise explain(error, store.database.path, opening=True) from None


def _fault_of_arrays(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        return f"it cannot be read: {error}"
    return None if bad is None else f"the checksum of {bad} in it is another one"


def _fault_of_json(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"it cannot be read: {error}"
    return None
