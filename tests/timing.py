"""Seconds per test file, at the end of `make test` (loaded with `-p tests.timing`); and the longest files first, so that two workers end together.

Processor time, of the processes that a test starts too, stands beside the clock's: on a shared machine only that can be compared with another day's.
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

LONGEST = (
    "test_sampling_line",
    "test_select_sql",
    "test_cpu_kernels",
    "test_servers",
    "test_anew",
    "test_whole",
    "test_recorder",
    "test_sample_vllm",
    "test_schedule",
    "test_cli",
    "test_line",
    "test_directions",
)

seconds: defaultdict[str, float] = defaultdict(float)
processor: defaultdict[str, float] = defaultdict(float)
tests: defaultdict[str, int] = defaultdict(int)
slowest: dict[str, float] = defaultdict(float)
_before = 0.0


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    global _before
    report = yield
    used = sum(os.times()[:4])
    report.processor = used - _before if _before else 0.0
    _before = used
    return report


def pytest_runtest_logreport(report):
    file = report.nodeid.split("::")[0]
    seconds[file] += report.duration
    processor[file] += getattr(report, "processor", 0.0)
    slowest[report.nodeid] += getattr(report, "processor", 0.0)
    tests[file] += report.when == "call"


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("seconds per file: clock, processor")

    def line(clock: float, used: float, n: int, name: str) -> None:
        terminalreporter.write_line(f"{clock:8.1f} s {used:8.1f} s  {n:4d} tests  {name}")

    for file in sorted(seconds, key=processor.__getitem__, reverse=True):
        line(seconds[file], processor[file], tests[file], file)
    line(sum(seconds.values()), sum(processor.values()), sum(tests.values()), "")
    terminalreporter.section("the tests that take most of the processor")
    for test in sorted(slowest, key=slowest.__getitem__, reverse=True)[:25]:
        terminalreporter.write_line(f"{slowest[test]:8.1f} s  {test}")
