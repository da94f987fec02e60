"""What DuckDB says about the file itself, such as a full disk or a damaged database, in the user's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from curate.errors import DamagedStore, StoreError, disk_trouble

WORDS_OF_DAMAGE = (
    "corrupt",
    "checksum",
    "not a valid duckdb",
    "could not read enough bytes",  # cut short
    "could not read all",
    "failed to deserialize",
)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """DuckDB's errors about the file itself, in the user's words; errors in a query pass through."""
    try:
        yield
    except duckdb.Error as error:
        in_words = explain(error, path)
        if in_words is error:
            raise
        raise in_words from None


def explain(error: duckdb.Error, path: Path, *, opening: bool = False) -> Exception:
    """The StoreError that says what is wrong with the file at `path`; the error itself where the file is not to blame.

    opening: no query is under way, so that what DuckDB calls an error of its own is one of the file.
    """
    message = duckdb_message(error, path)
    first = str(error).splitlines()[0]
    if (full := disk_trouble(error)) is not None:
        return StoreError(f"{path}: {full}")
    if (
        any(words in message for words in WORDS_OF_DAMAGE)
        or isinstance(error, duckdb.SerializationException)
        or (opening and isinstance(error, duckdb.InternalException | duckdb.FatalException))
    ):
        return DamagedStore(f"{path} is damaged ({first}). {mend(path.parent)}")
    if isinstance(error, duckdb.IOException):
        return StoreError(
            f"{path}: cannot be read or written ({first}). Check that the file exists and that you may write it."
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return StoreError(f"{path}: not enough memory for this ({first}). Ask for fewer rows or columns at a time.")
    return error


def duckdb_message(error: duckdb.Error, path: Path) -> str:
    """DuckDB's words in lower case, without the names of files, which may hold any word."""
    text = str(error)
    for name in (str(path), str(path.resolve()), str(path.parent), str(path.parent.resolve())):
        text = text.replace(name, "")
    return text.lower()


def mend(folder: Path) -> str:
    """What makes a damaged database again, and what comes back by itself."""
    return (
        f"`curate check {folder} --repair` sets it aside and makes a new one (or rename it yourself); then run the recipe again: rows come from "
        f"the sources, and finished measurements from {folder.name}/shards; only what was imported has to be imported again."
    )
