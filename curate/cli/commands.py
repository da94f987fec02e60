"""The command line: one command per step, each a few lines over the function that does it.

Results go to stdout (`--json` for machines), everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong use or recipe, 130 stopped.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from curate.cli.quiet import hush
from curate.console import STOPPED, out, table, to_json, told
from curate.errors import CurateError, UsageError, disk_trouble

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store import Store

app = typer.Typer(
    help="Which fine-tuning examples are worth training on, from how a model learns them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML)")]
StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="a store's folder")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="put a value over the recipe's, e.g. select.keep.share=0.5"),
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="the store's folder, over the recipe's")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes: only the result and warnings")]
Kind = Literal["preference", "sft"]
OfRecipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", help="as this recipe measured it (default: the one scored last)"),
]
OfSource = Annotated[str | None, typer.Option("--source", metavar="NAME", help="only rows of this source")]


def main() -> None:
    """The command `curate`: errors that a user can cause are one message and an exit code, never a traceback."""
    hush()
    try:
        app()
    except (CurateError, KeyboardInterrupt) as error:
        sys.exit(told(error))
    except SystemExit as leaving:
        if leaving.code == STOPPED:  # typer's own answer to Ctrl-C, which says nothing
            told(KeyboardInterrupt())
        raise
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        if (full := disk_trouble(error)) is not None:
            sys.exit(told(full))
        traceback.print_exc()
        print(
            "This is a bug in curate: nothing that was measured is lost. Please report the lines above.",
            file=sys.stderr,
        )
        sys.exit(1)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        import curate

        out(curate.__version__)
        raise typer.Exit


@app.command()
def demo(
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="where everything goes")] = Path("curate-demo"),
    seed: Annotated[int, typer.Option(help="another seed, another task and run")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole line on a tiny model, in minutes, without downloads.

    An embedded task, and a model that is trained on the spot.
    """
    from curate.jobs.demo.line import run_demo

    result = run_demo(to, seed=seed, progress=_progress(quiet))
    out(to_json(result.to_json()) if json else result.text())


