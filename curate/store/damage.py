"""What DuckDB says about the file itself, such as a full disk or a damaged database, in the user's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from curate.errors import StoreError, disk_trouble


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


def explain(error: duckdb.Error, path: Path) -> Exception:
    """The StoreError that says what is wrong with the file at `path`; the error itself where the file is not to blame."""
    text = str(error)
    first = text.splitlines()[0]
    if (full := disk_trouble(error)) is not None:
        return StoreError(f"{path}: {full}")
    if (
        "corrupt" in text.lower()
        or "not a valid duckdb" in text.lower()
        or "could not read enough bytes" in text.lower()  # cut short
        or isinstance(error, duckdb.SerializationException)
    ):
        return StoreError(
            f"{path} is damaged ({first}). Rename it and run the recipe again: rows come from the sources, and finished measurements from "
            f"{path.parent.name}/shards; only what was imported has to be imported again."
        )
    if isinstance(error, duckdb.IOException):
        return StoreError(
            f"{path}: cannot be read or written ({first}). Check that the file exists and that you may write it."
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return StoreError(f"{path}: not enough memory for this ({first}). Ask for fewer rows or columns at a time.")
    return error
