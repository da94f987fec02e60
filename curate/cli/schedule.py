"""A recipe by the clock: `curate run RECIPE` as a child process, whenever a cron line says so. APScheduler in one process, no job store.

Never two runs of one recipe at once, also across two schedulers: every run holds a lock in the recipe's store. Runs missed while the machine
slept are one run when it wakes; one that comes due while the run before is still going is left out (the next finds everything that is new).
On SIGTERM or SIGINT the child is asked to stop (what it measured is kept), waited for, and ended after a grace. What a run did, and with
which version, the child writes into the store.

With events (`--json`) every fact is an object too: `next` and `started` with their time, `ended` with exit code, outcome, seconds and what
`curate run --json` printed (`result`; null where it printed none), `left_out` and `failed` with why, `stopped`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from curate.cli.cron import now, parse_cron
from curate.errors import CurateError, StoreError
from curate.store.locks import locked

GRACE = 60.0  # seconds a child gets to stop by itself; a shard being written needs a fraction of that


def say_line(text: str) -> None:
    """One line to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def schedule(
    recipe: str | Path,
    *,
    cron: str,
    extra_args: Sequence[str] = (),
    run_now: bool = False,
    say: Callable[[str], Any] = say_line,
    events: Callable[[dict[str, Any]], Any] | None = None,
    grace: float = GRACE,
) -> None:
    """Run `recipe` at the times of `cron` until SIGTERM or SIGINT.

    cron: minute hour day month weekday, as in a crontab (weekday 0 and 7 are Sunday), in this machine's time zone.
    extra_args: passed on to `curate run`. run_now: also once at the start. say: takes lines for people. events: takes an object for every
    fact (header); what a run prints then goes into its `ended`, not to stdout. grace: seconds a run gets to stop when the schedule is stopped.
    Raises UsageError for a bad cron line, a bad recipe, or when the extra `schedule` is missing.
    """
    from curate.recipe.load import load_recipe

    trigger = parse_cron(cron)
    loaded = load_recipe(recipe, set=_given(extra_args, "--set"), store=next(iter(_given(extra_args, "--store")), None))
    command = [sys.executable, "-m", "curate", "run", str(recipe), *extra_args, *(["--json"] if events else [])]
    lock = lock_file(loaded.store, recipe)
    runs = Runs(command, name=Path(recipe).name, lock=lock, say=say, events=events, grace=grace)
    say(f"{Path(recipe).name} by `{cron}`; stop with Ctrl-C or SIGTERM.")
    serve(runs, trigger, first=now() if run_now else None)


def _given(extra_args: Iterable[str], option: str) -> list[str]:
    arguments = list(extra_args)
    return [after for before, after in pairwise(arguments) if before == option]


def lock_file(store: Path, recipe: str | Path) -> Path:
    """Where runs of one recipe into one store are kept apart: a file in the store, so that it also holds between machines that share it."""
    folder = store / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{store}: the store's folder cannot be made ({error.strerror}).") from None
    digest = hashlib.sha256(str(Path(recipe).resolve()).encode()).hexdigest()[:8]
    return folder / f"{Path(recipe).stem}-{digest}.lock"


class _Taken(CurateError):
    """Another scheduler's run holds the lock."""


