"""The Arrow types of a source's columns, and values that passed the store as JSON made such again: timestamps stay timestamps.

A source of text (csv, json, jsonl) has none. Class labels are their names, and bytes are not kept, so neither has a type here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.data.labels import class_names

if TYPE_CHECKING:
    import pyarrow as pa

LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")


def types_of(schema: pa.Schema, labels: Iterable[str] = ()) -> dict[str, str]:
    """column -> its type as text that `read_types` reads."""
    import pyarrow as pa

    left_out = {*class_names(schema.metadata or {}), *labels}
    kept = [f.remove_metadata() for f in schema if f.name not in left_out and not _holds_bytes(f.type)]
    return {f.name: base64.b64encode(pa.schema([f]).serialize().to_pybytes()).decode() for f in kept}


def types_in_file(path: Path) -> dict[str, str]:
    import pyarrow.parquet as pq

    return types_of(pq.read_schema(path))


def read_types(written: Mapping[str, str]) -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {name: pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))[0].type for name, text in written.items()}


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    of_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    inside = [kind.field(i).type for i in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return of_bytes or any(map(_holds_bytes, inside)) or pa.types.is_map(kind) or pa.types.is_dictionary(kind)


def as_typed(value: Any, kind: pa.DataType) -> Any:
    """A value of the store's JSON as Arrow takes it for this type. ValueError or TypeError where it is none."""
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {field.name: as_typed(value.get(field.name), field.type) for field in kind}
    if any(getattr(pa.types, f"is_{name}")(kind) for name in LISTS):
        return [as_typed(item, kind.value_type) for item in value]
    if pa.types.is_timestamp(kind):
        return pa.scalar(value).cast(kind).value if kind.unit == "ns" else datetime.fromisoformat(value)
    if pa.types.is_date(kind):
        return date.fromisoformat(value[:10])
    if pa.types.is_time(kind):
        return time.fromisoformat(value)
    if pa.types.is_duration(kind):
        return timedelta(seconds=value)
    return Decimal(str(value)) if pa.types.is_decimal(kind) else value
