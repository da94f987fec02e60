"""One process at a time: a file that is locked as long as a process works in its folder, and says which. The lock dies with the process."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from curate.errors import CurateError, StoreError

TAKEN = BlockingIOError, PermissionError  # the second from file systems of other machines


@contextmanager
def locked(path: Path, taken: Callable[[str], CurateError], *, inherited: bool = False) -> Iterator[int]:
    """Hold a file, made where there is none, for this process alone. Gives the file's descriptor: a child that gets it (`pass_fds`) holds it too.

    taken: the error to raise where another process holds it, from a word for that one ("4711", "of another machine"). inherited: a child that is
    started with close_fds=False goes on holding it where this process is killed. StoreError where the file cannot be written or locked.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a+b", buffering=0))
            if not _lock_soon(file):
                raise taken(str(holder(path) or "of another machine"))
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # for children too
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            os.set_inheritable(file.fileno(), inherited)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written or locked ({error.strerror}).") from None
        yield file.fileno()


def holder(path: Path) -> int | None:
    """The id of the process that holds the file now; None if nobody does."""
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except TAKEN:
            text = file.read().strip()
            return int(text) if text.isdigit() else None
    return None


def _lock_soon(file: IO[bytes], patience: float = 0.5) -> bool:
    """Lock a file for this process alone. Not at the first try only: `holder` of another process has it for an instant."""
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except TAKEN:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)


def process_alive(pid: int) -> bool:
    """Whether a process of this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
