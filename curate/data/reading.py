"""Reading a source: its format told from its first rows, then records streamed one after another, bad ones with what is wrong.

`read` opens, `Reading` iterates (again from the start each time), `Reading.good` holds the policy for bad rows, `load` is a list of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from curate.data.blocks import ROWS, Block, block_of, takes_blocks
from curate.data.cells import number, number_columns
from curate.data.choosing import choose_layout
from curate.data.columns import UNNAMED, Columns
from curate.data.find import find_sources
from curate.data.formats import FORMATS, KNOWN_COLUMNS
from curate.data.layout import Layout
from curate.data.prompts import TEMPLATE_ARGS, template_args
from curate.data.records import Defect, Problem, Record, SourceInfo, bad_rows_error, row_in_file
from curate.data.sources import Digest, Source
from curate.data.texts import has_binary, holds, jsonable, unpacked, unread_keys, valid_unicode, without_padding
from curate.errors import CurateError, UsageError, ValidationError, did_you_mean
from curate.recipe.bounds import json_value
from curate.rows import Row

Kind = Literal["preference", "sft"]
Paths = str | Path | Sequence[str | Path | dict[str, Any]]
HEAD = 200  # rows that a format is told from
REWRITE = "Name another file, or write it as one JSON object a line, csv or parquet (docs/data.md)."
VERSION = 3  # of what becomes of a source's rows: sources that an earlier version read are read again


class Reading:
    """Records of one or more sources, in order. Memory does not grow with their size.

    kind, format, prompt_column ("" where the prompt is no column): as found in the first source; the others are told on their
    own, and have to be of the same kind.
    `len` is unknown: rows are counted by reading them.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        kind: Kind | None,
        format: str,
        columns: Mapping[str, str] | None,
        digest_of: Digest | None = None,
    ) -> None:
        self._sources = sources
        self._columns = Columns(columns)
        self._asked = format
        self._names: set[str] = set()  # of columns, looked at
        self._told: dict[str, tuple[Layout, frozenset[str]]] = {}
        self._typed = {source.name for source in sources if source.is_typed}
        first = next((layout for source in sources if (layout := self._layout(source, kind))), None)
        if first is None:
            names = ", ".join(source.name for source in sources)
            raise ValidationError(
                f"{names}: no rows at all. Was it written to its end? Write or fetch it again, or name another file."
            )
        self.kind: Kind = "preference" if first.kind == "preference" else "sft"
        self.format = first.format
        self.prompt_column = self._columns.named(first.prompt)
        self._digest_of = digest_of

    @cached_property
    def sources(self) -> list[SourceInfo]:
        """Name, fingerprint and place of each. It takes as long as hashing the files."""
        return [SourceInfo(s.name, s.fingerprint(self._digest_of), s.path) for s in self._sources]

    def _layout(self, source: Source, kind: str | None) -> Layout | None:
        """How this source's rows are laid out; None where it has none."""
        if source.name not in self._told:
            head = list(islice(source.rows(), HEAD))
            if not head:
                return None
            raw_rows = [row for *_, row in head if isinstance(row, dict)]
            if not raw_rows:
                index, line, broken = head[0]
                assert not isinstance(broken, dict)
                what = problem_defect(broken, source.name, index, line)
                raise ValidationError(f"{what}\n  None of the first {len(head)} rows can be read. {REWRITE}")
            self._columns.check(dict.fromkeys(name for row in raw_rows for name in row), source.name)
            mapped = [self._mapped(row, source.name, typed=source.is_typed) for row in raw_rows]
            layout = choose_layout(source.name, mapped, kind=kind, format=self._asked, columns=self._columns)
            self._told[source.name] = layout, number_columns(raw_rows) if source.is_text_table else frozenset()
        return self._told[source.name][0]

    def _mapped(self, raw: dict[str, Any], where: str, *, typed: bool) -> dict[str, Any]:
        """A raw row under our names, its messages as lists however they are stored. typed: of a source that `is_typed`."""
        mapped = self._columns.apply(raw, where)
        changed = {name: unpacked(mapped[name]) for name in MESSAGES if isinstance(mapped.get(name), (str, dict, list))}
        if typed:
            padded = {name: changed.get(name, mapped[name]) for name in (*MESSAGES, *TEMPLATE_ARGS) if name in mapped}
            changed |= {name: without_padding(value) for name, value in padded.items()}
        if isinstance(mapped.get("history"), str):
            changed["history"] = json_list(mapped["history"])
        return {**mapped, **changed} if changed else mapped

    def notes(self) -> list[str]:
        """What is said of the sources as a whole: what is read from the hub, and which columns go by another name."""
        on_hub = [source.name for source in self._sources if source.on_hub]
        sentences = [
            f"{name}: no such file or folder here; read as a dataset of the Hugging Face hub." for name in on_hub
        ]
        if self._columns.has_unnamed:
            sentences.append(f"A column without a name is called `{UNNAMED}` here.")
        return sentences + [
            f"Column `{name}` is called `{new}` here, since `columns` calls another one {name}."
            for name, new in sorted(self._columns.moved.items())
        ]

    def types(self, name: str) -> dict[str, str]:
        """The Arrow types of a source's columns, under the names that they have here; none of a source of text."""
        source = next(source for source in self._sources if source.name == name)
        return {self._columns.moved.get(column, column) or UNNAMED: kind for column, kind in source.types().items()}

    def formats(self) -> dict[str, str]:
        """source -> its format, of those that have rows."""
        return {name: layout.format for name, (layout, _) in self._told.items()}

    def formats_of_all(self) -> set[str]:
        """The formats of all sources, each told from its first rows; those without rows have none."""
        return {layout.format for source in self._sources if (layout := self._layout(source, self.kind))}

    def __iter__(self) -> Iterator[Record]:
        for source in self._sources:
            layout = self._layout(source, self.kind)
            if layout is None:
                continue
            numbers = self._told[source.name][1]
            for index, line, raw in source.rows():
                yield self._record(source.name, index, line, raw, layout, numbers)

    def blocks(
        self,
        on_bad_row: Literal["error", "drop"] = "error",
        *,
        limit: int | None = None,
        setting: str = "source",
        target: str | None = None,
    ) -> Iterator[Record | Block]:
        """What `good` gives, many rows at once where they are plain (`Block`). "drop": bad rows are given, too, and count for `limit`."""
        pieces = self._pieces() if on_bad_row == "drop" else _good(self._pieces(), "error", None, setting, target)
        left = limit
        for piece in pieces:
            if left is not None and isinstance(piece, Block) and len(piece) > left:
                piece = piece.head(left)
            if left is not None:
                left -= len(piece) if isinstance(piece, Block) else 1
            yield piece
            if left == 0:
                return

    def _pieces(self) -> Iterator[Record | Block]:
        for source in self._sources:
            layout = self._layout(source, self.kind)
            if layout is None:
                continue
            numbers = self._told[source.name][1]
            alike = takes_blocks(layout) and not self._columns.ours
            rows = source.rows()
            while part := list(islice(rows, ROWS)):
                block = block_of(source.name, layout, numbers, part) if alike else None
                if block is not None:
                    yield block
                else:
                    yield from (self._record(source.name, *row, layout, numbers) for row in part)

    def _record(
        self,
        name: str,
        index: int,
        line: int | None,
        raw: dict[str, Any] | Problem,
        layout: Layout,
        numbers: frozenset[str],
    ) -> Record:
        if not isinstance(raw, dict):
            return Record(name, index, None, {}, (problem_defect(raw, name, index, line),), line)
        where = name if not self._columns.moved else f"{name}, {row_in_file(index, line)}"
        mapped = self._mapped(raw, where, typed=name in self._typed)
        problems: list[Problem] = []
        row = layout.convert(mapped, layout, problems)
        if not mapped.keys() <= self._names:
            problems += unnameable(mapped)
            self._names |= mapped.keys() if not problems else set()
        if row is not None and (args := template_args(mapped, layout.uses, problems)):
            row = replace(row, template_args=args)
        columns = {key: jsonable(value) for key, value in mapped.items() if key not in layout.uses}
        for column in numbers & columns.keys():
            columns[column] = number(columns[column])
        if problems:
            named = ((self._columns.named(column), found, expected) for column, found, expected in problems)
            defects = tuple(problem_defect(problem, name, index, line) for problem in dict.fromkeys(named))
            return Record(name, index, None, columns, defects, line)
        return Record(name, index, row, columns, (), line, tuple(traits(mapped, layout)))

    def good(
        self,
        on_bad_row: Literal["error", "drop"] = "error",
        *,
        bad: list[Record] | None = None,
        setting: str = "source",
        target: str | None = None,
    ) -> Iterator[Record]:
        """The records that have a row, in order; every other one is appended to `bad` if given.

        "error": from the first bad row on nothing more is given; the rest is read to count them, then ValidationError is raised.
        "drop": bad rows are left out. Either way ValidationError when not one row is good.
        setting, target: the recipe's section and what to give `curate validate`, for the message.
        """
        yield from _good(iter(self), on_bad_row, bad, setting, target)


