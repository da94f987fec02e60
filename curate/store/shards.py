"""Shards: what a pass measured, as one parquet file each, kept beside the database.

A shard is written to a temporary file, synced, and renamed into `shards/pending/`: the rename is the done mark, and gives the name that has the
file's checksum (`wholeness.py`). Ingesting checks all pending shards, copies them into the database in one transaction and then moves the files to
`shards/<fingerprint>/`. A kill before the rename loses this shard only; a kill after it loses nothing, and a shard that is ingested twice is the
same as once. The files stay as the durable record of what was paid for: a database that is lost or damaged is made again from them.

A damaged shard is moved to `damaged/` beside the folder of shards, and never deleted: its rows count as not measured.

A file carries its `Measured` record and the measurement's columns, so it needs nothing else: row_id, the columns, and for sampling passes
`samples`, a list a row.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.errors import StoreError, disk_trouble
from curate.passes.files import write_atomically
from curate.store.entries import Measured
from curate.store.locks import process_alive
from curate.store.wholeness import RECORD, checksum, fault_of, has_checksum, named_with, stem, stem_of

SAMPLE = pa.struct(
    [
        ("text", pa.string()),
        ("correct", pa.bool_()),
        ("n_tokens", pa.int32()),
        ("logp", pa.float64()),
        ("finished", pa.bool_()),
        ("reasoning", pa.string()),
        ("outcome", pa.string()),
    ]
)
ANSWER = tuple(field.name for field in SAMPLE)  # what is kept of a sampled answer


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
    cleaned = [None if v is None or (isinstance(v, float) and not np.isfinite(v)) else v for v in array.tolist()]
    known = {type(v) for v in cleaned if v is not None}
    if known <= {bool, np.bool_}:
        return pa.array(cleaned, pa.bool_() if known else pa.float64())
    if known <= {int, float, bool}:
        return pa.array([None if v is None else float(v) for v in cleaned], pa.float64())
    return pa.array([None if v is None else clean_text(str(v)) for v in cleaned], pa.string())


def clean_text(text: str) -> str:
    """Text that UTF-8 can hold: half of a surrogate pair (a broken JSON escape) becomes U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


@dataclass(frozen=True)
class SetAside:
    """A damaged file. was: where it lay. now: where it lies. why: what is wrong with it, in words."""

    was: Path
    now: Path
    why: str

    def __str__(self) -> str:
        return (
            f"{self.was} is damaged: {self.why}. It is set aside as {self.now}, and its rows count as not measured: the next `curate run` "
            "measures them again."
        )


