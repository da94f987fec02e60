"""A query of a user's, asked so that it can be stopped: Ctrl-C ends it at once, and an answer that no memory holds is refused.

DuckDB works outside of Python, where a signal waits until it is done, and a cross join may never be. So it works in a thread of its own, and who
waits for it tells it to stop.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from curate.errors import UsageError
from curate.store.sql import Connection

FEWER = "Ask for fewer rows (LIMIT) or columns, or count."
BATCH = 250_000  # rows of an answer that are taken at once
Answer = TypeVar("Answer")


def answer(con: Connection, text: str, params: Any = None) -> pa.Table | None:
    """The whole answer; None of a statement that gives none. UsageError for one that takes half of the machine's memory."""
    return stoppable(con, lambda: _fetched(con, text, params))


def _fetched(con: Connection, text: str, params: Any) -> pa.Table | None:
    relation = con.sql(text, params=params) if params else con.sql(text)
    if relation is None:
        return None
    reader = relation.to_arrow_reader(BATCH)
    batches, held, most = [], 0, _memory() // 2
    try:
        for batch in reader:
            batches.append(batch)
            held += batch.nbytes
            if held > most:
                raise UsageError(
                    f"the answer takes more than {most >> 30:,} GiB, half of this machine's memory. {FEWER}"
                )
    except OSError as error:  # pyarrow's, with what DuckDB says behind it
        raise _as_duckdb(str(error)) from None
    return pa.Table.from_batches(batches, schema=reader.schema)


def _as_duckdb(message: str) -> Exception:
    """DuckDB's own error of a message such as `Conversion Error: …`."""
    kind = "".join(word.capitalize() for word in message.partition(" Error:")[0].split())
    kind_of_error = getattr(duckdb, f"{kind}Exception", None)
    if kind == "OutOfMemory":
        return UsageError(f"the answer takes more memory than there is. {FEWER}")
    return (
        kind_of_error(message)
        if isinstance(kind_of_error, type) and issubclass(kind_of_error, duckdb.Error)
        else duckdb.DataError(message)
    )


def stoppable(con: Connection, work: Callable[[], Answer]) -> Answer:
    """What `work` gives, which asks `con`; an interrupt of the main thread stops the query first, then goes on up."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    given: list[Answer] = []
    failed: list[BaseException] = []
    done = threading.Event()  # an interrupted `Thread.join` takes the thread for dead

    def body() -> None:
        try:
            given.append(work())
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=body, daemon=True).start()
    try:
        while not done.wait(0.2):  # a signal may have gone to a thread of DuckDB's: it is seen here when this wakes up
            pass
    except BaseException:
        while not done.wait(0.05):
            con.interrupt()  # a query that is only being planned has nothing to stop yet
        raise
    if failed:
        raise failed[0]
    return given[0]


def _memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