Piece = TypeVar("Piece", bound="Record | Block")


def _good(
    pieces: Iterator[Piece], on_bad_row: str, bad: list[Record] | None, setting: str, target: str | None
) -> Iterator[Piece]:
    """See `Reading.good`."""
    defects: list[Defect] = []
    n_rows = n_bad = 0
    for piece in pieces:
        n_rows += len(piece) if isinstance(piece, Block) else 1
        if isinstance(piece, Record) and piece.row is None:
            n_bad += 1
            defects.extend(piece.defects)
            if bad is not None:
                bad.append(piece)
        elif on_bad_row == "drop" or not n_bad:
            yield piece
    if n_bad and (on_bad_row == "error" or n_bad == n_rows):
        raise bad_rows_error(defects, n_bad, n_rows, setting=setting, target=target or defects[0].file)


def read(
    path: Paths,
    *,
    kind: Kind | None = None,
    split: str = "train",
    revision: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    base: Path | None = None,
    setting: str = "source",
    digest_of: Digest | None = None,
) -> Reading:
    """Opens a source, or several: a file, folder, glob, hub id, or a list of them (see `find`), in a format of `FORMATS`; or rows in memory,
    a `datasets.Dataset`, a list of dicts, a data frame.

    kind: None takes what the format says, preference first. columns: ours: theirs, a name or a template (see `columns`).
    base: the folder relative paths start from. setting: the recipe's key of these rows, for messages. digest_of: of a file's content, where one is
    remembered; `file_digest`, if None. Fingerprints are taken when they are asked for, rows are read when the reading is iterated.
    Errors: ValidationError for what is missing, empty, unreadable or of another kind; UsageError for a format or column that is not known.
    """
    try:
        if format != "auto" and format not in FORMATS:
            hint = did_you_mean(format, FORMATS, sentence=True, before=" ")
            raise UsageError(f"source.format: '{format}' is not a format: auto, {', '.join(FORMATS)}.{hint}")
        return Reading(
            find_sources(path, split=split, revision=revision, base=base),
            kind=kind,
            format=format,
            columns=columns,
            digest_of=digest_of,
        )
    except CurateError as error:
        if setting == "source":
            raise
        text = re.sub(
            r"(?<![\w./])source\.(?=(?:columns|format|path|split|revision|limit)\b)", f"{setting}.", str(error)
        )
        raise type(error)(text if text.startswith(setting) else f"{setting}: {text}") from None


