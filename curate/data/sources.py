"""A source: one file, folder, hub dataset or list in memory, as rows, Arrow types and a fingerprint. find.py says which sources a path names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.data.arrow_types import types_in_file, types_of
from curate.data.files import RawRow, file_type, rows_of_file
from curate.data.hub import first_line, hub_parts, hub_rows, streamed
from curate.data.labels import class_names, with_names
from curate.errors import UsageError, ValidationError

LARGE = 64 << 20  # files of more bytes than this take long to hash
END = 1 << 20
BATCH = 512
Digest = Callable[[Path], bytes]  # of a file's content


Numbered = tuple[int, int | None, RawRow]  # index from 0, line from 1 where rows are lines, row


@dataclass(frozen=True)
class Source:
    """One file, folder or hub dataset. `path` is None on the hub, `commit` what its revision stands at."""

    name: str
    path: Path | None
    split: str = "train"
    revision: str | None = None
    commit: str | None = None

    @property
    def on_hub(self) -> bool:
        return self.path is None

    @property
    def is_text_table(self) -> bool:
        """Whether every cell is text (csv, tsv), so that numbers among the user's columns have to be told."""
        return self.path is not None and file_type(self.path) in (".csv", ".tsv")

    @property
    def is_typed(self) -> bool:
        """Whether rows come out of Arrow tables, in which all mappings of a column have the same keys, many without a value."""
        if self.path is None:
            return True
        if self.path.is_dir():
            return is_saved(self.path) or any(self.path.rglob("*.parquet"))
        return file_type(self.path) == ".parquet"

    def rows(self) -> Iterator[Numbered]:
        """Every row, streamed from the start each time."""
        if self.path is None:
            yield from without_lines(hub_rows(self.name, self.split, self.revision))
        elif not self.path.is_dir():
            yield from rows_of_file(self.path, self.name)
        elif is_saved(self.path):
            yield from without_lines(saved_rows(self))
        else:
            yield from without_lines(folder_rows(self))

    def types(self) -> dict[str, str]:
        """The Arrow types of a parquet file's columns, or of a save_to_disk folder's; see `arrow_types`."""
        if self.path is not None and not self.path.is_dir():
            return types_in_file(self.path) if file_type(self.path) == ".parquet" else {}
        if self.path is None or not is_saved(self.path):
            return {}
        import datasets

        loaded = datasets.load_from_disk(str(self.path))
        features = (loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded).features
        return types_of(features.arrow_schema, class_names(features))

    def fingerprint(self, digest_of: Digest | None = None) -> str:
        """Changes when the content does: hash of a file (or folder), commit of a hub dataset. digest_of: `file_digest`, or one that remembers."""
        digest_of = digest_of or file_digest
        if self.path is None:
            _, config, folder = hub_parts(self.name)
            return f"hub:{self.commit or self.revision or 'unknown'}:{config or ''}:{folder or ''}:{self.split}"
        digest = hashlib.sha256()
        if self.path.is_dir():
            digest.update(self.split.encode())
            for file in sorted(p for p in self.path.rglob("*") if p.is_file() and p.suffix not in (".md", ".lock")):
                digest.update(file.relative_to(self.path).as_posix().encode() + digest_of(file))
        else:
            digest.update(digest_of(self.path))
        return digest.hexdigest()[:20]


@dataclass(frozen=True)
class InMemory(Source):
    """Rows that a program holds: a list of dicts, or a `datasets.Dataset`, which gives its rows as dicts."""

    given: Sequence[RawRow] = ()

    @property
    def on_hub(self) -> bool:
        return False

    @property
    def is_typed(self) -> bool:
        return getattr(self.given, "features", None) is not None

    def rows(self) -> Iterator[Numbered]:
        labels = class_names(getattr(self.given, "features", None))
        yield from without_lines(with_names(row, labels) if isinstance(row, dict) else row for row in self.given)

    def fingerprint(self, digest_of: Digest | None = None) -> str:
        digest = hashlib.sha256()
        for row in self.given:
            digest.update(repr(row).encode())
        return digest.hexdigest()[:20]


def without_lines(rows: Iterable[RawRow]) -> Iterator[Numbered]:
    for index, row in enumerate(rows):
        yield index, None, row


def file_digest(path: Path) -> bytes:
    """Of the whole content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def ends_digest(path: Path) -> bytes:
    """Of a large file's size, time and both ends: what stands for one in values that an earlier curate measured."""
    stat = path.stat()
    with open(path, "rb") as file:
        digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        digest.update(file.read(END))
        file.seek(-END, os.SEEK_END)
        digest.update(file.read(END))
        return digest.digest()


def check_settings(name: str, split: str, revision: str | None, splits: Sequence[str] = ()) -> None:
    """UsageError for a split or a revision of something that has none; `train`, the default, is no claim."""
    if split not in ("train", *splits):
        what = "a file has no splits" if file_type(name) else "there are no splits"
        raise UsageError(
            f"source.split: {name}: {what}, found {split!r}. Leave `split` out and name the file of the rows that you mean; `limit: 100` takes the "
            "first hundred."
        )
    if revision is not None:
        raise no_revision(name)


def no_revision(name: str) -> UsageError:
    return UsageError(
        f"source.revision: {name} is no dataset of the hub, so it has no revisions. Leave `revision` out: what is there is read."
    )


def is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Rows of a save_to_disk folder, memory-mapped, a batch at a time."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(source.path))
    except Exception as error:  # whatever a damaged folder makes of it
        raise ValidationError(
            f"{source.name}: a save_to_disk folder that cannot be read ({first_line(error)}). Save it again."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise ValidationError(no_split(source, list(loaded)))
        loaded = loaded[source.split]
    else:
        check_settings(source.name, source.split, None, (str(loaded.split),))
    labels = class_names(loaded.features)
    for table in loaded.with_format("arrow").iter(batch_size=BATCH):
        for row in table.to_pylist():
            yield with_names(row, labels)


def no_split(source: Source, splits: list[str]) -> str:
    return f"{source.name}: no split '{source.split}', it has {', '.join(splits)}. Choose one with `--set source.split={splits[0]}`."


def folder_rows(source: Source) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from streamed(datasets.load_dataset(str(source.path), split=source.split, streaming=True))
    except ValueError as error:
        if splits := re.search(r"Available splits: \[(.*?)\]|Should be one of \[(.*?)\]", str(error)):
            raise ValidationError(
                no_split(source, re.findall(r"[\w.-]+", splits.group(1) or splits.group(2)))
            ) from error
        raise unreadable_folder(source, error) from error
    except Exception as error:  # `datasets` raises many kinds
        raise unreadable_folder(source, error) from error


def unreadable_folder(source: Source, error: Exception) -> ValidationError:
    return ValidationError(
        f"{source.name}: neither a save_to_disk folder nor a folder of data files ({first_line(error)}). Name the files, e.g. "
        f"`{source.name}/*.parquet`."
    )
