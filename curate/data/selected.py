"""Kept rows as a `datasets.Dataset`, for code that trains in the same process: an export that is read back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from curate.data.export import export
from curate.data.exported import ExportRow


def to_dataset(rows: Iterable[ExportRow], folder: str | Path) -> Any:
    """A `datasets.Dataset` of TRL's columns, the row ids and the rows' own columns, memory-mapped from `folder`.

    `folder` is an export like any other and replaces the one before. Raises ValidationError as `export` does.
    """
    import datasets

    export(folder, rows)
    return datasets.load_from_disk(str(folder))["train"]


def exported_dataset(folder: Path) -> Any:
    """The rows of an export's one split as a `datasets.Dataset`, memory-mapped."""
    import datasets

    (rows,) = datasets.load_from_disk(str(folder)).values()
    return rows