@app.command()
def init(
    kind: Annotated[str | None, typer.Argument(metavar="preference|sft", help="the kind of rows")] = None,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="where the recipe goes")] = Path("recipe.yaml"),
    schema: Annotated[bool, typer.Option("--schema", help="print the recipe's JSON schema instead")] = False,
    force: Annotated[bool, typer.Option("--force", help="write over an existing file")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a commented starter recipe."""
    from importlib.resources import files

    if schema:
        from curate.recipe.schema import schema as schema_of

        out(to_json(schema_of()))
        return
    if kind not in ("preference", "sft"):
        raise UsageError(
            f"curate init takes preference or sft; found {kind!r}. Try `curate init preference recipe.yaml`."
        )
    if file.exists() and not force:
        raise UsageError(f"{file} exists. Give another name, or write over it with --force.")
    package = files("curate.recipe")
    schema_file = Path(str(package / "recipe.schema.json"))
    text = (
        (package / "starters" / f"{kind}.yaml")
        .read_text()
        .replace("SCHEMA", schema_file.as_uri())
        .replace("FILE", file.name)
    )
    try:
        file.write_text(text)
    except OSError as error:
        raise UsageError(f"{file}: cannot write here ({error.strerror}).") from None
    said = f"Wrote {file}. Name your data and model in it, then `curate validate {file}` and `curate plan {file}`."
    out(to_json({"kind": kind, "file": file}) if json else said)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="also: what can run this model")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What this machine can run: engines, devices, memory, versions. Exit 1 if something needed is missing."""
    from curate.cli.doctor import examine

    findings = examine(model)
    if json:
        out(to_json(findings))
    else:
        out(
            table(
                [(f.state, f.topic, f.text + (f" → {f.hint}" if f.hint else "")) for f in findings],
                head=("state", "what", "found"),
            )
        )
    if any(f.state == "missing" for f in findings):
        raise typer.Exit(1)


@app.command()
def validate(
    source: Annotated[str, typer.Argument(metavar="SOURCE|RECIPE", help="data, or a recipe (.yaml)")],
    kind: Annotated[Kind | None, typer.Option(help="the kind of rows (default: what they look like)")] = None,
    format: Annotated[str, typer.Option(help="the rows' format")] = "auto",
    split: Annotated[str, typer.Option(help="of a hub dataset or a folder; a file has none")] = "train",
    column: Annotated[list[str] | None, typer.Option(metavar="OURS=THEIRS", help="e.g. prompt=question")] = None,
    limit: Annotated[int, typer.Option(help="how many bad rows to print (0: all)")] = 50,
    overrides: Set = None,
    store: StoreOption = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Name every bad row, with file, row, column and what was found. Exit 1 if there is any. Of a recipe: its held-out rows too."""
    from curate.workflow.read import validate_source

    columns = dict(_split(entry, "--column") for entry in column or [])
    found = validate_source(source, kind=kind, format=format, split=split, columns=columns, set=overrides, store=store)
    from curate.report.describe import validation_text  # after the rows: a path that is not there is said at once

    if json:
        others = {name: result for name, result in found.items() if name != "source"}
        out(to_json({**asdict(found["source"]), **others}))
    else:
        for result in found.values():
            shown = result.defects if limit == 0 else result.defects[:limit]
            for defect in shown:
                out(str(defect))
            if len(result.defects) > len(shown):
                out(f"… and {len(result.defects) - len(shown):,} more (--limit 0 prints all)")
            out(validation_text(result))
    if any(result.defects for result in found.values()):
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipePath, overrides: Set = None, store: StoreOption = None, json: Json = False, quiet: Quiet = False
) -> None:
    """What a run would measure, and about how long that takes.

    Passes × checkpoints × rows still missing, tokens, estimated time. No model is run.
    """
    from curate.workflow.run import make_plan

    result = make_plan(_recipe(recipe, overrides, store), progress=_progress(quiet))
    out(to_json(result.to_json()) if json else result.text())


def _step(name: str, steps: tuple[str, ...], text: str) -> None:
    """Add a command that runs some steps of a recipe."""

    def command(
        recipe: RecipePath, overrides: Set = None, store: StoreOption = None, json: Json = False, quiet: Quiet = False
    ) -> None:
        from curate.workflow.run import run_steps

        result = run_steps(_recipe(recipe, overrides, store), steps, progress=_progress(quiet), command=name)
        out(to_json(result.to_json()) if json else result.text())

    command.__doc__ = text
    app.command(name)(command)


_step(
    "run",
    ("measure", "score", "select", "export"),
    "All of it: measure, score, select, export. Safe to stop and start again.",
)
_step("measure", ("measure",), "Run the passes that the scores need, for what is missing.")
_step("score", ("score",), "Compute the recipe's scores from what is measured. No model is run.")
_step("select", ("select",), "Decide which rows are kept, with a reason for every dropped one.")
_step("export", ("export",), "Write the kept rows as a dataset that trainers take as it is.")


@app.command("import")
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

    pairs = _pairs([*mapping, *(more or [])], "--map")
    into: Any = Store(store, on_wait=_progress(quiet).say) if (store / "curate.duckdb").exists() else store
    ends: Any = _pairs(worst or [], "--worst")
    result = import_file(into, file, pairs, source=source, on=on, new_rows=new_rows, worst=ends, text=text or [])
    taken_back = f"Import {result.number}: `curate forget {store} --import {result.number}` takes it back."
    out(to_json(result) if json else f"{result}\n{taken_back}")


@app.command()
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

    held = Store(store, on_wait=_progress(quiet).say)
    if number is None and not listing:
        raise UsageError(f"say which: `curate forget {store} --import N`; `curate forget {store} --list` shows them.")
    if number is not None and listing:
        raise UsageError("--list and --import N are two commands: list first, then forget.")
    if number is None:
        imports = held.imports()
        out(to_json(imports) if json else imports_text(imports))
        return
    found = held.forget_import(number, dry_run=dry_run)
    out(to_json(found) if json else counted(str(found)))


@app.command()
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


@app.command()
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

    result = explain_row(_store(store), row, selection, every_answer=every)
    out(to_json(result.to_json()) if json else result.text())


@app.command()
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
    result = summarise(_store(store), recipe=recipe, between=(int(steps[0]), int(steps[1])) if steps else None)
    if data_map is not None:
        from curate.report.data_map import data_maps, write_maps

        write_maps(data_maps(_store(store), recipe=recipe), data_map)
        _progress(quiet).say(f"The data map is in {data_map}.")
    out(to_json(result.to_json()) if json else result.text(everything=everything))


@app.command()
def status(store: StorePath, json: Json = False, quiet: Quiet = False) -> None:
    """What a store holds, and what ran on it."""
    from curate.report.describe import store_status

    result = store_status(_store(store))
    out(to_json(result.to_json()) if json else result.text())


@app.command()
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

    opened = _store(store)
    frame = opened.sql(query, recipe=recipe, source=source)
    for note in opened.unclear_names(query, recipe=recipe):
        _progress(quiet).say(f"Note: {note}")
    if json:
        out(to_json(frame.to_dicts()))
    elif csv:
        out(csv_text(frame).rstrip("\n"))
    else:
        out(table(frame.rows(), head=frame.columns, longest=60, whole=True) if frame.columns else "")


@app.command()
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

    result = compare(_store(store), a, b, rows=rows)
    out(to_json(result.to_json()) if json else result.text())


@app.command()
def schedule(
    recipe: RecipePath,
    cron: Annotated[str, typer.Option(help='minute hour day month weekday, e.g. "0 2 * * *"')],
    overrides: Set = None,
    store: StoreOption = None,
    run_now: Annotated[bool, typer.Option("--now", help="run once at the start, too")] = False,
    json: Annotated[bool, typer.Option("--json", help="print a JSON object a line: next times, outcomes")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe by the clock, unattended.

    Only what is new is measured, and never are two runs of it at once.
    """
    from curate.cli.schedule import schedule as start
    from curate.plan.requests import requested_scores

    requested_scores(_recipe(recipe, overrides, store))  # a wrong recipe is said now, not tonight
    extra = [arg for entry in overrides or [] for arg in ("--set", entry)]
    extra += ["--store", str(store)] if store else []
    extra += ["--quiet"] if quiet else []
    events = (lambda event: out(to_json(event, indent=None))) if json else None
    start(recipe, cron=cron, extra_args=extra, run_now=run_now, events=events)


def _recipe(path: Path, overrides: list[str] | None, store: Path | None) -> Loaded:
    from curate.recipe.load import load_recipe

    return load_recipe(path, set=overrides, store=store)


def _store(path: Path) -> Store:
    from curate.store import Store

    return Store(path)


def _progress(quiet: bool) -> Any:
    from curate.console import Progress

    return Progress(quiet=quiet)


def _pairs(given: list[str], option: str) -> dict[str, str]:
    """OURS=THEIRS pairs, several in one text where each has its sign (so a column's name may have spaces). UsageError for a name twice."""
    pairs: dict[str, str] = {}
    for text in given:
        pieces = text.split()
        for entry in pieces if all("=" in piece for piece in pieces) else [text]:
            ours, theirs = _split(entry, option)
            if ours in pairs:
                raise UsageError(f"{option}: {ours}= is given twice, {pairs[ours]} and {theirs}. Give it once.")
            pairs[ours] = theirs
    return pairs


def _split(entry: str, option: str) -> tuple[str, str]:
    ours, sign, theirs = entry.partition("=")
    if not sign or not ours or not theirs:
        raise UsageError(f"{option} {entry}: expected ours=theirs, such as {option} prompt=question.")
    return ours, theirs


if __name__ == "__main__":
    main()
