"""The command line. `main` is the command `curate`."""

from __future__ import annotations

from curate.cli.commands import app, main

__all__ = ["app", "main"]
