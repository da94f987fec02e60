"""DuckDB engines: one store's file each, and nothing else of the machine.

Settings are an engine's, not a connection's, so an engine is closed off once, after it knows its file: no file but the store's own, no network, no
extension that is not built in, no setting that changes. One for writing may read the store's shards and staged rows too, in which a transaction
takes them in. What a user writes in SQL is checked before (`allowed.py`); here DuckDB itself refuses what such a check could miss.

An engine takes 15 ms to start, so it is kept for the next opening of its file: attaching the file again takes 1 ms.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import duckdb

from curate.store.sql import Connection, literal

KEPT = 4  # idle engines
MEMORY = "50%"  # of the machine's: what needs more goes through `<file>.tmp`
TAKEN_IN = ("shards", "staging")  # folders beside the file, from which a transaction reads
Key = tuple[int, str, str, bool]  # process (a forked child starts its own), working folder, file, for reading alone
_idle: defaultdict[Key, list[Connection]] = defaultdict(list)


@contextmanager
def attached(path: Path, *, read_only: bool) -> Iterator[Connection]:
    """A connection to the file at `path`, as if DuckDB had opened it: same names, same folder for what does not fit into memory."""
    key = (os.getpid(), os.getcwd(), str(path), read_only)
    try:
        engine = _idle[key].pop()
        fresh = False
    except IndexError:
        engine, fresh = _start(path), True
    try:
        engine.execute(f"ATTACH {literal(str(path))} AS curate{' (READ_ONLY)' if read_only else ''}")
        if fresh:
            _close_off(engine, path, read_only)
        with closing(engine.cursor()) as con:
            con.execute("USE curate")
            yield con
        engine.execute("DETACH curate")
    except BaseException:
        engine.close()  # whatever went wrong, it is not the next one's
        raise
    if Path(f"{path}.tmp").exists():  # it has used that folder, which goes with it
        engine.close()
        return
    _idle[key].append(engine)
    _close_old(key)


def _start(path: Path) -> Connection:
    config: dict[str, Any] = {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "python_enable_replacements": False,  # a name in SQL is no variable of Python's
        "memory_limit": MEMORY,
        "temp_directory": f"{path}.tmp",
        # a query that names what is not there ends no transaction: a selection asks such questions inside its run's
        "default_transaction_invalidation_policy": "SYNTACTIC_ERRORS_DO_NOT_INVALIDATE",
    }
    return duckdb.connect(config=config)


def _close_off(engine: Connection, path: Path, read_only: bool) -> None:
    """From here on the engine reaches its own file alone, which it has attached."""
    if not read_only:
        folders = ", ".join(literal(str(path.parent / name)) for name in TAKEN_IN)
        engine.execute(f"SET allowed_directories = [{folders}]")
    engine.execute("SET enable_external_access = false")
    engine.execute("SET lock_configuration = true")


def _close_old(newest: Key) -> None:
    """Few stores are open at a time: engines of others are closed, the oldest first. A parent's engines are not for a forked child to close."""
    own = [key for key in list(_idle) if key[0] == newest[0]]
    for key in own:
        if sum(len(_idle[k]) for k in own if k in _idle) <= KEPT:
            return
        if key != newest:
            engines = _idle.pop(key, [])
            while engines:
                engines.pop().close()
