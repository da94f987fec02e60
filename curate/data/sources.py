"""What a source's path names: files, globs, folders, hub datasets; what errors call them; and their fingerprints.

    data/pairs.jsonl          a file (jsonl, json, csv, tsv, also .gz, or parquet); `split` does not matter
    data/*.parquet            a glob: each file is a source of its own
    data/saved                a folder written by save_to_disk: a Dataset, or a DatasetDict of which `split` is read
    data/clone                a folder of data files, as datasets.load_dataset reads it
    owner/name                a dataset of the Hugging Face hub, streamed; owner/name:config, owner/name/folder for a part of it

A path is looked for beside `base` (the recipe's folder) where it is relative. The only file that reads with `datasets`.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.data.files import FILE_TYPES, RawRow, file_type, rows_of_file
from curate.errors import UsageError, ValidationError

WHOLE = 64 << 20  # files up to this size are hashed whole; larger ones by size, time and both ends
END = 1 << 20
BATCH = 512
HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One file, folder or hub dataset. `path` is None on the hub."""

    name: str
    path: Path | None
    split: str = "train"
    revision: str | None = None

    @property
    def is_text_table(self) -> bool:
        """Whether every cell is text (csv, tsv), so that numbers among the user's columns have to be told."""
        return self.path is not None and file_type(self.path) in (".csv", ".tsv")

    def rows(self) -> Iterator[tuple[int, RawRow]]:
        """(index from 0, row) of every row, streamed from the start each time."""
        if self.path is None:
            yield from enumerate(hub_rows(self))
        elif not self.path.is_dir():
            yield from rows_of_file(self.path, self.name)
        elif is_saved(self.path):
            yield from enumerate(saved_rows(self))
        else:
            yield from enumerate(folder_rows(self))

    def fingerprint(self) -> str:
        """Changes when the content does: hash of a file (or folder), commit of a hub dataset."""
        if self.path is None:
            return hub_fingerprint(self)
        digest = hashlib.sha256()
        if self.path.is_dir():
            digest.update(self.split.encode())
            for file in sorted(p for p in self.path.rglob("*") if p.is_file() and p.suffix not in (".md", ".lock")):
                digest.update(file.relative_to(self.path).as_posix().encode() + file_digest(file))
        else:
            digest.update(file_digest(self.path))
        return digest.hexdigest()[:20]


@dataclass(frozen=True)
class InMemory(Source):
    """Rows that a program holds: a list of dicts, or a `datasets.Dataset`, which gives its rows as dicts."""

    given: Sequence[RawRow] = ()

    def rows(self) -> Iterator[tuple[int, RawRow]]:
        yield from enumerate(self.given)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for row in self.given:
            digest.update(repr(row).encode())
        return digest.hexdigest()[:20]


def file_digest(path: Path) -> bytes:
    stat = path.stat()
    with open(path, "rb") as file:
        if stat.st_size <= WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        digest.update(file.read(END))
        file.seek(-END, os.SEEK_END)
        digest.update(file.read(END))
        return digest.digest()


def find_sources(
    path: str | Path | Sequence[str | Path | dict[str, Any]],
    *,
    split: str = "train",
    revision: str | None = None,
    base: Path | None = None,
) -> list[Source]:
    """The sources a path (or list of paths) names, in its order, a glob's files sorted by name; a file named twice counts once.

    Rows in memory are one source. ValidationError: nothing there (with the nearest name that is), or a type of file that is not read.
    """
    if not isinstance(path, (str, Path)):
        path = listed(path)
        if len(path) and isinstance(path[0], dict):
            return [InMemory(f"{len(path):,} rows in memory", None, given=path)]  # type: ignore[arg-type]
    paths: list[Any] = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise UsageError("source.path is an empty list. Name a file, a folder, a glob or a hub dataset.")
    base = base or Path()
    found: dict[object, Source] = {}
    for each in paths:
        for source in expand(str(each), split=split, revision=revision, base=base):
            found.setdefault(source.path.resolve() if source.path else source.name, source)
    return list(found.values())