class Shards:
    """The shard files of a store."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pending_folder = folder / "pending"
        self.damaged_folder = folder.parent / "damaged"

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
        return self.put(table, stem(measured.fingerprint, index, list(row_ids)))

    def put(self, table: pa.Table, name: str) -> Path:
        """A table as the pending shard of this stem; an earlier one of the same rows, which was not taken in, goes."""
        earlier = [path for path in self.pending() if stem_of(path) == name]
        path = write_parquet(table, self.pending_folder, lambda crc: named_with(name, crc))
        for other in earlier:
            if other != path:
                other.unlink(missing_ok=True)
        return path

    def pending(self) -> list[Path]:
        return sorted(self.pending_folder.glob("*.parquet")) if self.pending_folder.is_dir() else []

    def all_files(self) -> list[Path]:
        """Every finished shard, ingested before or not: what a new database is made of."""
        return sorted(p for p in self.folder.glob("*/*.parquet"))

    def whole(self, paths: Iterable[Path]) -> tuple[list[Path], list[SetAside]]:
        """Those of these files that are what was written, and those that are not, which are set aside. Files that are gone are in neither."""
        good, damaged = [], []
        for path in paths:
            with suppress(FileNotFoundError):  # another process has taken it in meanwhile
                why = fault_of(path)
                if why is None:
                    good.append(path)
                else:
                    damaged.append(self.set_aside(path, why))
        return good, damaged

    def set_aside(self, path: Path, why: str) -> SetAside:
        """Move a damaged file to where nobody reads it. StoreError where that is not allowed."""
        to = self.damaged_folder / path.name
        try:
            self.damaged_folder.mkdir(exist_ok=True)
            number = 1
            while to.exists():
                number += 1
                to = self.damaged_folder / f"{path.name}.{number}"
            os.replace(path, to)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(
                f"{path} is damaged: {why}. It cannot be moved to {self.damaged_folder} ({error.strerror}): check that you may write there, "
                "or move the file away yourself. Its rows are measured again then."
            ) from None
        return SetAside(path, to, why)

    def damaged(self) -> list[Path]:
        """What was set aside."""
        return sorted(self.damaged_folder.glob("*")) if self.damaged_folder.is_dir() else []

    def without_checksum(self) -> list[Path]:
        """Shards that an earlier version wrote."""
        return [path for path in self.all_files() if not has_checksum(path)]

    def ingested(self, paths: Iterable[Path]) -> None:
        """Move files that the database has now out of pending. Of the same rows measured again the later file stays."""
        homes: dict[Path, list[Path]] = defaultdict(list)
        for path in paths:
            if path.parent == self.pending_folder:
                homes[self.folder / path.name.split("-")[0]].append(path)
        for home, files in homes.items():
            with suppress(OSError):  # on a full disk it stays pending, and is taken in again, which changes nothing
                home.mkdir(parents=True, exist_ok=True)
                there = defaultdict(set)
                for path in home.glob("*.parquet"):
                    there[stem_of(path)].add(path)
                for path in files:
                    os.replace(path, home / path.name)
                    for other in there[stem_of(path)] - {home / path.name}:
                        other.unlink(missing_ok=True)

    def all_pending(self) -> None:
        """Every shard counts as not taken in: for a database that is made anew. OSError passes through."""
        for path in self.all_files():
            if path.parent != self.pending_folder:
                self.pending_folder.mkdir(exist_ok=True)
                os.replace(path, self.pending_folder / path.name)

    def sweep(self) -> list[str]:
        """Remove what a killed process left half-written (a training that records may be writing right now). Returns the names removed."""
        left = self.half_written()
        for path in left:
            path.unlink(missing_ok=True)
        return [p.name for p in left]

    def half_written(self) -> list[Path]:
        """What killed processes left."""
        return [path for path in self.folder.glob("**/*.tmp") if not _being_written(path)]


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


def write_parquet(table: pa.Table, folder: Path, name: Callable[[str], str], *, for_now: bool = False) -> Path:
    """Write, sync, rename. name: what the file is called, from the checksum of its content. Raises StoreError when the disk refuses; no temporary
    file stays. for_now: the file is read once, by this process: not packed, and not synced.
    """
    how: dict[str, Any] = (
        {"compression": "lz4", "use_dictionary": ["kind", "style"]} if for_now else {"compression": "zstd"}
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with io.BytesIO() as file:
            pq.write_table(table, file, write_page_checksum=True, **how)
            content = file.getvalue()
        path = folder / name(checksum(content))
        with write_atomically(path, sync=not for_now) as new:
            new.write_bytes(content)
    except OSError as error:
        if (full := disk_trouble(error)) is not None:
            raise StoreError(f"{folder}: {str(full).removeprefix(f'{error.filename}: ')}") from None
        raise StoreError(f"{folder}: cannot write there ({error.strerror or error}).") from None
    return path


def _sample(sample: Any) -> dict[str, Any]:
    """One sample, from a mapping or from an object with these attributes."""
    get = sample.get if isinstance(sample, Mapping) else lambda key: getattr(sample, key, None)
    logp = get("logp")
    text, reasoning = get("text"), get("reasoning")
    return {
        "text": None if text is None else clean_text(text),
        "correct": None if get("correct") is None else bool(get("correct")),
        "n_tokens": get("n_tokens"),
        "logp": float(logp) if logp is not None and np.isfinite(logp) else None,
        "finished": get("finished"),
        "reasoning": None if reasoning is None else clean_text(reasoning),
        "outcome": get("outcome"),
    }
