"""Rows of one file, one after another: jsonl, json, csv, tsv (each also .gz) and parquet. Memory is bounded whatever the file's size.

Each reader yields (line, row) with a dict of the columns, or (line, Problem) where this row alone is broken (a line that is not JSON, a
CSV row with too many cells); the line counts from 1 and is None where a row is not a line of the file. What breaks the file as a whole
(truncated gzip, damaged parquet, an array that stops being JSON) raises ValidationError after the rows before it. Bounds (`bounds.py`): a
row of more than 64 MiB is a broken row, a .json file of one object that is a table by columns (see `by_column`) is held in memory whole, up to
1 GiB; a compressed file that holds 500 times its size is none of text (unpack it, and it is read). Parquet is decoded in batches of 512 rows, of
fewer where its dictionaries are long.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from curate.data.by_column import TEXTS, is_wrapped, turned
from curate.data.labels import class_names, with_names
from curate.data.records import Problem
from curate.data.unpacking import PIECE, Bomb, check_ratio, explained, open_bytes
from curate.errors import ValidationError, listed
from curate.recipe.bounds import DEEP, OBJECT, ROW, is_deep, json_value, size

RawRow = dict[str, Any] | Problem
Line = tuple[int | None, RawRow]
PARQUET_BATCH = 512
DECODED = 256 << 20  # bytes that the dictionary of a parquet file may become in a batch
TOO_LONG = f"longer than {size(ROW)}"
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


def lines_of(file: Any, ends: Any) -> Iterator[Any]:
    """The lines of a file; of one that is longer than a row may be, None. ends: what lines end with, of the file's kind."""
    nothing = ends[:0]
    for line in iter(partial(file.readline, ROW + 1), nothing):
        if len(line) <= ROW:
            yield line
            continue
        while line and not line.endswith(ends):
            line = file.readline(PIECE)
        yield None


def json_lines(path: Path, name: str) -> Iterator[Line]:
    """One JSON object a line; blank lines are skipped and are no rows."""
    with open_bytes(path) as file:
        for number, line in enumerate(lines_of(file, b"\n"), start=1):
            if line is None:
                yield number, ("", f"line {number} is {TOO_LONG}", "one JSON object a line")
                continue
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if line.strip():
                yield number, json_line(line, number)


def json_line(line: bytes, number: int) -> RawRow:
    try:
        row = json_value(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        fault = f"line {number} is not JSON ({error.msg.removesuffix(' at')} at character {error.colno})"
    except UnicodeDecodeError:
        fault = f"line {number} is not UTF-8"
    except ValueError as error:  # too deep, or a number of thousands of digits
        fault = f"line {number} cannot be read ({str(error).partition(';')[0]})"
    else:
        if not isinstance(row, dict):
            return not_an_object(row)
        by_column = turned(row)
        if by_column is None:
            return row
        fault = f"a table by columns ({len(by_column)} rows under {', '.join(list(by_column[0])[:4]) if by_column else 'no names'})"
    return "", fault, "one JSON object a line"


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


def one_object(path: Path, name: str, fault: str) -> list[dict[str, Any]]:
    """The rows of a file that is one JSON object: a table by columns, or a single row that is written over several lines."""
    try:
        with open_bytes(path) as file:
            held = file.read(OBJECT + 1)
            if len(held) > OBJECT:
                raise ValidationError(
                    f"{name}: one JSON value of more than {size(OBJECT)}. Write one JSON object a line (.jsonl)."
                )
            value = json_value(held.decode("utf-8-sig"))
    except Bomb:
        raise
    except ValueError as error:
        value = None
        fault = fault if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error).partition(";")[0]
    if isinstance(value, dict):
        rows = turned(value)
        if rows is not None:
            return rows
        lists = [key for key, inside in value.items() if isinstance(inside, list)]
        if not lists or TEXTS & set(value):
            return [value]
        fault = f"one object with the keys {listed(value)}"
    else:
        lists = []
    raise ValidationError(
        f"{name}: neither a JSON array of rows, nor one JSON object a line, nor a table by columns ({fault}). If the rows are inside an object, "
        f"take them out: `jq -c '.{lists[0] if lists else 'data'}[]' {name} > rows.jsonl`. A table by columns is turned round by "
        "pandas' to_json(orient='records', lines=True)."
    )


