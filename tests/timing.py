"""Seconds per test file, at the end of `make test` (loaded with `-p tests.timing`)."""

from __future__ import annotations

from collections import defaultdict

seconds: defaultdict[str, float] = defaultdict(float)
tests: defaultdict[str, int] = defaultdict(int)


def pytest_runtest_logreport(report):
    file = report.nodeid.split("::")[0]
    seconds[file] += report.duration
    tests[file] += report.when == "call"


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("seconds per file")
    for file in sorted(seconds, key=seconds.__getitem__, reverse=True):
        terminalreporter.write_line(f"{seconds[file]:8.1f} s  {tests[file]:4d} tests  {file}")
    terminalreporter.write_line(f"{sum(seconds.values()):8.1f} s  {sum(tests.values()):4d} tests")