def listed(rows: Any) -> Sequence[Any]:
    """What a program gave instead of a path, as a sequence: data frames, streams, lists, datasets. UsageError for no such thing."""
    if isinstance(rows, dict):  # a DatasetDict is one, too
        raise UsageError(
            f"expected rows or a path, found {type(rows).__name__} of {', '.join(map(str, rows))}: take one of them."
        )
    if hasattr(rows, "to_dicts"):
        return list(rows.to_dicts())  # polars
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        return list(rows.to_dict("records"))  # pandas
    if not hasattr(rows, "__iter__"):
        raise UsageError(f"expected rows or a path, found {type(rows).__name__}.")
    return rows if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") else list(rows)


def expand(text: str, *, split: str, revision: str | None, base: Path) -> Iterator[Source]:
    expanded = os.path.expanduser(text)
    here = base / expanded
    if here.exists():
        yield check_type(Source(Path(text).as_posix(), here, split, revision))
    elif glob.has_magic(text):
        names = sorted(glob.glob(expanded, root_dir=base, recursive=True))
        files = [name for name in names if (base / name).is_dir() or file_type(name)]
        if not files:
            raise ValidationError(
                f"{text}: no file with one of {', '.join(FILE_TYPES)} matches this glob{looked_in(base)}."
            )
        for name in files:
            yield Source(Path(name).as_posix(), base / name, split, revision)
    elif HUB.fullmatch(text) and not file_type(text) and not nearest(here) and not (base / text.split("/")[0]).is_dir():
        yield Source(text, None, split, revision)
    else:
        close = nearest(here)
        meant = f" Did you mean '{(Path(text).parent / close).as_posix()}'?" if close else ""
        raise ValidationError(f"{text}: there is no such file or folder{looked_in(base)}.{meant}")


def looked_in(base: Path) -> str:
    return "" if base == Path() else f" beside the recipe (in {base})"


def nearest(path: Path) -> str | None:
    """The name in the same folder that is spelled most alike."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    without_suffix = [name for name in names if name.split(".")[0] == path.name.split(".")[0]]
    return next(iter([*difflib.get_close_matches(path.name, names, n=1, cutoff=0.7), *without_suffix]), None)


def check_type(source: Source) -> Source:
    if source.path and not source.path.is_dir() and not file_type(source.path):
        raise ValidationError(
            f"{source.name}: '{source.path.suffix or 'no suffix'}' is not a type of file that is read: {', '.join(FILE_TYPES)}, "
            "all but parquet also .gz, or a folder written by save_to_disk."
        )
    return source


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
    for table in loaded.with_format("arrow").iter(batch_size=BATCH):
        yield from table.to_pylist()


def no_split(source: Source, splits: list[str]) -> str:
    return f"{source.name}: no split '{source.split}', it has {', '.join(splits)}. Choose one with `--set source.split={splits[0]}`."


def folder_rows(source: Source) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(str(source.path), split=source.split, streaming=True)
        yield from (dict(row) for row in rows)
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


def hub_parts(name: str) -> tuple[str, str | None, str | None]:
    """(repository, config, folder) of owner/name:config or owner/name/folder."""
    name, _, config = name.partition(":")
    parts = name.split("/")
    return "/".join(parts[:2]), config or None, "/".join(parts[2:]) or None


def hub_rows(source: Source) -> Iterator[dict[str, Any]]:
    import datasets

    repository, config, folder = hub_parts(source.name)
    try:
        rows = datasets.load_dataset(
            repository, config, data_dir=folder, split=source.split, revision=source.revision, streaming=True
        )
        yield from (dict(row) for row in rows)
    except (
        Exception
    ) as error:  # connection, missing, gated, no such split or config: `datasets` has a class for each and says it well
        raise ValidationError(
            f"{source.name}: no such file or folder here, and the Hugging Face hub did not give a dataset of this name "
            f"({type(error).__name__}: {first_line(error)}). Check the spelling, the split ({source.split}), the network and "
            "HF_HUB_OFFLINE; a configuration is named as owner/name:config."
        ) from error


def hub_fingerprint(source: Source) -> str:
    """The commit a revision (or the default branch) stands at; the revision's name where the hub cannot be asked."""
    import huggingface_hub

    repository, config, folder = hub_parts(source.name)
    try:
        commit = huggingface_hub.HfApi().dataset_info(repository, revision=source.revision).sha
    except Exception:  # reading it will say what is wrong
        commit = source.revision
    return f"hub:{commit or 'unknown'}:{config or ''}:{folder or ''}:{source.split}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
