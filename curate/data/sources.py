"""What a source's path names: files, globs, folders, hub datasets; what errors call them; and their fingerprints.

    data/pairs.jsonl          a file (jsonl, json, csv, tsv, also .gz, or parquet); it has no splits and no revisions
    data/*.parquet            a glob: each file is a source of its own, part-9 before part-10
    data/saved                a folder written by save_to_disk: a Dataset, or a DatasetDict of which `split` is read
    data/clone                a folder of data files, as datasets.load_dataset reads it
    owner/name                a dataset of the Hugging Face hub, streamed; owner/name:config, owner/name/folder for a part of it

A path is looked for beside `base` (the recipe's folder) where it is relative.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.data.arrow_types import types_in_file, types_of
from curate.data.by_column import turned_lists
from curate.data.files import FILE_TYPES, RawRow, file_type, rows_of_file
from curate.data.hub import HUB, find_on_hub, first_line, hub_parts, hub_rows, streamed
from curate.data.labels import class_names, with_names
from curate.errors import UsageError, ValidationError, nearest

WHOLE = 64 << 20  # files up to this size are hashed whole; larger ones by size, time and both ends
END = 1 << 20
BATCH = 512


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

    def fingerprint(self) -> str:
        """Changes when the content does: hash of a file (or folder), commit of a hub dataset."""
        if self.path is None:
            _, config, folder = hub_parts(self.name)
            return f"hub:{self.commit or self.revision or 'unknown'}:{config or ''}:{folder or ''}:{self.split}"
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

    @property
    def on_hub(self) -> bool:
        return False

    def rows(self) -> Iterator[Numbered]:
        labels = class_names(getattr(self.given, "features", None))
        yield from without_lines(with_names(row, labels) if isinstance(row, dict) else row for row in self.given)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for row in self.given:
            digest.update(repr(row).encode())
        return digest.hexdigest()[:20]


def without_lines(rows: Iterable[RawRow]) -> Iterator[Numbered]:
    for index, row in enumerate(rows):
        yield index, None, row


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
    """The sources a path (or list of paths) names, in its order, a glob's files in natural order; a file named twice counts once.

    Rows in memory are one source. ValidationError: nothing there (with the nearest name that is), or a type of file that is not read.
    UsageError: a split or a revision of what has none.
    """
    if not isinstance(path, (str, Path)):
        path = listed(path)
        if len(path) and isinstance(path[0], dict):
            check_settings("rows in memory", split, revision, (str(getattr(path, "split", None)),))
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
    if isinstance(rows, dict):
        by_column = turned_lists(rows)
        if by_column is not None:
            return by_column
        raise UsageError(  # a DatasetDict is one, too
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
        yield checked(Source(Path(text).as_posix(), here, split, revision))
    elif glob.has_magic(text):
        names = sorted(glob.glob(expanded, root_dir=base, recursive=True), key=natural)
        files = [name for name in names if (base / name).is_dir() or file_type(name)]
        if not files:
            raise ValidationError(
                f"{text}: no file with one of {', '.join(FILE_TYPES)} matches this glob{looked_in(base)}."
            )
        for name in files:
            yield checked(Source(Path(name).as_posix(), base / name, split, revision))
    elif (
        HUB.fullmatch(text)
        and not file_type(text)
        and not nearest_beside(here)
        and not (base / text.split("/")[0]).is_dir()
    ):
        close = nearest_below(base, Path(text).name)
        hint = (
            f" Did you mean {close}?"
            if close
            else f" A path of your own is looked for{looked_in(base) or ' here'}: check its spelling."
        )
        yield Source(text, None, split, revision, find_on_hub(text, revision, hint))
    else:
        close = nearest_beside(here)
        meant = f" Did you mean '{(Path(text).parent / close).as_posix()}'?" if close else ""
        raise ValidationError(f"{text}: there is no such file or folder{looked_in(base)}.{meant}")


def natural(name: str) -> list[tuple[int, int, str]]:
    """Orders names as people do: the numbers in them by their size, part-9 before part-10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def checked(source: Source) -> Source:
    """The source, of a type that is read and with settings that it has."""
    assert source.path is not None
    if source.path.is_dir():
        if source.revision is not None:
            raise no_revision(source.name)
        return source
    check_type(source)
    check_settings(source.name, source.split, source.revision)
    return source


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


def looked_in(base: Path) -> str:
    return "" if base == Path() else f" beside the recipe (in {base})"


def nearest_beside(path: Path) -> str | None:
    """The name in the same folder that is spelled most alike."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    without_suffix = [name for name in names if name.split(".")[0] == path.name.split(".")[0]]
    return nearest(path.name, names, cutoff=0.7) or next(iter(without_suffix), None)


def nearest_below(base: Path, name: str) -> str | None:
    """A data file or folder of about this name, in `base` or the folders in it."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in itertools.islice(itertools.chain(base.glob("*"), base.glob("*/*")), 2000):
            if file_type(entry) or entry.is_dir():
                found[entry.name.split(".")[0]] = "./" + entry.relative_to(base).as_posix()
    close = nearest(name.split(".")[0], found, cutoff=0.75)
    return None if close is None else found[close]


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
