"""Mathematical equality of two answers through math-verify, in a child process with a deadline.

math-verify ends a long comparison with SIGALRM: that fails outside the main thread, and cannot interrupt one huge integer power
(9^9^9^9, which models do write). A child has a main thread of its own, a memory limit, and can be ended.
Run as a program, this file is that child: a JSON line [reference, given] in, `true` or `false` out.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import weakref

from curate.errors import CurateError

START = 120.0  # seconds that importing sympy may take on a busy machine
MEMORY = 4 << 30  # bytes of address space for the child


def version() -> str:
    """The installed math-verify's."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("math-verify")
    except PackageNotFoundError:
        raise CurateError("grader math needs math-verify, which is not installed: `pip install math-verify`.") from None


class MathEquality:
    """Whether two answers (LaTeX or plain) are mathematically equal. Callable from any thread; one comparison at a time.

    timeout: seconds for one comparison; one that takes longer counts as unequal, and is counted in `timed_out`.
    """

    def __init__(self, *, timeout: float):
        self.timeout = timeout
        self.timed_out = 0
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, str], bool] = {}
        _OPEN.add(self)

    def __call__(self, reference: str, given: str) -> bool:
        key = (reference, given)
        with self._lock:
            if key not in self._known:
                if len(self._known) > 100_000:
                    self._known.clear()
                self._known[key] = self._ask(key)
            return self._known[key]

    def close(self) -> None:
        """End the child. The next comparison starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _ask(self, pair: tuple[str, str]) -> bool:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._start()
        try:
            self._write(json.dumps(pair).encode() + b"\n")
            line = self._read(
                2 * self.timeout + 1
            )  # the child's own alarm ends parse and verify first, each within timeout
        except BrokenPipeError:
            line = b""
        if line is None:
            self.timed_out += 1
        if not line:  # too long, or the child died of this pair (out of memory): either way they were not found equal
            self.close()
            return False
        return bool(json.loads(line))

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "curate.measurements.grading_math", str(self.timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        if not self._read(START):
            self.close()
            raise CurateError(
                "grader math: the process that compares answers did not start; try `python -m curate.measurements.grading_math 5`."
            )

    def _write(self, data: bytes) -> None:
        assert self._child is not None and self._child.stdin is not None
        self._child.stdin.write(data)
        self._child.stdin.flush()

    def _read(self, seconds: float) -> bytes | None:
        """One line; None when it does not come in time, b"" when the child is gone."""
        assert self._child is not None and self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], seconds)
        return self._child.stdout.readline() if ready else None


_OPEN: weakref.WeakSet[MathEquality] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for equality in list(_OPEN):
        equality.close()


def equal(reference: str, given: str, *, timeout: float) -> bool:
    """math-verify's verdict, in this process; its alarm needs the main thread."""
    from math_verify import parse, verify

    seconds = max(1, round(timeout))
    gold = parse(_as_latex(reference), parsing_timeout=seconds)
    target = parse(_as_latex(given), parsing_timeout=seconds)
    if not gold or not target:
        return False
    return bool(verify(gold, target, timeout_seconds=seconds))


def _as_latex(answer: str) -> str:
    """math-verify reads LaTeX only inside an environment."""
    return answer if "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer else f"${answer}$"


def _serve() -> None:
    """The child: answers until its standard input ends, which it does when the parent dies."""
    timeout = float(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing that a library prints can get between the answers
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal(
        "(x+1)^2", "x^2+2x+1", timeout=START
    )  # imports, sympy's later ones too: no comparison's own time is spent on them
    answers.write(b"true\n")
    for line in sys.stdin.buffer:
        try:
            reference, given = json.loads(line)
            verdict = equal(reference, given, timeout=timeout)
        except (Exception, MemoryError):
            verdict = False
        answers.write(b"true\n" if verdict else b"false\n")


if __name__ == "__main__":
    _serve()
