"""Processes for tests that kill one: forked from a process that has imported what a run needs, once a session and not once a test."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

NEEDED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "polars",
    "pyarrow.parquet",
    "curate.workflow.run",
    "curate.cli",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(NEEDED)  # what is missing there is imported by each process


def exit_code(target: Callable[..., None], *args: object, said: Path) -> int | None:
    """Of a process that calls target(*args); what it prints goes to the file `said`. -9: it was killed."""
    said.touch()
    process = context.Process(target=_printing_to, args=(said, target, *args))
    process.start()
    process.join()
    return process.exitcode


def _printing_to(said: Path, target: Callable[..., None], *args: object) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    target(*args)
