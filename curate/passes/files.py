"""A file that is there whole or not at all: written beside its place, and renamed into it.

Here because passes write files too, and import nothing but themselves; every room above imports it from here. (Folders: data/replace.py.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def write_atomically(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Gives a new path in the same folder to write to; at the end of the block it takes the place of `path`.

    After an exception what was at `path` is untouched and nothing else is left. A kill leaves `.<name>.<process>-<hex>.tmp` behind, which nobody
    reads. sync: the content is on the disk before the rename, and the rename before this returns. The folder has to be there; OSError passes through.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:6]}.tmp")
    try:
        yield new
        if sync:
            _sync(new)
        os.replace(new, path)
        if sync:
            _sync(path.parent)
    finally:
        with suppress(OSError):  # of the disk that refused the file: that error is the one to be seen
            new.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
