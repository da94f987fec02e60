"""What a graph keeps apart, and the heap's holes."""

import os
from pathlib import Path

import pytest
import torch

from curate.passes.gradients import graph_memory


@pytest.mark.skipif(graph_memory._malloc_trim() is None, reason="not glibc's allocator")
def test_holes_between_what_is_kept_are_given_back():
    parts = [torch.ones(25_000) for _ in range(400)]  # 100 kB each: below what the allocator maps by itself
    parts = parts[::2]
    before = resident()
    graph_memory.give_back()
    assert before - resident() > 0.5 * 200 * 100_000
    assert all(bool((part == 1).all()) for part in parts)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
