"""Validating a source: every bad row, duplicates, and what is worth knowing about the good ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from curate.data.notes import Notes
from curate.data.reading import Kind, Paths, Reading, read
from curate.data.records import Defect, SourceInfo


@dataclass(frozen=True)
class Validation:
    """What a source holds. `duplicates` counts rows that repeat an earlier row of the same content; they are counted once when measured."""

    n_rows: int
    n_bad: int
    defects: tuple[Defect, ...]
    duplicates: int
    kind: Kind
    format: str
    sources: tuple[SourceInfo, ...]
    notes: tuple[str, ...]

    @property
    def n_distinct(self) -> int:
        """Good rows of different content."""
        return self.n_rows - self.n_bad - self.duplicates


def validate(
    path: Paths,
    *,
    kind: Kind | None = None,
    split: str = "train",
    revision: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> Validation:
    """Reads a whole source and lists every defect. Arguments and errors as in `read`: what is wrong with a file as a whole is raised.

    Memory: about 150 bytes a row (content ids and prompts, for duplicates), and the defects.
    """
    return validate_reading(
        read(path, kind=kind, split=split, revision=revision, format=format, columns=columns, base=base)
    )


def validate_reading(reading: Reading, *, ids: set[bytes] | None = None) -> Validation:
    """`validate` of a reading that is open already. ids: filled with the good rows' ids, if given."""
    ids = set() if ids is None else ids
    notes = Notes()
    defects: list[Defect] = []
    n_rows = n_bad = duplicates = 0
    for record in reading:
        n_rows += 1
        if record.row is None:
            n_bad += 1
            defects.extend(record.defects)
            continue
        row_id = bytes.fromhex(record.row.row_id)
        notes.add(record, repeated=row_id in ids)
        duplicates += row_id in ids
        ids.add(row_id)
    return Validation(
        n_rows=n_rows,
        n_bad=n_bad,
        defects=tuple(defects),
        duplicates=duplicates,
        kind=reading.kind,
        format=reading.format,
        sources=tuple(reading.sources),
        notes=(*reading.notes(), *notes.all(len(ids), reading.prompt_column)),
    )
