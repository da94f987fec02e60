"""What a person sees while something runs: a bar on a terminal, plain lines in a log, nothing with --quiet. Everything goes to stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ONE = re.compile(r"(?<![\d.,])1 (row|pair|example|checkpoint|answer|recording|run|line|sample)s\b")


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
        text = counted(text)
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
