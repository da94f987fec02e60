"""The command line: one command per step, each a few lines over the function that does it.

Results go to stdout (`--json` for machines), everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong use or recipe, 130 stopped (143 by
SIGTERM).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from curate.cli.asking import check, diff, explain, scores, sql, status, summary
from curate.cli.importing import forget, import_
from curate.cli.quiet import hush
from curate.cli.running import STEPS, demo, doctor, init, plan, schedule, validate
from curate.console import STOPPED, TERMINATED, out, told
from curate.errors import CurateError, disk_trouble, without_secrets

app = typer.Typer(
    help="Which fine-tuning examples are worth training on, from how a model learns them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: dict[str, Callable[..., None]] = {  # in the order of `curate --help`
    "demo": demo,
    "init": init,
    "doctor": doctor,
    "validate": validate,
    "plan": plan,
    **STEPS,
    "import": import_,
    "forget": forget,
    "scores": scores,
    "explain": explain,
    "summary": summary,
    "status": status,
    "check": check,
    "sql": sql,
    "diff": diff,
    "schedule": schedule,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """The command `curate`: errors that a user can cause are one message and an exit code, never a traceback."""
    hush()
    terminated = _stopping_on_sigterm()
    try:
        app()
    except (CurateError, KeyboardInterrupt) as error:
        code = told(error)
        sys.exit(TERMINATED if terminated and code == STOPPED else code)
    except SystemExit as leaving:
        if leaving.code == STOPPED:  # typer's own answer to Ctrl-C, which says nothing
            told(KeyboardInterrupt())
            sys.exit(TERMINATED if terminated else STOPPED)
        raise
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        if (full := disk_trouble(error)) is not None:
            sys.exit(told(full))
        print(without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        print(
            "This is a bug in curate: nothing that was measured is lost. Please report the lines above.",
            file=sys.stderr,
        )
        sys.exit(1)


def _stopping_on_sigterm() -> list[int]:
    """From now on SIGTERM, which systemd and Kubernetes send, stops as Ctrl-C does: outcome noted, what is finished kept. Holds it when it came."""
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)
    return came


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        import curate

        out(curate.__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
