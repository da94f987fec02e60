"""An engine in a process of its own: its memory comes back when it ends, and a hang can be ended.

The parent calls, the child answers, one at a time, over a socket pair of their own: pickled tuples, framed by
`multiprocessing.connection`. The child's stdout and stderr go to a file that only the parent's errors quote, so nothing an engine prints
can disturb the conversation. The child watches its stdin, which the parent holds open: when the parent dies, however, it ends too.
`subprocess` and not `multiprocessing`'s spawn, which would run a user's script a second time when it has no `__main__` guard.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from curate.errors import EngineError

TAIL_LINES = 12


class ChildFailure(EngineError):
    """The child answered with an error; it is still alive. `kind` is the exception's class name there."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class EngineProcess:
    """A child running `python -m module`, whose main is `serve(open_engine)`.

    call() raises EngineError when the child died (with the last lines it printed) or did not answer in time (it is then killed), and
    ChildFailure when it answered with an error. KeyboardInterrupt and every other exception in the parent end the child.
    """

    def __init__(self, module: str, *, environment: dict[str, str], label: str):
        self.label = label
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        root = str(Path(__file__).resolve().parents[3])
        paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # its own process group: what it starts can be ended with it
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._connection.closed and self._process.poll() is None

    def call(self, method: str, *, timeout: float, **arguments: Any) -> Any:
        """The child's answer to `method(**arguments)`. `timeout` in seconds."""
        if self._connection.closed:
            raise EngineError(f"{self.label} has ended; open it again.")
        try:
            self._connection.send((method, arguments))
            deadline = time.monotonic() + timeout
            while not self._connection.poll(min(1.0, max(deadline - time.monotonic(), 0))):
                if self._process.poll() is not None and not self._connection.poll(0):
                    raise EOFError
                if time.monotonic() >= deadline:
                    raise EngineError(
                        f"{self.label} did not answer `{method}` within {timeout:.0f} s and was ended. What is measured is kept: run the "
                        f"same command again; smaller shards or `--set engine.sampler=transformers` avoid it.{self._tail()}"
                    )
            status, *answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise EngineError(self._obituary(method)) from error
        except BaseException:
            self.kill()
            raise
        if status == "error":
            raise ChildFailure(*answer)
        return answer[0]

    def _obituary(self, method: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        tail = self._tail()
        self.kill()
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
            how += " (when nobody sent it: the machine ran out of memory)" if code == -signal.SIGKILL else ""
        else:
            how = f"ended with exit code {code}"
        return f"{self.label} {how} during `{method}`. What is measured is kept: run the same command again.{tail}"

    def _tail(self) -> str:
        if self._log.closed:
            return ""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._log.tell() - 20_000, 0))
        lines = [line for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return "".join(f"\n    {line}" for line in ["Its last lines:", *lines[-TAIL_LINES:]]) if lines else ""

    def close(self, *, patience: float = 10.0) -> None:
        """Ask the child to end, and end it if it does not within `patience` seconds."""
        if self.alive:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._connection.send(("close", {}))
                self._process.wait(patience)
        self.kill()

    def kill(self) -> None:
        """End the child and everything it started, now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        if self._process.stdin:
            self._process.stdin.close()
        self._log.close()


def serve(open_engine: Callable[..., Any]) -> None:
    """The child's main: the first call is `open`, with open_engine's arguments; every later one a public method of what it returned."""
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)  # a grandchild that kept it would hide our death from the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    engine: Any = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            break
        if method == "close":
            break
        try:
            if method == "open":
                engine = open_engine(**arguments)
                answer = engine.about()
            else:
                answer = getattr(engine, method)(**arguments)
        except Exception as error:
            import traceback

            traceback.print_exc()
            connection.send(("error", type(error).__name__, _with_causes(error)))
        else:
            connection.send(("ok", answer))
    os._exit(0)  # engines hang in their own clean-up; the memory comes back without it


def _with_causes(error: BaseException) -> str:
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(parts) < 4:
        parts.append(str(seen).strip())
        seen = seen.__cause__ or seen.__context__
    return " | ".join(dict.fromkeys(part for part in parts if part))


def _end_with_parent(parent: int) -> None:
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 2.0)
        if (ready and not os.read(sys.stdin.fileno(), 1)) or os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
