"""The clock: cron lines mean what cron means, runs never overlap, missed runs are one, and stopping is graceful.

Real schedulers in real processes with short intervals; the run itself is a stand-in that writes down when it starts and ends. Nothing sleeps
for a fixed time: everything waits for a fact, with a deadline.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

import curate
from curate.cli import schedule as module
from curate.cli.cron import parse_cron
from curate.cli.schedule import Runs, lock_file, outcome, schedule
from curate.console import Progress
from curate.errors import UsageError
from tests.tiny_models import make_llama

DEADLINE = 60.0  # seconds; what is waited for takes a fraction of one on an idle machine

# A run: notes its start, waits for the file `go` (if asked), notes its end. On SIGINT it notes that and leaves with 130, as curate does.
RUN = """
import os, sys, time
from pathlib import Path
folder, how = Path(sys.argv[1]), sys.argv[2]
def note(text):
    with (folder / "notes").open("a") as notes:
        notes.write(text + "\\n")
if how == "stubborn":
    import signal, subprocess
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    note(f"{os.getpid()} {other.pid}")
try:
    note("start")
    while how != "short" and not (folder / "go").exists():
        time.sleep(0.01)
    note("end")
except KeyboardInterrupt:
    note("stopped")
    sys.exit(130)
"""

SERVE = """
import sys
from datetime import timedelta
from pathlib import Path
from apscheduler.triggers.interval import IntervalTrigger
from curate.cli.schedule import Runs, now, serve
folder = Path(sys.argv[1])
command = [sys.executable, str(folder / "run.py"), str(folder), sys.argv[2]]
say = lambda text: print(text, flush=True)
runs = Runs(command, name="recipe.yaml", lock=folder / "lock", say=say, grace=float(sys.argv[5]))
serve(runs, IntervalTrigger(seconds=float(sys.argv[3])), first=now() - timedelta(seconds=float(sys.argv[4])))
"""


def wait_for(fact, what):
    """Poll until fact() is true; its value."""
    end = time.monotonic() + DEADLINE
    while not (value := fact()):
        assert time.monotonic() < end, f"waited {DEADLINE:.0f} s for {what}"
        time.sleep(0.01)
    return value


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    return tmp_path


def notes(folder: Path) -> list[str]:
    file = folder / "notes"
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def scheduler(folder):
    """Starts a scheduler of stand-in runs; its output is read with .said()."""
    started: list[subprocess.Popen] = []

    def start(how: str, *, every: float, overdue: float = 0.0, grace: float = 30.0) -> subprocess.Popen:
        with (folder / "said").open("w") as said:
            arguments = [str(folder), how, str(every), str(overdue), str(grace)]
            process = subprocess.Popen([sys.executable, "-c", SERVE, *arguments], stdout=said, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield start
    (folder / "go").touch()  # ends stand-ins that a failed test left waiting
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def said(folder: Path) -> str:
    return (folder / "said").read_text()


def stop(process: subprocess.Popen, with_signal: int = signal.SIGTERM) -> int:
    process.send_signal(with_signal)
    return process.wait(DEADLINE)


# --- cron lines ---------------------------------------------------------------------------------------------------------------------

# 2026-11-20 is a Friday
NEXT_AFTER_FRIDAY_NOON = [
    ("0 2 * * *", "2026-11-21 02:00"),
    ("*/15 * * * *", "2026-11-20 12:15"),
    ("0 2 * * 0", "2026-11-22 02:00"),  # Sunday, not APScheduler's Monday
    ("0 2 * * 7", "2026-11-22 02:00"),
    ("0 2 * * 1", "2026-11-23 02:00"),
    ("0 2 * * 1-5", "2026-11-23 02:00"),
    ("0 2 * * fri", "2026-11-27 02:00"),
    ("0 2 * * 6-7", "2026-11-21 02:00"),
    ("0 2 * * fri-sun", "2026-11-21 02:00"),
    ("0 2 * * */3", "2026-11-21 02:00"),  # Sunday, Wednesday, Saturday
    ("0 2 1 * *", "2026-12-01 02:00"),
    ("0 2 1 * 0", "2026-11-22 02:00"),  # cron: the first of the month, or a Sunday
    ("0 2 22 * 1", "2026-11-22 02:00"),
    ("30 4 29 feb *", "2028-02-29 04:30"),
]


@pytest.mark.parametrize(("cron", "expected"), NEXT_AFTER_FRIDAY_NOON)
def test_a_cron_line_means_what_cron_means(cron, expected, monkeypatch):
    zone = ZoneInfo("Europe/Berlin")
    monkeypatch.setattr("tzlocal.get_localzone", lambda: zone)
    monkeypatch.setattr("apscheduler.triggers.cron.get_localzone", lambda: zone)
    noon = datetime(2026, 11, 20, 12, 1, tzinfo=zone)
    assert f"{parse_cron(cron).get_next_fire_time(None, noon):%Y-%m-%d %H:%M}" == expected


@pytest.mark.parametrize(
    ("cron", "says"),
    [
        ("0 2 * *", "4 fields"),
        ("0 2 * * 8", "the weekday '8'"),
        ("0 2 * * 5-1", "the weekday '5-1'"),
        ("0 2 * * */0", "the weekday '*/0'"),
        ("61 * * * *", "61"),
        ("often", "minute hour day month weekday"),
        ("0 2 30 2 *", "no such day ever comes"),
    ],
)
def test_a_bad_cron_line_is_an_error_that_says_what_one_is(cron, says):
    with pytest.raises(UsageError) as error:
        parse_cron(cron)
    assert says in str(error.value)
    assert f'"{cron}"' in str(error.value)


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"curate-dynamics\[schedule\]"):
        parse_cron("0 2 * * *")


def test_a_missing_recipe_is_said_before_anything_is_scheduled(tmp_path):
    with pytest.raises(UsageError, match=r"no\.yaml"):
        schedule(tmp_path / "no.yaml", cron="0 2 * * *")


def test_the_command_of_a_run_and_where_its_lock_is(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kind: preference\nstore: mine\nsource: pairs.jsonl\n")
    served = []
    monkeypatch.setattr(module, "serve", lambda runs, trigger, first: served.append((runs, first)))
    schedule(recipe, cron="0 2 * * *", extra_args=["--set", "source.split=test"], say=lambda text: None)
    elsewhere = ["--store", str(tmp_path / "other")]
    schedule(recipe, cron="0 2 * * *", extra_args=elsewhere, run_now=True, say=lambda text: None)
    (runs, first), (other, at_once) = served
    assert runs.command == [sys.executable, "-m", "curate", "run", str(recipe), "--set", "source.split=test"]
    assert runs.lock == lock_file(tmp_path / "mine", recipe)
    assert other.lock.is_relative_to(tmp_path / "other")
    assert first is None
    assert at_once <= module.now()


# --- one run at a time ----------------------------------------------------------------------------------------------------------------


def stand_in(folder: Path, how: str, lines: list[str], lock: str = "lock") -> Runs:
    command = [sys.executable, str(folder / "run.py"), str(folder), how]
    return Runs(command, name="recipe.yaml", lock=folder / lock, say=lines.append)


def test_two_schedulers_never_run_one_recipe_at_once(folder):
    lines: list[str] = []
    first, second = stand_in(folder, "until go", lines), stand_in(folder, "short", lines)
    thread = threading.Thread(target=first)
    thread.start()
    try:
        wait_for(lambda: notes(folder) == ["start"], "the first run")
        assert second() is None
        assert "another scheduler's run is still going" in lines[-1]
    finally:
        (folder / "go").touch()
        thread.join()
    assert second() == 0
    assert notes(folder) == ["start", "end", "start", "end"]


def test_the_lock_outlives_a_killed_scheduler_as_long_as_its_run_goes_on(folder, scheduler):
    process = scheduler("until go", every=3600)
    wait_for(lambda: notes(folder) == ["start"], "the run")
    process.kill()
    process.wait()
    lines: list[str] = []
    assert stand_in(folder, "short", lines)() is None
    (folder / "go").touch()
    wait_for(lambda: stand_in(folder, "short", lines)() == 0, "the lock")
    assert notes(folder) == ["start", "end", "start", "end"]


def test_a_run_that_is_due_while_one_goes_on_is_left_out(folder, scheduler):
    process = scheduler("until go", every=0.1)
    wait_for(lambda: said(folder).count("left out") >= 3, "three runs to be left out")
    assert notes(folder) == ["start"]
    (folder / "go").touch()
    wait_for(lambda: len(notes(folder)) >= 6, "two more runs")
    assert stop(process) == 0
    written = notes(folder)
    pairs = [written[i : i + 2] for i in range(0, len(written), 2)]
    assert all(pair == ["start", "end"] for pair in pairs[:-1])  # the last one may have been stopped
    assert pairs[-1][0] == "start"


def test_runs_missed_while_the_machine_slept_are_one_run(folder, scheduler):
    process = scheduler("short", every=3600, overdue=5 * 3600 + 60)  # five more came due since
    wait_for(lambda: "next run" in said(folder), "the run to end")
    assert stop(process) == 0
    assert notes(folder) == ["start", "end"]
    assert "done (exit code 0)" in said(folder)


# --- stopping -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT])
def test_stopping_asks_the_run_to_stop_and_waits_for_it(folder, scheduler, with_signal):
    process = scheduler("until go", every=3600)
    wait_for(lambda: notes(folder) == ["start"], "the run")
    assert stop(process, with_signal) == 0
    assert notes(folder) == ["start", "stopped"]
    assert "stopped (exit code 130)" in said(folder)
    assert said(folder).endswith("Stopped. The same command goes on from here.\n")


def test_a_run_that_does_not_stop_is_ended_with_what_it_started(folder, scheduler):
    process = scheduler("stubborn", every=3600, grace=0.2)
    wait_for(lambda: "start" in notes(folder), "the run")
    pids = [int(pid) for pid in notes(folder)[0].split()]
    assert stop(process) == 0
    assert "ended by SIGKILL" in said(folder)
    assert len(pids) == 2
    wait_for(lambda: not any(alive(pid) for pid in pids), "the run's processes to end")


def alive(pid: int) -> bool:
    """Whether a process still runs (one that waits to be reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stopping_between_runs_starts_none(folder):
    lines: list[str] = []
    runs = stand_in(folder, "short", lines)
    runs.stop()
    assert runs() is None
    assert notes(folder) == []


def test_a_run_that_cannot_be_started_is_said_and_the_schedule_goes_on(folder):
    lines: list[str] = []
    runs = Runs([str(folder / "no such command")], name="recipe.yaml", lock=folder / "lock", say=lines.append)
    assert runs() is None
    assert "could not be started (No such file or directory)" in lines[-1]
    assert runs() is None  # and its lock was given back


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "another scheduler's run is still going"),  # as shared file systems say that a lock is taken
        (errno.EAGAIN, "another scheduler's run is still going"),
        (errno.ENOLCK, "could not be started"),
    ],
)
def test_a_lock_of_another_machine_is_one_too(folder, monkeypatch, number, said):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lines: list[str] = []
    assert stand_in(folder, "short", lines)() is None
    assert said in lines[-1] and notes(folder) == []


