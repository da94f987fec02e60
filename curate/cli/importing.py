"""The commands that take in what was measured elsewhere, and take it back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from curate.cli.arguments import (
    Json,
    Quiet,
    StorePath,
    progress_of,
    split_pairs,
)
from curate.console import out, to_json
from curate.errors import UsageError


def import_(
    store: StorePath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="parquet, csv, jsonl(.gz)")],
    mapping: Annotated[
        list[str],
        typer.Option(
            "--map",
            metavar="OURS=THEIRS",
            help="row (a number into --source, our row id, source:index), run, checkpoint; correct and samples, perplexity, nll, logp, trained; any "
            "other name is a column of that name. E.g. row=idx run=run checkpoint=step samples=n correct=k",
        ),
    ],
    more: Annotated[list[str] | None, typer.Argument(metavar="OURS=THEIRS…", help="further pairs of --map")] = None,
    source: Annotated[
        str | None, typer.Option(help="the source, as the recipe names it, whose rows are numbered (from 0)")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN|OURS=THEIRS", help="instead of a row: a column that your rows have too, e.g. prompt_id"
        ),
    ] = None,
    new_rows: Annotated[
        bool, typer.Option("--new-rows", help="ids that no row has are rows of their own, without text")
    ] = False,
    worst: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=low|high", help="which end of an imported column is bad, for drop_worst"),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="an imported column is text, though it looks like numbers")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take measurements or scores from elsewhere.

    Without a `row` or --on they are dataset-level values. See docs/importing.md.
    """
    from curate.store import Store
    from curate.store.importing.importing import import_file

    pairs = split_pairs([*mapping, *(more or [])], "--map")
    into: Any = Store(store, on_wait=progress_of(quiet).say) if (store / "curate.duckdb").exists() else store
    ends: Any = split_pairs(worst or [], "--worst")
    result = import_file(into, file, pairs, source=source, on=on, new_rows=new_rows, worst=ends, text=text or [])
    taken_back = f"Import {result.number}: `curate forget {store} --import {result.number}` takes it back."
    out(to_json(result) if json else f"{result}\n{taken_back}")


def forget(
    store: StorePath,
    number: Annotated[int | None, typer.Option("--import", metavar="N", help="the import's number")] = None,
    listing: Annotated[bool, typer.Option("--list", help="list what was imported, with numbers")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take an import back.

    Whole: its values, the rows that only its ids knew, its dataset values.
    """
    from curate.console import counted
    from curate.report.describe import imports_text
    from curate.store import Store

    held = Store(store, on_wait=progress_of(quiet).say)
    if number is None and not listing:
        raise UsageError(f"say which: `curate forget {store} --import N`; `curate forget {store} --list` shows them.")
    if number is not None and listing:
        raise UsageError("--list and --import N are two commands: list first, then forget.")
    if number is None:
        imports = held.imports()
        out(to_json(imports) if json else imports_text(imports))
        return
    forgotten = held.forget_import(number, dry_run=dry_run)
    out(to_json(forgotten) if json else counted(str(forgotten)))
