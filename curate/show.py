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


def columns() -> int:
    """How wide the terminal is, or what COLUMNS says; 80 where nobody knows, as in a pipe."""
    return max(shutil.get_terminal_size((80, 24)).columns, 20)


def table(
    rows: Iterable[Sequence[Any]],
    *,
    head: Sequence[str],
    width: int | None = None,
    longest: int | None = None,
    whole: bool = False,
) -> str:
    """An aligned table as text, folded to the terminal's width: numbers to the right, text to the left.

    longest: characters after which a value is cut short. whole: only the last column is folded, so that a line is a row for other tools.
    """
    cells = [[_short(cell(v), longest) for v in row] for row in rows]
    heads = [str(h) for h in head]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(heads))]
    natural = [max([len(heads[i]), *(len(row[i]) for row in cells)]) for i in range(len(heads))]
    total = (width or columns()) - 2 * (len(heads) - 1)
    if whole:
        widths = [*natural[:-1], min(natural[-1], max(24, total - sum(natural[:-1])))]
    else:
        least = [max([1, *(len(row[i]) for row in cells)]) if numeric[i] else 1 for i in range(len(heads))]
        widths = _fitted(natural, least, total)
    lines = []
    for values in (heads, ["-" * w for w in widths], *cells):
        parts = [_fold(v, widths[i]) for i, v in enumerate(values)]
        for k in range(max(map(len, parts), default=0)):
            shown = [part[k] if k < len(part) else "" for part in parts]
            lines.append(
                "  ".join(
                    v.rjust(w) if n else v.ljust(w) for v, w, n in zip(shown, widths, numeric, strict=True)
                ).rstrip()
            )
    return "\n".join(lines)


def _fitted(natural: list[int], least: list[int], total: int) -> list[int]:
    """Widths that fit: as wide as needed, the widest columns narrowed to one cap, but none below its least (numbers are not folded)."""
    cap = max(natural, default=0)
    widths = natural
    while sum(widths) > total and cap > 1:
        cap -= 1
        widths = [max(min(n, cap), least) for n, least in zip(natural, least, strict=True)]
    spare = total - sum(widths)
    for i in sorted(range(len(widths)), key=lambda i: -natural[i]):  # what the cap left over
        more = min(max(spare, 0), natural[i] - widths[i])
        widths[i], spare = widths[i] + more, spare - more
    return widths


def wrapped(text: str, indent: str = "", *, width: int | None = None) -> str:
    """Every line of a text folded to the terminal's width. indent: of the lines that follow a folded one, beside its own."""
    total = width or columns()
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= total:
            lines.append(line)
            continue
        text = line.strip()
        own = line[: len(line) - len(line.lstrip())]
        first, *rest = _fold(text, max(total - len(own), 8))
        lines.append(own + first)
        if rest:
            lines += [own + indent + part for part in _fold(" ".join(rest), max(total - len(own + indent), 8))]
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
    """Lines of at most `width`: folded at spaces, a longer word after a sign such as / or _ where it has one."""
    if len(text) <= width:
        return [text]
    lines, here = [], ""
    for word in text.split(" "):
        if here and len(here) + 1 + len(word) > width:
            lines.append(here)
            here = word
        else:
            here = f"{here} {word}" if here else word
        while len(here) > width:
            at = max((here.rfind(sign, 0, width) for sign in "/_-,.:"), default=-1) + 1
            at = at if at > width // 3 else width
            lines.append(here[:at])
            here = here[at:]
    return [*lines, here]
