"""Rows of one file, one after another: jsonl, json, csv, tsv (each also .gz) and parquet. Memory is bounded whatever the file's size.

Each reader yields (line, row) with a dict of the columns, or (line, Problem) where this row alone is broken (a line that is not JSON, a
CSV row with too many cells); the line counts from 1 and is None where a row is not a line of the file. What breaks the file as a whole
(truncated gzip, damaged parquet, an array that stops being JSON) raises ValidationError after the rows before it. Three bounds to know: a
.json array is read in pieces of 1 MiB, so one row has to fit in memory (a string that never ends is read to the end of the file); parquet is
decoded in batches of 512 rows; a .json file of one object that is a table by columns (see `by_column`) is held in memory whole.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from curate.data.by_column import TEXTS, is_wrapped, turned
from curate.data.labels import class_names, with_names
from curate.data.records import Problem
from curate.errors import ValidationError

RawRow = dict[str, Any] | Problem
Line = tuple[int | None, RawRow]
PIECE = 1 << 20  # characters of a .json array at a time
PARQUET_BATCH = 512
FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def file_type(path: Path | str) -> str:
    """The suffix that says how a file is read, without .gz; "" where it is none of FILE_TYPES."""
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1].lower() == ".gz":
        suffixes = suffixes[:-1]
        if suffixes and suffixes[-1].lower() == ".parquet":
            return ""
    return suffixes[-1].lower() if suffixes and suffixes[-1].lower() in FILE_TYPES else ""


def rows_of_file(path: Path, name: str) -> Iterator[tuple[int, int | None, RawRow]]:
    """(index from 0, line from 1 or None, row) of every row. `name` is what errors call the file."""
    reader: Callable[[Path, str], Iterator[Line]] = READERS[file_type(path)]
    with explained(name):
        for index, (line, row) in enumerate(reader(path, name)):
            yield index, line, row


@contextmanager
def explained(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValidationError(
            f"{name}: a .gz file that ends too early or is damaged ({error}). Was its download or copy cut off? Fetch it again; "
            "`gzip -t` tests it."
        ) from error
    except UnicodeDecodeError as error:
        raise ValidationError(
            f"{name}: not UTF-8 text (byte {error.object[error.start]:#04x}). Convert it to UTF-8 first."
        ) from error
    except IsADirectoryError as error:
        raise ValidationError(f"{name}: a folder where a file was expected.") from error
    except OSError as error:
        raise ValidationError(f"{name}: cannot be read: {error.strerror or error}.") from error


def open_bytes(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), PIECE)
    return open(path, "rb")


def json_lines(path: Path, name: str) -> Iterator[Line]:
    """One JSON object a line; blank lines are skipped and are no rows."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if line.strip():
                yield number, json_line(line, number)


def json_line(line: bytes, number: int) -> RawRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        found = f"line {number} is not JSON ({error.msg.removesuffix(' at')} at character {error.colno})"
    except UnicodeDecodeError:
        found = f"line {number} is not UTF-8"
    except RecursionError:
        found = f"line {number} is nested too deeply"
    else:
        if not isinstance(row, dict):
            return not_an_object(row)
        by_column = turned(row)
        if by_column is None:
            return row
        found = f"a table by columns ({len(by_column)} rows under {', '.join(list(by_column[0])[:4]) if by_column else 'no names'})"
    return "", found, "one JSON object a line"


def not_an_object(value: Any) -> Problem:
    return "", f"a {type(value).__name__} where a row belongs", "a JSON object"


def json_file(path: Path, name: str) -> Iterator[Line]:
    """An array of objects, a table by columns, or (as many hubs name it) objects line by line."""
    with open_bytes(path) as file:
        start = b""
        while not start.strip(b"\xef\xbb\xbf \t\r\n"):
            piece = file.read(4096)
            if not piece:
                return
            start = piece
        opening = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if opening == b"[":
        for row in json_array(path, name):
            yield None, row
        return
    lines = json_lines(path, name)
    first = next(lines)
    if isinstance(first[1], dict) and not is_wrapped(first[1]):
        yield first
        yield from lines
        return
    for row in one_object(path, name, "" if isinstance(first[1], dict) else first[1][1]):
        yield None, row


