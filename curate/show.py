"""How results are printed: aligned tables for people, JSON for machines. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from curate.errors import CurateError
from curate.progress import counted

STOPPED = 128 + signal.SIGINT


def table(
    rows: Iterable[Sequence[Any]], *, head: Sequence[str], width: int | None = None, longest: int | None = None
) -> str:
    """An aligned table as text: numbers to the right, text to the left, the last column folded to the terminal's width.

    longest: characters after which a value is cut short.
    """
    cells = [[_short(cell(v), longest) for v in row] for row in rows]
    numeric = [all(_is_number(v) for v in column) and bool(column) for column in zip(*cells, strict=True)] or [
        False
    ] * len(head)
    widths = [max([len(str(head[i])), *(len(row[i]) for row in cells)]) for i in range(len(head))]
    total = width or shutil.get_terminal_size((140, 24)).columns
    before = sum(widths[:-1]) + 2 * (len(widths) - 1)
    last = max(24, total - before)
    lines = []

    def line(values: Sequence[str], *, is_head: bool = False) -> None:
        folded = _fold(values[-1], last) if len(values[-1]) > last else [values[-1]]
        shown = [v.rjust(widths[i]) if numeric[i] else v.ljust(widths[i]) for i, v in enumerate(values[:-1])]
        end = folded[0].rjust(min(widths[-1], last)) if numeric[-1] else folded[0]
        lines.append("  ".join([*shown, end]).rstrip())
        lines.extend(" " * before + part for part in folded[1:])
        if is_head:
            lines.append("  ".join("-" * w for w in [*widths[:-1], min(widths[-1], last)]))

    line([str(h) for h in head], is_head=True)
    for row in cells:
        line(row)
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as a table shows it: - for NULL, four significant digits for numbers."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("\n", "\\n")


def _short(text: str, longest: int | None) -> str:
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def to_json(value: Any, *, indent: int | None = 2) -> str:
    return json.dumps(value, default=_plain, ensure_ascii=False, indent=indent)


def out(text: str) -> None:
    """Print a result; a reader that went away (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = None


def told(error: CurateError | KeyboardInterrupt) -> int:
    """Say on stderr why a command ended, in one message and without a traceback. Returns its exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("Stopped. What was measured is kept; the same command goes on from there.", file=sys.stderr)
        return STOPPED
    print(counted(f"{type(error).__name__}: {error}"), file=sys.stderr)
    return error.exit_code


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)


def _is_number(text: str) -> bool:
    return (
        text == "-"
        or text.replace(",", "")
        .replace(".", "")
        .replace("-", "")
        .replace("+", "")
        .replace("e", "")
        .replace("%", "")
        .isdigit()
    )


def _fold(text: str, width: int) -> list[str]:
    lines, here = [], ""
    for word in text.split(" "):
        if here and len(here) + 1 + len(word) > width:
            lines.append(here)
            here = word
        else:
            here = f"{here} {word}" if here else word
    return [*lines, here]
