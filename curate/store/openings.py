"""What a thread has open of its stores' databases: transactions, and files that stay open for reading (`kept_open`)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from curate.store.sql import Connection

# .connections: path of a database -> the connection of this thread's transaction; .reading: see `kept`
held = threading.local()


def connections() -> dict[str, Connection]:
    known: dict[str, Connection] = getattr(held, "connections", {})
    return known


@contextmanager
def kept_open(on: bool = True) -> Iterator[None]:
    """The databases that this thread reads inside stay open until it writes, or the block ends. on=False: inside such a block, for what takes long
    without the database, such as running a model.
    """
    before = kept()
    if before and not on:
        let_go()
    if not on:
        held.reading = None
    elif before is None:
        held.reading = {}
    try:
        yield
    finally:
        if held.reading is not before:
            let_go()
        held.reading = before


def let_go() -> None:
    """Close what `kept_open` has open, for now: others may write, until this thread reads again."""
    opened = kept() or {}
    while opened:
        opened.popitem()[1].opening.close()


class Opened:
    """A database that is open for reading: what closes it, a connection to it, how many of this thread's reads are under way, and what was found
    out and holds as long as nobody writes.
    """

    def __init__(self, opening: ExitStack, con: Connection):
        self.opening, self.con, self.readers = opening, con, 0
        self.cache: dict[Hashable, Any] = {}


def kept() -> dict[str, Opened] | None:
    """path of a database -> how it is open for reading. None outside `kept_open`, and in a forked child."""
    if getattr(held, "process", None) != os.getpid():
        held.process, held.reading = os.getpid(), None
    reading: dict[str, Opened] | None = getattr(held, "reading", None)
    return reading


def waiting() -> dict[str, list[Callable[[Connection], object]]]:
    """path of a database -> what this thread's transaction there does last, before it commits."""
    works: dict[str, list[Callable[[Connection], object]]] | None = getattr(held, "waiting", None)
    if works is None:
        works = held.waiting = {}
    return works
