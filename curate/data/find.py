"""The sources that a path names; of what is not there, the nearest name that is.

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
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from curate.data.by_column import turned_lists
from curate.data.files import FILE_TYPES, file_type
from curate.data.hub import HUB, find_on_hub
from curate.data.sources import InMemory, Source, check_settings, no_revision
from curate.errors import UsageError, ValidationError, nearest

NAME_ONE = " Name a file, a folder, a glob or a hub dataset (owner/name)."


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
    sources: dict[object, Source] = {}
    for each in paths:
        for source in expand(str(each), split=split, revision=revision, base=base):
            sources.setdefault(source.path.resolve() if source.path else source.name, source)
    return list(sources.values())


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
        raise ValidationError(f"{text}: there is no such file or folder{looked_in(base)}.{meant or NAME_ONE}")


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
    paths = {}
    with contextlib.suppress(OSError):
        for entry in itertools.islice(itertools.chain(base.glob("*"), base.glob("*/*")), 2000):
            if file_type(entry) or entry.is_dir():
                paths[entry.name.split(".")[0]] = "./" + entry.relative_to(base).as_posix()
    close = nearest(name.split(".")[0], paths, cutoff=0.75)
    return None if close is None else paths[close]


def check_type(source: Source) -> Source:
    if source.path and not source.path.is_dir() and not file_type(source.path):
        raise ValidationError(
            f"{source.name}: '{source.path.suffix or 'no suffix'}' is not a type of file that is read: {', '.join(FILE_TYPES)}, "
            "all but parquet also .gz, or a folder written by save_to_disk."
        )
    return source
