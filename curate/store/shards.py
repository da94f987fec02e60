"""Shards: what a pass measured, as one parquet file each, kept beside the database.

A shard is written to a temporary file, synced, and renamed into `shards/pending/`: the rename is the done mark. Ingesting copies all pending
shards into the database in one transaction and then moves the files to `shards/<fingerprint>/`. A kill before the rename loses this shard
only; a kill after it loses nothing, and a shard that is ingested twice is the same as once. The files stay as the durable record of what was
paid for: a database that is lost or damaged is made again from them.

A file carries its `Measured` record and the measurement's columns, so it needs nothing else: row_id, the columns, and for sampling passes
`samples`, a list a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.errors import StoreError, disk_trouble
from curate.passes.files import write_atomically
from curate.rows import content_id
from curate.store.entries import Measured
from curate.store.locks import process_alive

RECORD = b"curate.measured"
SAMPLE = pa.struct(
    [
        ("text", pa.string()),
        ("correct", pa.bool_()),
        ("n_tokens", pa.int32()),
        ("logp", pa.float64()),
        ("finished", pa.bool_()),
    ]
)


def arrow_column(values: Any) -> pa.Array:
    """A column of a table: numbers with NaN and infinities as NULL, booleans, or text with None as NULL."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    array = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"a column has one dimension, found shape {array.shape}")
    if isinstance(values, np.ma.MaskedArray) and values.dtype.kind in "biu":
        return pa.array(values.data, mask=np.ma.getmaskarray(values))
    if isinstance(values, np.ma.MaskedArray):
        array = values.filled(np.nan)
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
        return pa.array(array, mask=~np.isfinite(array))
    if array.dtype.kind in "biu":
        return pa.array(array)
    if array.dtype.kind in "UT":
        return pa.array(array.tolist(), pa.string())
    found = [None if v is None or (isinstance(v, float) and not np.isfinite(v)) else v for v in array.tolist()]
    known = {type(v) for v in found if v is not None}
    if known <= {bool, np.bool_}:
        return pa.array(found, pa.bool_() if known else pa.float64())
    if known <= {int, float, bool}:
        return pa.array([None if v is None else float(v) for v in found], pa.float64())
    return pa.array([None if v is None else clean_text(str(v)) for v in found], pa.string())


def clean_text(text: str) -> str:
    """Text that UTF-8 can hold: half of a surrogate pair (a broken JSON escape) becomes U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


class Shards:
    """The shard files of a store."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pending_folder = folder / "pending"

    def write(
        self,
        measured: Measured,
        index: int,
        row_ids: Sequence[str],
        columns: Mapping[str, Any],
        samples: Sequence[Sequence[Any]] | None = None,
    ) -> Path:
        """Write one shard; when this returns it is on disk for good. Raises StoreError when the disk is full, leaving no trace."""
        arrays = {
            "row_id": pa.array(list(row_ids), pa.string()),
            **{name: arrow_column(values) for name, values in columns.items()},
        }
        if samples is not None:
            arrays["samples"] = pa.array([[_sample(s) for s in row] for row in samples], pa.list_(SAMPLE))
        for name, array in arrays.items():
            if len(array) != len(row_ids):
                raise ValueError(
                    f"shard of {measured.measurement}: {name} has {len(array)} values for {len(row_ids)} rows"
                )
        table = pa.table(arrays).replace_schema_metadata({RECORD: measured.to_json().encode()})
        name = f"{measured.fingerprint}-{index:06d}-{content_id(list(row_ids))[:8]}.parquet"
        path = self.pending_folder / name
        write_parquet(table, path)
        return path

    def pending(self) -> list[Path]:
        return sorted(self.pending_folder.glob("*.parquet")) if self.pending_folder.is_dir() else []

    def all_files(self) -> list[Path]:
        """Every finished shard, ingested before or not: what a new database is made of."""
        return sorted(p for p in self.folder.glob("*/*.parquet"))

    def ingested(self, paths: Iterable[Path]) -> None:
        """Move files that the database has now out of pending."""
        for path in paths:
            if path.parent == self.pending_folder:
                home = self.folder / path.name.split("-")[0]
                with suppress(OSError):  # on a full disk it stays pending, and is taken in again, which changes nothing
                    home.mkdir(parents=True, exist_ok=True)
                    os.replace(path, home / path.name)

    def sweep(self) -> list[str]:
        """Remove what a killed process left half-written (a training that records may be writing right now). Returns the names removed."""
        left = [path for path in self.folder.glob("**/*.tmp") if not _being_written(path)]
        for path in left:
            path.unlink(missing_ok=True)
        return [p.name for p in left]


def _being_written(path: Path) -> bool:
    """Whether another living process of this machine is writing this temporary file: `.<name>.<pid>-<hex>.tmp`."""
    pid = path.name.removesuffix(".tmp").rpartition(".")[2].partition("-")[0]
    return pid.isdigit() and int(pid) != os.getpid() and process_alive(int(pid))


def read_shard(path: Path) -> tuple[Measured, pa.Schema]:
    """A shard's record and its schema. Raises StoreError when the file is not a shard."""
    try:
        schema = pq.read_schema(path)
        return Measured.from_json(schema.metadata[RECORD]), schema
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: not a readable shard ({str(error).splitlines()[0]}). Remove this file and run again: its rows are measured once more."
        ) from None


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write, sync, rename. Raises StoreError when the disk refuses; no temporary file stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, sync=True) as new, new.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
    except OSError as error:
        if (full := disk_trouble(error)) is not None:
            raise StoreError(f"{path.parent}: {str(full).removeprefix(f'{error.filename}: ')}") from None
        raise StoreError(f"{path.parent}: cannot write there ({error.strerror or error}).") from None


def _sample(sample: Any) -> dict[str, Any]:
    """One sample, from a mapping or from an object with these attributes."""
    get = sample.get if isinstance(sample, Mapping) else lambda key: getattr(sample, key, None)
    logp = get("logp")
    text = get("text")
    return {
        "text": None if text is None else clean_text(text),
        "correct": None if get("correct") is None else bool(get("correct")),
        "n_tokens": get("n_tokens"),
        "logp": float(logp) if logp is not None and np.isfinite(logp) else None,
        "finished": get("finished"),
    }