def test_with_json_every_fact_is_an_object_a_line(tmp_path):
    """A real scheduler of a real run over one pair: its outcome holds what the run printed, which stays off stdout."""
    make_llama(tmp_path / "base", seed=0)
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kind: preference\nsource: pairs.jsonl\nmodels: {reference: base}\nscores: [ranking_gap]\n")
    curate.run(recipe, progress=Progress(quiet=True))  # the scheduled run has nothing to measure, and imports no torch
    command = [sys.executable, "-m", "curate", "schedule", str(recipe), "--cron", "0 2 1 1 *", "--now", "--json"]
    with (tmp_path / "said").open("w") as output, (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
    try:
        wait_for(lambda: '"next"' in said(tmp_path) or process.poll() is not None, "the run's outcome")
        assert stop(process) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    events = [json.loads(line) for line in said(tmp_path).splitlines()]
    assert [event["event"] for event in events] == ["started", "ended", "next", "stopped"]
    assert {event["recipe"] for event in events} == {"recipe.yaml"}
    started, ended, following, _ = events
    assert (ended["code"], ended["outcome"]) == (0, "done (exit code 0)"), (tmp_path / "errors").read_text()
    assert "ranking_gap" in ended["result"]["scores"] and ended["seconds"] > 0
    assert datetime.fromisoformat(started["time"]) < datetime.fromisoformat(following["time"])
    assert datetime.fromisoformat(following["time"]).strftime("%m-%d %H:%M") == "01-01 02:00"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "done (exit code 0)"),
        (1, "FAILED (exit code 1)"),
        (2, "REFUSED: wrong use or recipe (exit code 2)"),
        (130, "stopped (exit code 130)"),
        (-9, "ended by SIGKILL"),
    ],
)
def test_exit_codes_in_words(code, words):
    assert outcome(code) == words