def load(
    path: Paths,
    *,
    kind: Kind | None = None,
    split: str = "train",
    revision: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["error", "drop"] = "error",
) -> list[Row]:
    """Every row of a source, duplicates as found. ValidationError on bad rows unless `on_bad_row="drop"`. Arguments as in `read`."""
    reading = read(path, kind=kind, split=split, revision=revision, format=format, columns=columns)
    return [record.row for record in reading.good(on_bad_row) if record.row is not None]


MESSAGES = tuple(
    name for name in KNOWN_COLUMNS if name not in ("label", "system", "history", "final_answer", *TEMPLATE_ARGS)
)


def unnameable(row: dict[str, Any]) -> list[Problem]:
    """A problem for every column whose name no table takes: with a NUL, which ends it to some of them, or a lone surrogate."""
    wrong = [name for name in row if not name or "\0" in name or not valid_unicode(name)]
    return [
        ("", f"a column called {name[:40]!r}", "names that are not empty, without NUL, and of valid Unicode")
        for name in wrong
    ]


def json_list(text: str) -> Any:
    """A list that a table's cell holds as JSON text; anything else as it is."""
    try:
        value = json_value(text)
    except ValueError:
        return text
    return value if isinstance(value, list) else text


def traits(mapped: dict[str, Any], layout: Layout) -> list[str]:
    """What `Notes` counts of a row's values before they are texts."""
    result = [f"key:{key}" for column in layout.uses for key in unread_keys(mapped.get(column))]
    result += [f"binary:{name}" for name, value in mapped.items() if not isinstance(value, str) and has_binary(value)]
    if "system" in layout.uses and layout.prompt in ("prompt", "question") and holds(mapped.get("system")):
        result.append("system turn")
    return result


def problem_defect(problem: Problem, name: str, index: int, line: int | None = None) -> Defect:
    column, found, expected = problem
    return Defect(name, index + 1, column, found, expected, index, line)