def array_row(row: Any) -> RawRow:
    if isinstance(row, dict):
        return ("", DEEP, "a row") if is_deep(row) else row
    return not_an_object(row)


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
                except RecursionError as error:
                    raise damaged(DEEP) from error
                except json.JSONDecodeError as error:
                    unfinished = error.msg.startswith("Unterminated string") or len(text) - error.pos < 12
                    if ended or not unfinished:
                        raise damaged(f"{error.msg}: {text[error.pos : error.pos + 30]!r}") from error
                except ValueError as error:  # a number of thousands of digits
                    raise damaged(str(error).partition(";")[0]) from error
                else:
                    if end < len(text) or ended:
                        yield array_row(row)
                        count, at = count + 1, end
                        continue
            elif ended:
                raise damaged("the array is not closed: was the file cut off?")
            if len(text) - at > ROW:
                raise damaged(f"a row {TOO_LONG}")
            piece = file.read(max(PIECE, len(text) - at))  # doubles, so that a huge row is not decoded over and over
            ended = not piece
            text, at = text[at:] + piece, 0


def short_lines(file: Any, name: str) -> Iterator[str]:
    for number, line in enumerate(lines_of(file, "\n"), start=1):
        if line is None:
            raise ValidationError(f"{name}, line {number}: {TOO_LONG}. Is it a text table, with a line a row?")
        yield line


def separated(delimiter: str) -> Callable[[Path, str], Iterator[Line]]:
    """CSV with a header line. Cells are text; which columns are numbers is decided by the reading, for the user's other columns only."""

    def read(path: Path, name: str) -> Iterator[Line]:
        csv.field_size_limit(ROW)
        with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(short_lines(file, name), delimiter=delimiter)
            try:
                header = next(reader, [])
                if len(set(header)) < len(header):
                    twice = next(column for column in header if header.count(column) > 1)
                    raise ValidationError(
                        f"{name}: the header names '{listed([twice])}' twice. Give every column a name of its own."
                    )
                if any("\0" in column for column in header):
                    raise ValidationError(
                        f"{name}, line 1: bytes of zero in the header. A block of the file was lost, in a crash or a copy: fetch it again."
                    )
                before = reader.line_num
                for cells in reader:
                    line, before = before + 1, reader.line_num
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        yield line, ("", f"{len(cells)} cells (line {before})", f"{len(header)}, as in the header")
                    elif any("\0" in cell for cell in cells):
                        column, cell = next((c, v) for c, v in zip(header, cells, strict=True) if "\0" in v)
                        found = f"{cell.count(chr(0)):,} bytes of zero in a cell: a block of the file was lost, in a crash or a copy?"
                        yield line, (column, found, "text")
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
            given, packed = 0, path.stat().st_size
            for batch in file.iter_batches(batch_size=rows_at_once(file.metadata)):
                given += batch.nbytes
                check_ratio(given, packed)
                for row in batch.to_pylist():
                    yield None, with_names(row, labels)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        what = str(error).splitlines()[0]
        raise ValidationError(
            f"{name}: not a parquet file that can be read ({what}). Was its download cut off?"
        ) from error


def rows_at_once(about: Any) -> int:
    """How many rows of a parquet file are decoded at once, of what its footer says. `Bomb` where that is none of text.

    A value stands in a column's dictionary once and in every row that has it: so many rows are taken that all of them may hold the whole dictionary.
    """
    packed = whole = longest = 0
    for chunk in (about.row_group(i).column(j) for i in range(about.num_row_groups) for j in range(about.num_columns)):
        packed, whole = packed + chunk.total_compressed_size, whole + chunk.total_uncompressed_size
        if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
            length = max(0, chunk.data_page_offset - chunk.dictionary_page_offset)
            unpacks = chunk.total_uncompressed_size / max(1, chunk.total_compressed_size)
            longest = max(longest, min(chunk.total_uncompressed_size, int(length * max(1.0, unpacks))))
    check_ratio(whole, packed)
    return max(1, min(PARQUET_BATCH, DECODED // max(1, longest, whole // max(1, about.num_rows))))


READERS: dict[str, Callable[[Path, str], Iterator[Line]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".parquet": parquet,
}
