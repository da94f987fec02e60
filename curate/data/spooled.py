"""The parts of an export from rows that come one by one: their text columns in the export's format, the user's columns, weights and reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from curate.data.exported import (
    ExportRow,
    Plan,
    Weights,
    asked_columns,
    both_responses,
    is_plain_row,
    own_columns,
    renamed,
)
from curate.data.parts import Parts
from curate.data.spool import Spool
from curate.errors import ValidationError

if TYPE_CHECKING:
    import pyarrow as pa

NOTHING = "nothing to export: the selection kept no row. Loosen `select`; `curate explain` says why a row was dropped."


@contextmanager
def spooled(
    work: Path,
    records: Iterator[ExportRow],
    dropped: Iterator[ExportRow],
    format: str,
    typed: Mapping[str, pa.DataType],
    *,
    needs_weights: bool,
    as_json: bool = False,
) -> Iterator[Parts]:
    """The rows as they are written, kept in `work` meanwhile. ValidationError for rows that do not fit together, and where there are none."""
    if format == "extend":
        records, format = both_responses(records), "prompt_completion"
    first = next(records, None)
    if first is None:
        raise ValidationError(NOTHING)
    as_json = as_json or (first.row is not None and not is_plain_row(first.row))
    plan = Plan.of(first, format, as_json=as_json)
    with (
        Spool(work / "kept", plan.schema(False), typed) as kept,
        Spool(work / "dropped", plan.schema(True), typed) as left,
    ):
        weights = fill(kept, left, plan, with_first(first, records), dropped)
        weights.check(needed=needs_weights)
        yield Parts(kept, left, plan.kind.kind, plan.layout, weights.total)


def fill(kept: Spool, left: Spool, plan: Plan, records: Iterator[ExportRow], dropped: Iterator[ExportRow]) -> Weights:
    """Reads all rows, the kept ones and the dropped ones, and settles what the user's own columns are called. Returns the weights of the kept."""
    weights = Weights()
    for record in records:
        weights.add(record)
        kept.add(plan.kept(record) | asked_columns(record), own_columns(record))
    for record in dropped:
        left.add(plan.dropped(record) | asked_columns(record) | {"reason": record.reason}, own_columns(record))
    own, ours = {**kept.own, **left.own}, (kept.ours | left.ours) - {"reason"}
    kept.called, left.called = renamed(own, ours), renamed(own, ours | {"reason"})
    return weights


def with_first(first: ExportRow, others: Iterator[ExportRow]) -> Iterator[ExportRow]:
    yield first
    yield from others
