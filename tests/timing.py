"""Seconds per test file, at the end of `make test` (loaded with `-p tests.timing`); and the longest files first, so that two workers end together."""

from __future__ import annotations

from collections import defaultdict

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
tests: defaultdict[str, int] = defaultdict(int)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_runtest_logreport(report):
    file = report.nodeid.split("::")[0]
    seconds[file] += report.duration
    tests[file] += report.when == "call"


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("seconds per file")
    for file in sorted(seconds, key=seconds.__getitem__, reverse=True):
        terminalreporter.write_line(f"{seconds[file]:8.1f} s  {tests[file]:4d} tests  {file}")
    terminalreporter.write_line(f"{sum(seconds.values()):8.1f} s  {sum(tests.values()):4d} tests")
