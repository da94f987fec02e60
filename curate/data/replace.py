"""Putting a finished folder in the place of an older one, so that a kill at any moment leaves one of the two whole."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from curate.data.trainers import FILES
from curate.errors import UsageError

MARK = ".curate-export"
OURS = frozenset(
    (MARK, "README.md", "data", "dropped", "dataset_dict.json", "trainer_args.json", "trl_trainers.py", *FILES)
)
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def check_target(to: Path, sources: Iterable[str | Path | None]) -> Path:
    """`to`, absolute, if it may be written: no source lies in it or around it, and what is there is an export or empty."""
    target = to.absolute()
    for source in sources:
        if source is None:
            continue
        read = Path(source).resolve()
        if read == target.resolve() or read.is_relative_to(target.resolve()):
            raise UsageError(
                f"export.to: {to} holds the source {source}, which would be overwritten. Choose another folder with `--set export.to=...`."
            )
        if target.resolve().is_relative_to(read):
            raise UsageError(
                f"export.to: {to} lies inside the source {source}. Choose a folder outside of it with `--set export.to=...`."
            )
    recover(target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"export.to: {to} is a file; an export is a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).exists():
        raise UsageError(f"export.to: {to} is a folder that curate did not write. Choose another, or empty it first.")
    return target


def check_split(split: str) -> None:
    """UsageError for a split that an export would write in the place of a part of its own."""
    if split in OURS:
        raise UsageError(
            f"source.split: '{split}' is what an export calls a part of its own, so its rows cannot be exported. Save them under another split, "
            "or in a file."
        )


def carry_over(old: Path, new: Path) -> None:
    """Files that a person put into the old export are copied into the new one."""
    if not old.is_dir():
        return
    splits = {entry.name for entry in old.iterdir() if (entry / "state.json").is_file()}
    for entry in old.iterdir():
        if entry.name not in OURS | splits and not (new / entry.name).exists():
            shutil.copytree(entry, new / entry.name) if entry.is_dir() else shutil.copy2(entry, new / entry.name)


def replace_folder(new: Path, target: Path) -> None:
    """`new` becomes `target`; what was there is deleted afterwards."""
    flush_to_disk(new)
    if not target.exists():
        new.rename(target)
        return
    if exchange(new, target):
        shutil.rmtree(new)
        return
    old = target.with_name(f".{target.name}.old")  # not one step: `recover` mends a kill in between
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)


def recover(target: Path) -> None:
    """After a kill between two renames: the old folder back in its place."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step where the system can (Linux' renameat2); False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def flush_to_disk(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
