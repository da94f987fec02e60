"""What reading gives: a record per row (the row or its defects, and where it stood), and what a user is told about bad rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.errors import ValidationError
from curate.rows import Row

Problem = tuple[str, str, str]  # column, found, expected: a defect before it is known where the row stands


def row_in_file(index: int, line: int | None = None) -> str:
    """How messages name a row: from 1, and its line where that is another number (blank lines, a header, cells over several lines)."""
    return f"row {index + 1}" + (f", line {line}" if line not in (None, index + 1) else "")


@dataclass(frozen=True, slots=True)
class Defect:
    """What is wrong with one column of one row. `row` counts from 1, as an editor does; `column` is the file's own name, "" for a row as a whole.

    index: the row as the store numbers it, from 0. line: of the file, from 1; None where rows are no lines.
    """

    file: str
    row: int
    column: str
    found: str
    expected: str
    index: int
    line: int | None = None

    def __str__(self) -> str:
        subject = f"'{self.column}' is {self.found}" if self.column else self.found
        return f"{self.file}, {row_in_file(self.index, self.line)}: {subject}, expected {self.expected}."

    @property
    def likeness(self) -> tuple[str, str, str]:
        """Equal for defects of the same sort: the value itself does not count, its type does."""
        typed = re.search(r"\((\w+)\)$", self.found)
        return self.column, typed.group(1) if typed else re.sub(r"\d+", "#", self.found), self.expected


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in its source: `index` counts from 0 within `source`, `line` from 1 within its file (None where rows are no lines).

    `columns` holds the user's other columns (JSON-able, None for what is unknown, NaN included), which are no part of the row's id.
    `row` is None exactly where there are defects. `traits`: what `Notes` counts.
    """

    source: str
    index: int
    row: Row | None
    columns: dict[str, Any] = field(default_factory=dict)
    defects: tuple[Defect, ...] = ()
    line: int | None = None
    traits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A source's name as the user typed it, a fingerprint that changes when its content does, and where it lies (None: on the hub)."""

    name: str
    fingerprint: str
    path: Path | None = None


def bad_rows_error(defects: Sequence[Defect], n_bad: int, n_rows: int, *, setting: str, target: str) -> ValidationError:
    """The error of a source with bad rows: the first defect, how many rows are like it, and the next command.

    `setting` is the recipe's section (source or heldout), `target` what `curate validate` is given.
    """
    first = defects[0]
    alike = len({(d.file, d.row) for d in defects if d.likeness == first.likeness})
    verb = "is" if alike == 1 else "are"
    counted = f"{alike} of {n_rows} rows {verb} like this"
    if n_bad > alike:
        counted += f", {n_bad} are bad in all"
    if n_bad == n_rows:
        other = Counter(d.likeness for d in defects).most_common(1)[0][0][0]
        return ValidationError(
            f"{first}\n  {counted}: none of the {n_rows} rows can be used. Name the columns with "
            f"`--set {setting}.columns.{other or 'prompt'}=<their name>` or the format with `--set {setting}.format=...`, "
            f"or list them with `curate validate {target}`."
        )
    return ValidationError(
        f"{first}\n  {counted}. Drop them with `--set {setting}.on_bad_row=drop`, or list them with `curate validate {target}`."
    )
