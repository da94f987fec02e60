"""The commands that ask: what scores there are, what a store holds and says. They change nothing, except `check --repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curate.cli.arguments import (
    Json,
    OfRecipe,
    OfSource,
    Quiet,
    StorePath,
    open_store,
    progress_of,
)
from curate.console import out, table, to_json
from curate.errors import UsageError


def scores(
    name: Annotated[str | None, typer.Argument(metavar="[SCORE]", help="only this one, in full")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Every score, in plain words.

    What a high value means, which end is bad, unit, cost. Of one: also what it needs, its settings, the paper it is from.
    """
    from curate.report.describe import describe_score, score_json, score_list
    from curate.scores import SCORES, resolve

    chosen = [resolve(name)] if name else [SCORES[key] for key in sorted(SCORES, key=lambda k: (SCORES[k].kind, k))]
    if json:
        out(to_json([score_json(s) for s in chosen]))
    elif name:
        out(describe_score(chosen[0]))
    else:
        out(score_list(chosen))


def explain(
    store: StorePath,
    row: Annotated[
        str, typer.Argument(metavar="ROW", help="a row's id or its first digits, or source#row (from 1: pairs.jsonl#3)")
    ],
    selection: Annotated[str | None, typer.Option(help="the selection that is asked about (default: the last)")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="all of the row's sampled answers, in full; else a few of the last checkpoint")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Why this row scored and was kept or dropped as it was."""
    from curate.report.explain import explain_row

    result = explain_row(open_store(store), row, selection, every_answer=every)
    out(to_json(result.to_json()) if json else result.text())


def summary(
    store: StorePath,
    recipe: OfRecipe = None,
    between: Annotated[
        str | None,
        typer.Option(metavar="STEP,STEP", help="the two checkpoints of the flip table (default: first, last)"),
    ] = None,
    data_map: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw the data map, confidence over variability, as SVG")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="list the idealised ranking accuracies one by one")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What holds of the whole set: rankings, accuracies, flips.

    With 95% intervals: ranking accuracies, pre-memorization accuracy per run and checkpoint, its calibration against held-out accuracy, flips.
    """
    from curate.report.summary import summarise

    steps = between.split(",") if between else []
    if between and not (len(steps) == 2 and all(s.strip().isdigit() for s in steps)):
        raise UsageError(f"--between {between}: expected two steps, such as --between 0,400.")
    result = summarise(open_store(store), recipe=recipe, between=(int(steps[0]), int(steps[1])) if steps else None)
    if data_map is not None:
        from curate.report.data_map import data_maps, write_maps

        write_maps(data_maps(open_store(store), recipe=recipe), data_map)
        progress_of(quiet).say(f"The data map is in {data_map}.")
    out(to_json(result.to_json()) if json else result.text(everything=everything))


def status(store: StorePath, json: Json = False, quiet: Quiet = False) -> None:
    """What a store holds, and what ran on it."""
    from curate.report.describe import store_status

    result = store_status(open_store(store))
    out(to_json(result.to_json()) if json else result.text())


def check(
    store: StorePath,
    repair: Annotated[
        bool, typer.Option("--repair", help="set aside what is damaged, and make it again from what is whole")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a store whole: is everything in it what was written there? Exit 1 if not.

    Checksums of shards, every table of the database, and whether the two hold the same values.
    """
    from curate.report.checked import checked_text
    from curate.store.checking import check as read_whole

    checked = read_whole(store, repair=repair, say=progress_of(quiet).say)
    out(to_json(checked) if json else checked_text(checked))
    if checked.unmended:
        raise typer.Exit(1)


def sql(
    store: StorePath,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="e.g. SELECT row_id, ches_ln FROM scored ORDER BY 2 DESC LIMIT 10")
    ],
    recipe: OfRecipe = None,
    source: OfSource = None,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    quiet: Quiet = False,
) -> None:
    """Ask the store, in SQL.

    Views: rows, scored, trajectories, samples, occurrences, dataset_values, runs, selections.

    The table for people cuts long texts short; --json and --csv give them whole.
    """
    from curate.store.query import csv_text

    opened = open_store(store)
    frame = opened.sql(query, recipe=recipe, source=source)
    for note in opened.unclear_names(query, recipe=recipe):
        progress_of(quiet).say(f"Note: {note}")
    if json:
        out(to_json(frame.to_dicts()))
    elif csv:
        out(csv_text(frame).rstrip("\n"))
    else:
        out(table(frame.rows(), head=frame.columns, longest=60, whole=True) if frame.columns else "")


def diff(
    store: StorePath,
    a: Annotated[str, typer.Argument(metavar="A", help="a selection (a recipe's name)")],
    b: Annotated[str, typer.Argument(metavar="B", help="another")],
    rows: Annotated[int, typer.Option(min=0, help="how many rows of each side to show")] = 5,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two selections: rows that both keep, that one keeps only, and which rule of the other dropped those."""
    from curate.report.diff import compare

    result = compare(open_store(store), a, b, rows=rows)
    out(to_json(result.to_json()) if json else result.text())
