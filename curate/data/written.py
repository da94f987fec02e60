"""Rows of an export into its files: Parquet, and a folder that `datasets.load_from_disk` reads, in one pass over the rows."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

GROUP = 1 << 17  # rows of a Parquet row group at most
LINES = 1000  # rows of a record batch, as `datasets` writes them: one row is read without its neighbours' neighbours
SHARD = 500 << 20  # bytes of a file of a save_to_disk folder, as `datasets` cuts them


def in_files(tables: Iterator[pa.Table], rows_per_file: int | None) -> Iterator[Iterator[pa.Table]]:
    """The rows of each file, at most so many; the tables of one are read before the next is asked for. None: all in one."""
    waiting: list[pa.Table] = []

    def of_one() -> Iterator[pa.Table]:
        room = rows_per_file
        while room is None or room:
            table = waiting.pop() if waiting else next(tables, None)
            if table is None:
                return
            taken = table if room is None else table.slice(0, room)
            if len(taken) < len(table):
                waiting.append(table.slice(len(taken)))
            room = None if room is None else room - len(taken)
            yield taken

    yield of_one()
    while True:
        while not waiting:
            if (table := next(tables, None)) is None:
                return
            waiting += [table] if len(table) else []
        yield of_one()


def write_parquet(tables: Iterator[pa.Table], schema: pa.Schema, path: Path) -> int:
    """Write the rows; returns how many there were."""
    import pyarrow.parquet as pq

    written = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table, GROUP)
            written += len(table)
    return written


def write_dataset(
    tables: Iterator[pa.Table], schema: pa.Schema, folder: Path, split: str, rows_per_file: int | None = None
) -> int:
    """Write the rows as `data/<split>-00000.parquet`, … and as a save_to_disk DatasetDict of one split. Returns how many there were."""
    with SavedSplit(folder / split, schema) as saved:
        written = sum(
            write_parquet(map(saved.add, part), schema, folder / "data" / f"{split}-{number:05d}.parquet")
            for number, part in enumerate(in_files(tables, rows_per_file))
        )
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    return written


class SavedSplit:
    """A folder as `Dataset.save_to_disk` leaves it, written while rows pass: its two JSON files are those of the library, for no rows."""

    def __init__(self, folder: Path, schema: pa.Schema):
        import datasets

        self.folder = folder
        features = datasets.Features.from_arrow_schema(schema)
        shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            datasets.Dataset.from_dict({name: [] for name in schema.names}, features=features).save_to_disk(str(folder))
        finally:
            if shown:
                datasets.enable_progress_bars()
        for file in folder.glob("*.arrow"):
            file.unlink()
        self.schema = features.arrow_schema
        self.files: list[Path] = []
        self._writer: Any = None
        self._bytes = 0

    def add(self, table: pa.Table) -> pa.Table:
        """Write these rows, and give them back."""
        import pyarrow as pa

        if self._writer is None or self._bytes >= SHARD:
            self._close()
            self.files.append(self.folder / f"{len(self.files)}.arrow")
            self._writer, self._bytes = pa.ipc.new_stream(str(self.files[-1]), self.schema), 0
        self._writer.write_table(table.cast(self.schema), LINES)
        self._bytes += table.nbytes
        return table

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> SavedSplit:
        return self

    def __exit__(self, error: object, *_: object) -> None:

        if error is None and not self.files:
            self.add(self.schema.empty_table())
        self._close()
        if error is not None:
            return
        names = [f"data-{number:05d}-of-{len(self.files):05d}.arrow" for number in range(len(self.files))]
        for file, name in zip(self.files, names, strict=True):
            file.rename(self.folder / name)
        state = json.loads((self.folder / "state.json").read_text())
        state |= {"_data_files": [{"filename": name} for name in names], "_split": self.folder.name}
        state["_fingerprint"] = secrets.token_hex(8)  # what `map` and `filter` keep is kept under it
        (self.folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