def test_the_command_schedules_real_runs_and_says_what_came_of_them(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kind: preference\nsource: gone.jsonl\nmodels: {reference: gone}\nscores: [ranking_gap]\n")
    command = [sys.executable, "-m", "curate", "schedule", str(recipe), "--cron", "0 2 1 1 *", "--now"]
    with (tmp_path / "said").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "200"}
        )
    try:
        wait_for(lambda: "next run" in said(tmp_path) or process.poll() is not None, "the run's outcome")
        assert process.poll() is None, said(tmp_path)
        assert stop(process) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert "gone.jsonl" in said(tmp_path)  # the child's own message
    assert "(exit code 1)" in said(tmp_path) or "(exit code 2)" in said(tmp_path)


def test_a_source_that_grew_is_measured_only_where_it_is_new(tmp_path):
    """A real run, as the clock makes it, after one by hand; each leaves its version and outcome in the store."""
    from tests.tiny_models import make_llama

    make_llama(tmp_path / "model", seed=1)
    pairs = [f'{{"prompt": "add {a}.", "chosen": " it is {a}.", "rejected": " no."}}\n' for a in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(pairs[:6]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "kind: preference\nsource: pairs.jsonl\nmodels: {reference: model}\nscores: [ranking_gap]\nselect: {}\n"
    )
    lines: list[str] = []
    command = [sys.executable, "-m", "curate", "run", str(recipe), "--quiet"]
    runs = Runs(command, name="recipe.yaml", lock=lock_file(tmp_path / "store", recipe), say=lines.append)
    curate.run(recipe, progress=Progress(quiet=True))
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write("".join(pairs[6:]))
    assert runs() == 0
    store = curate.Store(tmp_path / "store")
    rows = store.sql("SELECT version, outcome, counts FROM runs ORDER BY started").rows()
    assert [row[:2] for row in rows] == [(curate.__version__, "done")] * 2
    measured = [json.loads(counts)["measured"]["forward"] for _, _, counts in rows]
    assert measured == [6, 3]
    assert store.sql("SELECT count(ranking_gap) AS n FROM scored").item() == 9
