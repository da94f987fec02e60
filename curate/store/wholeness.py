"""Whether a shard is what was written: the CRC-32 of its bytes stands at the end of its name, and so came with the rename that made it.

    <fingerprint>-<number>-<hash of its row ids>.<CRC-32>.parquet

Names of earlier versions end with the hash of the row ids. Of such a file as much is checked as can be: it is readable, for Arrow and for
DuckDB alike, with just these rows; other numbers in it would not be seen.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from curate.errors import StoreError
from curate.rows import content_id
from curate.store.entries import Measured
from curate.store.sql import literal

RECORD = b"curate.measured"
NAME = re.compile(r"(?P<fingerprint>.+)-(?P<number>\d{6,})-(?P<rows>[0-9a-f]{8})(?:\.(?P<crc>[0-9a-f]{8}))?\.parquet")
_engines: dict[int, duckdb.DuckDBPyConnection] = {}  # by process: a forked child starts its own
UNREADABLE = (pa.ArrowException, duckdb.Error, OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError)


def stem(fingerprint: str, number: int, row_ids: list[str]) -> str:
    """A shard's name without checksum: the same for the same rows measured again."""
    return f"{fingerprint}-{number:06d}-{content_id(row_ids)[:8]}"


def stem_of(path: Path) -> str:
    """The stem in a shard's name; the whole name where it is called otherwise."""
    named = NAME.fullmatch(path.name)
    return path.name if named is None else "-".join(named.group("fingerprint", "number", "rows"))


def named_with(name: str, crc: str) -> str:
    """A shard's name, of its stem and the checksum of its content."""
    return f"{name}.{crc}.parquet"


def number_of(path: Path) -> int:
    """The number in a shard's name; -1 where it is called otherwise."""
    named = NAME.fullmatch(path.name)
    return -1 if named is None else int(named["number"])


def checksum(content: bytes) -> str:
    """CRC-32, 8 hex digits."""
    return f"{zlib.crc32(content):08x}"


def has_checksum(path: Path) -> bool:
    named = NAME.fullmatch(path.name)
    return named is not None and named["crc"] is not None


def fault_of(path: Path) -> str | None:
    """What is wrong with a shard, in words; None where it is whole. StoreError where it may not be read, FileNotFoundError where it is gone."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EIO:
            return f"the disk cannot read it ({error.strerror})"
        raise StoreError(f"{path}: cannot be read ({error.strerror}). Check that you may read it.") from None
    named = NAME.fullmatch(path.name)
    if named is not None and named["crc"] is not None:
        actual = checksum(content)
        return (
            None if actual == named["crc"] else f"its checksum is {actual}, and was {named['crc']} when it was written"
        )
    try:
        return _fault_without_checksum(path, content, named)
    except UNREADABLE as error:
        return f"it cannot be read: {_first_line(error)}"


def _fault_without_checksum(path: Path, content: bytes, named: re.Match[str] | None) -> str | None:
    table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    table.validate(full=True)
    record = Measured.from_json(table.schema.metadata[RECORD])
    row_ids = table["row_id"].to_pylist()
    if named is not None and record.fingerprint != named["fingerprint"]:
        return f"it says that it is of {record.fingerprint}, and its name that it is of {named['fingerprint']}"
    if named is not None and content_id(row_ids)[:8] != named["rows"]:
        return "its row ids are not those that it was written with"
    read = _as_duckdb_reads(path)
    same = read.num_rows == table.num_rows and all(_alike(read[name], table[name]) for name in table.column_names)
    return None if same else "it reads differently each time"


def _as_duckdb_reads(path: Path) -> Any:
    """A parquet file as a table, read by an engine of this process that is kept for the next file, unless something goes wrong."""
    engine = _engines.pop(os.getpid(), None) or duckdb.connect(
        config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    )
    try:
        table = engine.sql(f"FROM read_parquet({literal(str(path))})").to_arrow_table()
    except BaseException:
        engine.close()
        raise
    _engines[os.getpid()] = engine
    return table


def _alike(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    return bool(a.cast(b.type).combine_chunks().equals(b.combine_chunks()))


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()
    return text[0] if text else type(error).__name__
