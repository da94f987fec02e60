"""The DuckDB file of a store: opening it briefly, waiting for whoever has it, bringing it to the version of schema.py.

DuckDB locks the file against every other process while a writer has it open, and readers block a writer. So everyone opens it for one
short transaction, and waits with a message while another has it. Inside one process all use of one file goes through one lock.

Opening is done all the time, so it is cheap: the engine is kept for the next opening (`engines.py`), and the file is attached to it and detached
again (1 ms). What reads a hundred small things in a row, such as a plan, still does better with one opening:
inside `kept_open` the file stays open for reading until this thread writes, which other readers do not notice and writers wait for.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import duckdb

from curate.errors import DamagedStore, StoreError
from curate.store.damage import duckdb_message, explain, explained, mend
from curate.store.engines import attached
from curate.store.locks import process_alive
from curate.store.openings import Opened, connections, held, kept, let_go, waiting
from curate.store.schema import MIGRATIONS, SCHEMA, SCHEMA_VERSION
from curate.store.sql import Connection, one

DATABASE = "curate.duckdb"
READ_PATIENCE, WRITE_PATIENCE = 30.0, 300.0  # seconds
Made = TypeVar("Made")
_locks: dict[str, threading.RLock] = defaultdict(threading.RLock)
_locks_lock = threading.Lock()


class Database:
    """`<store>/curate.duckdb`. `read` and `write` are context managers that yield a connection inside one transaction."""

    def __init__(self, path: Path, *, patience: float | None = None, on_wait: Callable[[str], None] | None = None):
        self.path = path
        self.patience = patience
        self.on_wait = on_wait
        self._name = str(path.resolve())
        with _locks_lock:
            self._lock = _locks[self._name]

    def create(self, created_by: str, fill: Callable[[Connection], object]) -> bool:
        """Make the file if there is none: beside it and then linked into place, so that it is never seen half-made. True if made.

        fill: what else is put into it.
        """
        if self.path.exists():
            return False
        new = self.path.with_name(f".new-{os.getpid()}-{uuid4().hex[:8]}.duckdb")
        try:
            with explained(self.path), attached(new, read_only=False) as con:
                con.execute(SCHEMA)
                con.execute(
                    "INSERT INTO data.meta VALUES ('schema_version', ?), ('created_by', ?)",
                    [str(SCHEMA_VERSION), created_by],
                )
                fill(con)
            os.link(new, self.path)
        except FileExistsError:
            return False  # another process was faster
        except OSError as error:
            raise StoreError(
                f"{self.path}: cannot be made ({error.strerror}). Check the folder and its free space."
            ) from None
        finally:
            for left in (new, new.with_name(f"{new.name}.wal")):  # the second where the disk was full
                left.unlink(missing_ok=True)
        return True

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read-only connection. Waits for a writer of another process. Inside `transaction`: its connection, which sees what it changed."""
        if (con := self._under_way()) is not None:
            with explained(self.path):
                yield con
            return
        with self._reading(self._check_version) as con:
            yield con

    def cached(self, key: Hashable, make: Callable[[Connection], Made]) -> Made | None:
        """Inside `kept_open` and `read`: what `make` gives of a connection of its own, made once as long as nobody writes. Elsewhere None."""
        opened = (kept() or {}).get(self._name)
        if opened is None or self._under_way() is not None:
            return None
        if key not in opened.cache:
            con = opened.opening.enter_context(closing(opened.con.cursor()))
            con.execute("USE curate")
            opened.cache[key] = make(con)
        made: Made = opened.cache[key]
        return made

    @contextmanager
    def _reading(self, check: Callable[[Connection], object] = lambda con: None) -> Iterator[Connection]:
        """A connection of its own to the file, which is opened for it, and checked, or open already."""
        reading = kept()
        if reading is None:
            with self._open(read_only=True) as con:
                check(con)
                yield con
            return
        if self._name not in reading:
            with ExitStack() as opening:
                con = opening.enter_context(self._open(read_only=True))
                check(con)
                reading[self._name] = Opened(opening.pop_all(), con)
        opened = reading[self._name]
        opened.readers += 1
        try:
            with explained(self.path), closing(opened.con.cursor()) as con:
                con.execute("USE curate")
                yield con
        except BaseException:
            if reading.get(self._name) is opened:  # whatever went wrong, it is not the next one's
                del reading[self._name]
            raise
        finally:
            opened.readers -= 1
            if not opened.readers and reading.get(self._name) is not opened:
                opened.opening.close()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A connection inside a transaction: committed at the end, undone by any exception. Waits for readers and writers."""
        if (con := self._under_way()) is not None:
            with explained(self.path):
                yield con
            return
        with self._transaction() as con:
            yield con
            self._commit(con)

    def before_commit(self, work: Callable[[Connection], object]) -> None:
        """Inside `write` or `transaction`: do this once, as the transaction's last step, however often it is asked for."""
        works = waiting().get(self._name)
        if works is None:
            raise RuntimeError("before_commit outside a transaction")
        if work not in works:
            works.append(work)

    @property
    def is_in_transaction(self) -> bool:
        """Whether this thread reads what its own `transaction` has changed: its views may have to follow, and temporary ones stay to its end."""
        return self._under_way() is not None

    def _commit(self, con: Connection) -> None:
        for work in waiting().pop(self._name, []):
            work(con)
        try:
            con.execute("SELECT 1")
        except duckdb.Error:  # somebody caught the error that has ended the transaction: COMMIT would say nothing of it
            raise StoreError(
                f"{self.path}: an SQL error has ended this transaction, so nothing of it is written."
            ) from None
        con.execute("COMMIT")

    @contextmanager
    def transaction(self, *, undo: bool = False) -> Iterator[None]:
        """Everything that this thread reads and writes inside is one transaction: all of it is there afterwards, or, after an exception or a kill,
        nothing of it. undo: nothing of it in any case.
        """
        if self._under_way() is not None:
            raise RuntimeError("a transaction inside a transaction")
        with self._transaction() as con:
            held.connections = {**connections(), self._name: con}
            try:
                yield
            finally:
                held.connections = {name: other for name, other in connections().items() if other is not con}
            if undo:
                self._undo(con)
            else:
                self._commit(con)

    def _under_way(self) -> Connection | None:
        return connections().get(self._name)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        let_go()
        with self._open(read_only=False) as con:
            self._check_version(con)
            con.execute("BEGIN")
            waiting()[self._name] = []
            try:
                yield con
            except BaseException:
                self._undo(con)
                raise

    def _undo(self, con: Connection) -> None:
        waiting().pop(self._name, None)
        try:
            con.execute("ROLLBACK")
        except duckdb.Error:
            pass  # a failure has ended the transaction itself

    def open_once(self) -> None:
        """Check that the file is a store of this version; bring an older one to it where that is known how, one transaction a step."""
        if self._under_way() is not None:
            return
        with self._reading() as con:
            version = self._version(con)
            steps = range(version, SCHEMA_VERSION)
            if not steps or any(v not in MIGRATIONS for v in steps):
                self._check_version(con)
                return
        let_go()
        with self._migrating(version) as con:
            for v in range(self._version(con), SCHEMA_VERSION):
                con.execute("BEGIN")
                con.execute(MIGRATIONS[v])
                con.execute("UPDATE data.meta SET value = ? WHERE key = 'schema_version'", [str(v + 1)])
                con.execute("COMMIT")

    @contextmanager
    def _migrating(self, version: int) -> Iterator[Connection]:
        try:
            with self._open(read_only=False) as con:
                yield con
        except StoreError as error:
            raise StoreError(
                f"{error}\n  The store is of version {version}, and is brought to version {SCHEMA_VERSION} before it is read: open it once where it "
                f"can be written (`curate status {self.path.parent}`)."
            ) from None

    @contextmanager
    def _open(self, *, read_only: bool) -> Iterator[Connection]:
        patience = self.patience if self.patience is not None else (READ_PATIENCE if read_only else WRITE_PATIENCE)
        if not self._lock.acquire(timeout=patience):
            raise StoreError(f"{self.path}: another thread of this process has had it for {patience:.0f} s.")
        try:
            with (
                explained(self.path),
                ExitStack() as opened,
            ):  # what is committed may still fail to reach the file, at DETACH
                yield self._connect(opened, read_only, patience)
        finally:
            self._lock.release()

    def _connect(self, opened: ExitStack, read_only: bool, patience: float) -> Connection:
        start, pause, has_said = time.monotonic(), 0.005, False
        while True:
            try:
                return opened.enter_context(attached(self.path, read_only=read_only))
            except duckdb.ResourceInUseException:
                raise StoreError(
                    f"{self.path}: this process has it open through a DuckDB connection of its own. "
                    "Close that connection first, or query with Store.sql."
                ) from None
            except duckdb.Error as error:
                text = str(error)
                if "could not set lock" not in duckdb_message(error, self.path):  # "block" is another word
                    raise explain(error, self.path, opening=True) from None
            holder = re.search(r"PID (\d+)", text)
            who = f"process {holder[1]}" if holder else "another process"
            waited = time.monotonic() - start
            if waited > patience:
                raise StoreError(
                    f"{self.path}: {who} has had it open for {waited:.0f} s. "
                    "Close it there (a notebook or a DuckDB shell, perhaps), then run this again."
                )
            if waited > 1 and not has_said and self.on_wait:
                self.on_wait(f"waiting for {self.path}: {who} has it open")
                has_said = True
            time.sleep(pause)
            pause = min(pause * 1.6, 0.25)

    def _version(self, con: Connection) -> int:
        try:
            version = one(con, "SELECT value FROM data.meta WHERE key = 'schema_version'")
        except (duckdb.CatalogException, duckdb.BinderException):
            version = None
        if version is None:
            raise StoreError(
                f"{self.path} is a DuckDB database but not a store of curate. Name another folder with --store."
            )
        if not str(version[0]).isdecimal():
            raise DamagedStore(
                f"{self.path} is damaged (its version is {str(version[0])[:40]!r}). {mend(self.path.parent)}"
            )
        return int(version[0])

    def _check_version(self, con: Connection) -> None:
        version = self._version(con)
        if version == SCHEMA_VERSION:
            return
        made = one(con, "SELECT value FROM data.meta WHERE key = 'created_by'")
        by = f" (made by curate {made[0]})" if made else ""
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} is a store of version {version}{by}, this curate reads version {SCHEMA_VERSION}. "
                "Upgrade: pip install -U curate-dynamics."
            )
        raise StoreError(
            f"{self.path} is a store of the older version {version}{by}, this curate needs version {SCHEMA_VERSION}. Nothing was changed. Rename "
            f"{self.path.name} and run the recipe again: rows come from the sources and finished measurements from {self.path.parent.name}/shards."
        )


def half_made(folder: Path) -> list[Path]:
    """What a process that is gone left of a database that it was making."""
    left = []
    for path in folder.glob(".new-*.duckdb*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and int(pid) != os.getpid() and not process_alive(int(pid)):
            left.append(path)
    return left
