"""Rows in and rows out: sources, formats, validation, export and card. The only home of `datasets` and of Arrow files.

Importing this loads neither: pyarrow and `datasets` are imported where a file needs them.
"""

from curate.data.card import Card, distribution
from curate.data.export import ExportResult, export
from curate.data.exported import ExportRow
from curate.data.formats import FORMATS
from curate.data.reading import Reading, load, read
from curate.data.records import Defect, Record, SourceInfo
from curate.data.trainer import TrainedAs
from curate.data.validation import Validation, validate, validate_reading

__all__ = [
    "FORMATS",
    "Card",
    "Defect",
    "ExportResult",
    "ExportRow",
    "Reading",
    "Record",
    "SourceInfo",
    "TrainedAs",
    "Validation",
    "distribution",
    "export",
    "load",
    "read",
    "validate",
    "validate_reading",
]
