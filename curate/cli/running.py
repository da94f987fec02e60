"""The commands that start something: the demo, a first recipe, checks, a plan, the steps of a recipe, its schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from curate.cli.arguments import (
    Json,
    Kind,
    Quiet,
    RecipePath,
    Set,
    StoreOption,
    load,
    progress_of,
    split_pair,
)
from curate.console import out, table, to_json
from curate.errors import UsageError


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

    result = run_demo(to, seed=seed, progress=progress_of(quiet))
    out(to_json(result.to_json()) if json else result.text())


def init(
    kind: Annotated[str | None, typer.Argument(metavar="preference|sft|rlvr", help="the kind of rows")] = None,
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
    if kind not in ("preference", "sft", "rlvr"):
        raise UsageError(
            f"curate init takes preference, sft or rlvr; found {kind!r}. Try `curate init preference recipe.yaml`."
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
    message = f"Wrote {file}. Name your data and model in it, then `curate validate {file}` and `curate plan {file}`."
    out(to_json({"kind": kind, "file": file}) if json else message)


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

    columns = dict(split_pair(entry, "--column") for entry in column or [])
    validated = validate_source(
        source, kind=kind, format=format, split=split, columns=columns, set=overrides, store=store
    )
    from curate.report.describe import validation_text  # after the rows: a path that is not there is said at once

    if json:
        others = {name: result for name, result in validated.items() if name != "source"}
        out(to_json({**asdict(validated["source"]), **others}))
    else:
        for result in validated.values():
            shown = result.defects if limit == 0 else result.defects[:limit]
            for defect in shown:
                out(str(defect))
            if len(result.defects) > len(shown):
                out(f"… and {len(result.defects) - len(shown):,} more (--limit 0 prints all)")
            out(validation_text(result))
    if any(result.defects for result in validated.values()):
        raise typer.Exit(1)


def plan(
    recipe: RecipePath, overrides: Set = None, store: StoreOption = None, json: Json = False, quiet: Quiet = False
) -> None:
    """What a run would measure, and about how long that takes.

    Passes × checkpoints × rows still missing, tokens, estimated time. No model is run.
    """
    from curate.workflow.run import make_plan

    result = make_plan(load(recipe, overrides, store), progress=progress_of(quiet))
    out(to_json(result.to_json()) if json else result.text())


def step(name: str, steps: tuple[str, ...], text: str) -> Callable[..., None]:
    """A command that runs some steps of a recipe. text: its line in `curate --help`."""

    def command(
        recipe: RecipePath, overrides: Set = None, store: StoreOption = None, json: Json = False, quiet: Quiet = False
    ) -> None:
        from curate.workflow.run import run_steps

        result = run_steps(load(recipe, overrides, store), steps, progress=progress_of(quiet), command=name)
        out(to_json(result.to_json()) if json else result.text())

    command.__doc__ = text
    return command


STEPS = {
    "run": step(
        "run",
        ("measure", "score", "select", "export"),
        "All of it: measure, score, select, export. Safe to stop and start again.",
    ),
    "measure": step("measure", ("measure",), "Run the passes that the scores need, for what is missing."),
    "score": step("score", ("score",), "Compute the recipe's scores from what is measured. No model is run."),
    "select": step("select", ("select",), "Decide which rows are kept, with a reason for every dropped one."),
    "export": step("export", ("export",), "Write the kept rows as a dataset that trainers take as it is."),
}


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

    requested_scores(load(recipe, overrides, store))  # a wrong recipe is said now, not tonight
    extra = [arg for entry in overrides or [] for arg in ("--set", entry)]
    extra += ["--store", str(store)] if store else []
    extra += ["--quiet"] if quiet else []
    events = (lambda event: out(to_json(event, indent=None))) if json else None
    start(recipe, cron=cron, extra_args=extra, run_now=run_now, events=events)
