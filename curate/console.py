"""What a person sees: progress while something runs, tables and JSON of results. Results go to stdout, everything else to stderr.

A bar on a terminal, plain lines in a log, nothing with --quiet.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curate.errors import CurateError, without_secrets

STOPPED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
ONE = re.compile(r"(?<![\d.,])1 ((?:bad )?row|pair|example|checkpoint|answer|recording|run|line|sample)s\b")


def counted(text: str) -> str:
    """The text with counts of one as they are said: "1 rows" is "1 row", "21 rows" and "0.1 rows" stay."""
    return ONE.sub(r"1 \1", text)


class Progress:
    """say(text) prints a line, warn(text) even with --quiet; bar(title, total) counts. None of it touches stdout, which is for results."""

    def __init__(self, *, quiet: bool = False, every: float = 10.0):
        self.quiet, self.every = quiet, every
        self.terminal = not quiet and sys.stderr.isatty()
        self._bars: Any = None

    def say(self, text: str) -> None:
        if self.quiet:
            return
        text = counted(without_secrets(text))
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say what would otherwise be taken for a right result; --quiet does not silence it."""
        quiet, self.quiet = self.quiet, False
        try:
            self.say(text)
        finally:
            self.quiet = quiet

    @contextmanager
    def bar(self, title: str, total: int, *, done: int = 0, unit: str = "rows") -> Iterator[Count]:
        """`with progress.bar("forward", 900) as count: count(256)`; done: how many were there before."""
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            # over the last hour, not rich's 30 s, in which a slow pass does one batch: and of one it tells nothing
            with Bars(*columns, console=Console(stderr=True), speed_estimate_period=3600) as bars:
                self._bars = bars
                task = bars.add_task(title, total=total or None, completed=done)
                try:
                    yield Count(lambda n: bars.advance(task, n))
                finally:
                    self._bars = None
            return
        started = last = time.monotonic()
        seen = 0
        pace = Pace()

        def step(n: int) -> None:
            nonlocal seen, last
            seen += n
            now = time.monotonic()
            pace.add(n, now)
            if now - last >= self.every and not total:
                last = now
                self.say(f"{title}: {seen:,} {unit}")
            elif now - last >= self.every and done + seen < total:
                last = now
                left = pace.left(total - done - seen)
                about = "" if left is None else f", about {span(left)} left"
                self.say(f"{title}: {done + seen:,} of {total:,} {unit}{about}")

        yield Count(step)
        if seen:
            of = f" of {total:,}" if total else ""
            self.say(f"{title}: {done + seen:,}{of} {unit} in {span(time.monotonic() - started)}")


class Pace:
    """How fast something is done, from the end of its first batch on: that one pays for memory, kernels and caches too."""

    def __init__(self) -> None:
        self._batches = self._done = 0
        self._first = self._last = 0.0

    def add(self, n: int, now: float) -> None:
        """`n` more were done by `now` (seconds)."""
        if self._batches:
            self._done += n
        else:
            self._first = now
        self._batches += 1
        self._last = now

    def left(self, n: int) -> float | None:
        """Seconds that `n` more take; None before two batches after the first."""
        return n * (self._last - self._first) / self._done if self._batches > 2 and self._done > 0 else None


class Count:
    """Call it with how many are done since the last call."""

    def __init__(self, advance: Any):
        self._advance = advance

    def __call__(self, n: int = 1) -> None:
        self._advance(n)


def span(seconds: float) -> str:
    """3.2 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


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
    print(counted(without_secrets(f"{type(error).__name__}: {error}")), file=sys.stderr)
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