def one_object(path: Path, name: str, found: str) -> list[dict[str, Any]]:
    """The rows of a file that is one JSON object: a table by columns, or a single row that is written over several lines."""
    try:
        with open_bytes(path) as file:
            value = json.loads(file.read().decode("utf-8-sig"))
    except ValueError:
        value = None
    if isinstance(value, dict):
        rows = turned(value)
        if rows is not None:
            return rows
        lists = [key for key, inside in value.items() if isinstance(inside, list)]
        if not lists or TEXTS & set(value):
            return [value]
        found = f"one object with the keys {', '.join(value)}"
    else:
        lists = []
    raise ValidationError(
        f"{name}: neither a JSON array of rows, nor one JSON object a line, nor a table by columns ({found}). If the rows are inside an object, "
        f"take them out: `jq -c '.{lists[0] if lists else 'data'}[]' {name} > rows.jsonl`. A table by columns is turned round by "
        "pandas' to_json(orient='records', lines=True)."
    )


def json_array(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of one array, piece by piece, with the standard library's decoder."""
    decoder = json.JSONDecoder()
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        text, at, count, ended = file.read(PIECE), 0, 0, False

        def damaged(what: str) -> ValidationError:
            where = f"after row {count}" if count else "at its first row"
            return ValidationError(
                f"{name}: not JSON {where} ({what}). Nothing behind it can be read; mend or cut the file there."
            )

        at = text.index("[") + 1
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at < len(text) and text[at] == "]":
                return
            if at < len(text):
                try:
                    row, end = decoder.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    unfinished = error.msg.startswith("Unterminated string") or len(text) - error.pos < 12
                    if ended or not unfinished:
                        raise damaged(f"{error.msg}: {text[error.pos : error.pos + 30]!r}") from error
                else:
                    if end < len(text) or ended:
                        yield row if isinstance(row, dict) else not_an_object(row)
                        count, at = count + 1, end
                        continue
            elif ended:
                raise damaged("the array is not closed: was the file cut off?")
            piece = file.read(max(PIECE, len(text) - at))  # doubles, so that a huge row is not decoded over and over
            ended = not piece
            text, at = text[at:] + piece, 0


def separated(delimiter: str) -> Callable[[Path, str], Iterator[Line]]:
    """CSV with a header line. Cells are text; which columns are numbers is decided by the reading, for the user's other columns only."""

    def read(path: Path, name: str) -> Iterator[Line]:
        csv.field_size_limit(1 << 30)
        with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            try:
                header = next(reader, [])
                if len(set(header)) < len(header):
                    twice = next(column for column in header if header.count(column) > 1)
                    raise ValidationError(
                        f"{name}: the header names '{twice}' twice. Give every column a name of its own."
                    )
                before = reader.line_num
                for cells in reader:
                    line, before = before + 1, reader.line_num
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        yield line, ("", f"{len(cells)} cells (line {before})", f"{len(header)}, as in the header")
                    else:
                        yield line, dict(zip(header, cells, strict=True))
            except csv.Error as error:
                raise ValidationError(f"{name}, line {reader.line_num}: not CSV ({error}).") from error

    return read


def parquet(path: Path, name: str) -> Iterator[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            labels = class_names(file.schema_arrow.metadata)
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for row in batch.to_pylist():
                    yield None, with_names(row, labels)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        what = str(error).splitlines()[0]
        raise ValidationError(
            f"{name}: not a parquet file that can be read ({what}). Was its download cut off?"
        ) from error


READERS: dict[str, Callable[[Path, str], Iterator[Line]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".parquet": parquet,
}
