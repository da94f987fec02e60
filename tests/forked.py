"""Processes for tests that need one of their own: forked from a process that has imported what a run needs, once a session and not once a test.

Importing torch and transformers costs a process 6 s of processor time, so `subprocess` is for tests of what a fresh process imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

NEEDED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "polars",
    "pyarrow.parquet",
    "curate.workflow.run",
    "curate.cli",
]
REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = "from curate.cli import main; main()"

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(NEEDED)  # what is missing there is imported by each process


class Ended(NamedTuple):
    """As `subprocess.run` gives it back. -9: it was killed."""

    returncode: int | None
    stdout: str
    stderr: str


def run(
    code: str | Path, *arguments: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Ended:
    """Python code, or a script, as `python` would run it with these arguments, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "out", Path(folder) / "err"]
        process = start(code, *arguments, files=files, cwd=cwd, environment=environment)
        process.join()
        return Ended(process.exitcode, *(file.read_text("utf-8") for file in files))


def curate(*arguments: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> Ended:
    """A command of curate, in a process of its own."""
    return run(COMMAND, *arguments, cwd=cwd, environment=environment)


def start(
    code: str | Path,
    *arguments: object,
    files: list[Path],
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
):
    """The process of `run`, started; its stdout and stderr go to these files."""
    for file in files:
        file.touch()
    words = list(map(str, arguments))
    process = context.Process(target=_as_main, args=(code, words, files, cwd or REPOSITORY, dict(environment or {})))
    process.start()
    return process


def exit_code(target: Callable[..., None], *args: object, said: Path) -> int | None:
    """Of a process that calls target(*args); what it prints goes to the file `said`. -9: it was killed."""
    said.touch()
    process = context.Process(target=_printing_to, args=([said, said], target, *args))
    process.start()
    process.join()
    return process.exitcode


def _as_main(
    code: str | Path, arguments: list[str], files: list[Path], cwd: Path, environment: Mapping[str, str]
) -> None:
    name = str(code) if isinstance(code, Path) else "-c"
    text = code.read_text("utf-8") if isinstance(code, Path) else code
    os.chdir(cwd)
    os.environ.update(environment)
    tempfile.tempdir = None  # of this environment
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(code.parent) if isinstance(code, Path) else "")
    _printing_to(files, exec, compile(text, name, "exec"), {"__name__": "__main__", "__file__": name})


def _printing_to(files: list[Path], target: Callable[..., object], *args: object) -> None:
    for stream, path in zip((1, 2), files, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    try:
        target(*args)
    except SystemExit:
        raise
    except BaseException:  # as `python` ends, not as multiprocessing tells it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
