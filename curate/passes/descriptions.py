"""What lies at a path and what an error says, as parts of messages."""

from __future__ import annotations

from pathlib import Path

from curate.passes.chat import as_chat as as_chat


def describe_folder(path: str | Path) -> str:
    """What lies at a path, for error messages: "a folder with config.json, …", "no such folder", "a file"."""
    folder = Path(path)
    if folder.is_file():
        return "a file"
    if not folder.is_dir():
        return "no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "an empty folder"
    return "a folder with " + ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [""])[0][:300]