class Runs:
    """The runs of one recipe, one at a time. Calling it does one run and says what came of it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        lock: Path,
        say: Callable[[str], Any],
        events: Callable[[dict[str, Any]], Any] | None = None,
        grace: float = GRACE,
    ):
        self.command, self.name, self.lock, self.say, self.grace = list(command), name, lock, say, grace
        self.events = events
        self.finished = 0  # runs that ended, whatever their exit code
        self.stopping = threading.Event()
        self._guard = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def tell(self, text: str, event: str, **fields: Any) -> None:
        """A line for people and, where events are wanted, the same as an object."""
        self.say(text)
        if self.events is not None:
            time_of = fields.pop("time", None) or now()
            self.events({"event": event, "recipe": self.name, "time": time_of.isoformat(timespec="seconds"), **fields})

    def __call__(self) -> int | None:
        """The child's exit code; None where there was no run: another one holds the lock, or the schedule is being stopped."""
        try:
            with locked(self.lock, lambda holder: _Taken(f"process {holder} holds {self.lock}")) as lock:
                return self._run(lock)
        except _Taken:
            text = f"{self.name}: another scheduler's run is still going; this one is left out."
            self.tell(text, "left_out", reason="another scheduler's run is still going")
        except StoreError as error:
            self.tell(f"{self.name}: the run could not be started ({error})", "failed", reason=str(error))
        return None

    def _run(self, lock: int) -> int | None:
        """One run as a child that holds the lock too."""
        with tempfile.TemporaryFile() as printed:
            started = time.monotonic()
            with self._guard:
                if self.stopping.is_set():
                    return None
                at = now()
                self.tell(f"{self.name}: run started {at:%Y-%m-%d %H:%M:%S}", "started", time=at)
                try:
                    # A session of its own: Ctrl-C reaches it through stop() only, and once. The lock is the child's too, so that
                    # it holds as long as the run does, even if this process is killed.
                    self._child = subprocess.Popen(
                        self.command,
                        stdin=subprocess.DEVNULL,
                        stdout=printed if self.events else None,
                        start_new_session=True,
                        pass_fds=(lock,),
                    )
                except OSError as error:
                    text = f"{self.name}: the run could not be started ({error.strerror})."
                    self.tell(text, "failed", reason=error.strerror)
                    return None
            code = self._child.wait()
            with self._guard:
                self._child = None
            self.finished += 1
            printed.seek(0)
            result = _parsed(printed.read()) if self.events else None
        took = time.monotonic() - started
        text = f"{self.name}: {outcome(code)} after {took:.0f} s"
        self.tell(text, "ended", code=code, outcome=outcome(code), seconds=round(took, 3), result=result)
        return code

    def stop(self) -> None:
        """Start no more; ask the run that is going to stop, and end it and what it started if it has not after the grace."""
        self.stopping.set()
        with self._guard:
            child = self._child
        if child is None:
            return
        self.say(f"{self.name}: asking the run to stop (at most {self.grace:.0f} s; what it measured is kept)")
        _signal(child.pid, signal.SIGINT)
        try:
            child.wait(self.grace)
        except subprocess.TimeoutExpired:
            self.say(
                f"{self.name}: it did not stop, so it is ended now. The next run goes on from its last finished shard."
            )
            _signal_group(child.pid, signal.SIGKILL)
            child.wait()


def outcome(code: int) -> str:
    """An exit code in words (interface: 0 done, 1 failed, 2 wrong use or recipe; negative: ended by that signal)."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    words = {
        0: "done",
        1: "FAILED",
        2: "REFUSED: wrong use or recipe",
        128 + signal.SIGINT: "stopped",
        128 + signal.SIGTERM: "stopped",
    }
    return f"{words.get(code, 'FAILED')} (exit code {code})"


def _parsed(printed: bytes) -> Any:
    try:
        return json.loads(printed)
    except ValueError:  # nothing, where the run failed
        return None


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def serve(runs: Runs, trigger: Any, *, first: datetime | None = None) -> None:
    """Run at the times of `trigger` until SIGTERM or SIGINT. first: an earlier time for the first run (in the past: it is due now)."""
    from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED, EVENT_JOB_MAX_INSTANCES, JobEvent
    from apscheduler.schedulers.background import BackgroundScheduler

    logging.getLogger("apscheduler").setLevel(logging.CRITICAL)  # everything it would log is said below
    scheduler = BackgroundScheduler()
    given = {} if first is None else {"next_run_time": first}
    scheduler.add_job(runs, trigger, coalesce=True, max_instances=1, misfire_grace_time=None, **given)

    def report(event: JobEvent) -> None:
        if event.code == EVENT_JOB_MAX_INSTANCES:
            text = f"{runs.name}: due again while the run before is still going; left out."
            runs.tell(text, "left_out", reason="the run before is still going")
            return
        if event.code == EVENT_JOB_ERROR:
            reason = f"{type(event.exception).__name__}: {event.exception}"
            runs.tell(f"{runs.name}: {reason}", "failed", reason=reason)
        if not runs.stopping.is_set():
            say_next()

    def say_next() -> None:
        # From the trigger, not from the scheduler: its lock is held while it shuts down and waits for the thread that calls this.
        following = trigger.get_next_fire_time(None, now())
        if following is not None:
            runs.tell(f"{runs.name}: next run {following:%Y-%m-%d %H:%M:%S %Z}", "next", time=following)

    scheduler.add_listener(report, EVENT_JOB_EXECUTED | EVENT_JOB_ERROR | EVENT_JOB_MAX_INSTANCES)
    with _StopSignals() as wait:
        scheduler.start()
        if first is None:
            say_next()
        name = wait()
        runs.say(f"{name}: stopping the schedule")
        runs.stop()
        scheduler.shutdown(wait=True)
    runs.tell("Stopped. The same command goes on from here.", "stopped", signal=name)


class _StopSignals:
    """`with _StopSignals() as wait: wait()` returns the name of the first SIGTERM or SIGINT.

    A pipe, so that no signal falls between a check and a wait.
    """

    def __enter__(self) -> Callable[[], str]:
        self.read, self.write = os.pipe()
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self._wait

    def _note(self, number: int, _frame: object) -> None:
        os.write(self.write, bytes([number]))

    def _wait(self) -> str:
        select.select([self.read], [], [])
        return signal.Signals(os.read(self.read, 1)[0]).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.read)
        os.close(self.write)
