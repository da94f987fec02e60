"""Rounds of collecting: train, measure, collect rows like the ones that are not solved yet, again (Algorithm 1).

    round t:  data_t -> train -> checkpoints -> premem_accuracy, fluent -> hard rows -> rows like them -> data_{t+1} = data_t + new rows

After the last round a training on everything is measured as well, so that the table says what the last rows brought. Hard are the rows
that the recipe's `select:` keeps and that were not fluent from the start: a fluent row's 0 says nothing about it.

Every step leaves a file when it is done, and a stopped job goes on after the last one:

    out/rounds.json                  what was asked; another question in the same folder is refused, and a second process (rounds.lock)
    out/store/                       measurements; rows measured in one round keep theirs
    out/round-t/data.jsonl           what round t trains on        out/runs/round-t/checkpoint-*
    out/round-t/trained              the training ended            out/round-t/measured.json, hard.jsonl, collected.json, new.jsonl

Source: Kang et al. 2024, arXiv:2411.07681, Algorithm 1.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.console import Progress
from curate.data.sections import open_rows
from curate.errors import CurateError, UsageError
from curate.jobs.collect.pick import Candidate
from curate.models.checkpoints import Checkpoint, find_checkpoints
from curate.models.fingerprints import FingerprintCache
from curate.passes.files import write_atomically
from curate.passes.loading.own_code import allowing_own_code
from curate.recipe.bounds import own_object
from curate.recipe.load import Loaded, load_recipe
from curate.recipe.sources import Source
from curate.rows import Example
from curate.store.locks import locked

LAST_VALUES = """
    SELECT name, value FROM dataset_values WHERE name IN ('accuracy', 'premem_accuracy', 'heldout_accuracy')
    AND step = (SELECT max(step) FROM dataset_values WHERE checkpoint IS NOT NULL)
"""
HARD = """
    SELECT row_id, fluent FROM selections JOIN scored USING (row_id) WHERE selection = ? AND kept ORDER BY row_id
"""

RULES, LOCK = "rounds.json", "rounds.lock"


@dataclass(frozen=True)
class Round:
    """What a collector is given. hard: the rows whose like is wanted; known: what may not come again; checkpoint: the run's last one."""

    number: int
    hard: list[Candidate]
    known: list[Example]
    checkpoint: Checkpoint
    loaded: Loaded
    take: int
    seed: int


Train = Callable[[Path, Path, int], None]  # (data.jsonl, the run's folder, round): writes checkpoint-<step>/ folders
Collect = Callable[[Round], tuple[list[Candidate], dict[str, int]]]  # new rows, and what was left out by reason


def grow(
    recipe: str | Path,
    *,
    out: Path,
    rounds: int,
    take: int,
    train: Train,
    collect: Collect,
    asked: dict[str, Any],
    overrides: list[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run the rounds, or what is left of them. One dict a training: round, rows, train, premem, heldout (None where there is none), picked,
    fluent, undecided, hard, and where rows were collected after it: collected, left_out.

    asked: what makes this job another job (the pool, how rows are picked, the trainer): kept, and compared when the job goes on. `rounds`
    may be raised later. A round without hard rows is the last. Raises UsageError for a recipe without `premem_accuracy`, `fluent` or
    `select:`, and CurateError from the steps, or naming the process where another one runs rounds in this folder.
    """
    progress = progress or Progress(quiet=True)
    loaded = load_recipe(recipe, set=overrides)
    _check(loaded, recipe, rounds, take)
    with _alone(out):
        _claim(out, {"recipe": loaded.text, "take": take, "seed": seed, **asked})
        lines = []
        for number in range(1, rounds + 2):
            folder = out / f"round-{number}"
            if number == 1 and not (folder / "data.jsonl").is_file():
                _write_rows(folder / "data.jsonl", read_rows(loaded, loaded.recipe.source, "source"))
            run = out / "runs" / folder.name
            if not (folder / "trained").is_file():
                shutil.rmtree(run, ignore_errors=True)
                progress.say(f"round {number}: training on {folder / 'data.jsonl'}")
                train(folder / "data.jsonl", run, number)
                (folder / "trained").touch()
            if not (folder / "measured.json").is_file():
                progress.say(f"round {number}: measuring {run}")
                _measure(recipe, overrides, folder, run, out / "store", progress)
            line = {"round": number, **own_object(folder / "measured.json")}
            lines.append(line)
            if number == rounds + 1 or not line["hard"]:
                break
            if not (folder / "collected.json").is_file():
                with allowing_own_code(loaded.recipe.models.trust_remote_code):
                    _collect(loaded, folder, run, out / f"round-{number + 1}", number, take, seed, collect)
            line |= own_object(folder / "collected.json")
            progress.say(f"round {number}: {line['hard']:,} hard rows, {line['collected']:,} like them collected")
            if not line["collected"]:
                break
        _write(out / "summary.json", json.dumps(lines, indent=2) + "\n")
        return lines


def _check(loaded: Loaded, recipe: str | Path, rounds: int, take: int) -> None:
    if rounds < 1 or take < 1:
        raise UsageError(f"rounds and take: wanted at least 1 of each, found {rounds} and {take}.")
    missing = [n for n in ("premem_accuracy", "fluent") if n not in {needs.name for needs in loaded.recipe.scores}]
    if missing or loaded.recipe.select is None or loaded.recipe.source is None:
        needs = (
            f"`{missing[0]}` among the scores"
            if missing
            else f"a `{'source' if loaded.recipe.source is None else 'select'}:` section"
        )
        raise UsageError(f"{recipe}: rounds need {needs}. `curate init sft` writes a recipe that has it.")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The rounds' folder, made where there is none, for this process alone. UsageError where it is something else's."""
    inside = (
        {path.name for path in out.iterdir() if not path.name.startswith(f".{RULES}.")} - {LOCK}
        if out.is_dir()
        else set()
    )
    if (inside and RULES not in inside) or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: is not empty, and not a folder of rounds. Name another one.")
    out.mkdir(parents=True, exist_ok=True)

    def taken(holder: str) -> CurateError:
        return CurateError(
            f"{out}: process {holder} runs rounds in this folder, or a trainer that it left behind does. Wait for it, or name another folder."
        )

    with locked(out / LOCK, taken, inherited=True):
        yield


def _claim(out: Path, asked: dict[str, Any]) -> None:
    """The folder is this job's. UsageError where it is another's."""
    mark = out / RULES
    if mark.is_file():
        before = own_object(mark)
        other = [key for key in asked | before if asked.get(key) != before.get(key)]
        if other:
            raise UsageError(
                f"{out}: holds rounds that were asked for differently ({', '.join(other)}). Name another folder, or delete this one."
            )
        return
    _write(mark, json.dumps(asked, indent=2) + "\n")


def _measure(
    recipe: str | Path, overrides: list[str] | None, folder: Path, run: Path, store: Path, progress: Progress
) -> None:
    """The recipe over this round's rows and checkpoints; its numbers and hard rows into the round's folder."""
    from curate.workflow import run as workflow

    data, asked = folder / "data.jsonl", load_recipe(recipe, set=overrides).recipe
    source = {"path": str(data.resolve()), "format": "prompt_completion"}
    sections = {"heldout": asked.heldout, **{f"targets.{name}": target for name, target in asked.targets.items()}}
    kept = [
        f"{key}={rows.model_dump_json()}" for key, rows in sections.items() if rows
    ]  # as the recipe's own source says
    given = [f"source={json.dumps(source)}", *kept, f"models.checkpoints={json.dumps(str(run.resolve()))}"]
    result = workflow.run(recipe, set=[*(overrides or []), *given, "export=null"], store=store, progress=progress)
    assert result.selection is not None
    picked = result.store.sql(HARD, [result.selection.name], recipe=result.recipe)
    flags = picked["fluent"].to_list()
    hard = {row_id for row_id, fluent in zip(picked["row_id"].to_list(), flags, strict=True) if fluent == 0}
    values = dict(result.store.sql(LAST_VALUES, recipe=result.recipe).iter_rows())
    rows = _read_rows(data)
    first = {row.row.row_id: row for row in rows if row.row.row_id in hard}  # once each, however often it occurs
    _write_rows(folder / "hard.jsonl", list(first.values()))
    measured = {
        "rows": len(rows),
        "train": values.get("accuracy"),
        "premem": values.get("premem_accuracy"),
        "heldout": values.get("heldout_accuracy"),
        "picked": len(picked),
        "fluent": sum(flag == 1 for flag in flags),
        "undecided": sum(flag is None for flag in flags),
        "hard": len(first),
    }
    _write(folder / "measured.json", json.dumps(measured) + "\n")


def _collect(
    loaded: Loaded, folder: Path, run: Path, following: Path, number: int, take: int, seed: int, collect: Collect
) -> None:
    rows = _read_rows(folder / "data.jsonl")
    heldout = read_rows(loaded, loaded.recipe.heldout, "heldout") if loaded.recipe.heldout is not None else []
    known = [row.row for row in (*rows, *heldout)]
    models, cache = loaded.recipe.models, FingerprintCache(run.parents[1] / "store" / "weights.json")
    skip = (lambda _: None) if models.on_broken_checkpoint == "skip" else None  # measuring has said it
    last = find_checkpoints(str(run.resolve()), loaded.folder, cache, base=models.base, skip=skip)[-1]
    asked = Round(number, _read_rows(folder / "hard.jsonl"), known, last, loaded, take, seed * 1000 + number)
    new, left_out = collect(asked)
    _write_rows(folder / "new.jsonl", new)
    _write_rows(following / "data.jsonl", [*rows, *new])
    _write(folder / "collected.json", json.dumps({"collected": len(new), "left_out": left_out}) + "\n")


# ------------------------------------------------------------------------------------------------ training


def by_command(command: str, **values: Any) -> Train:
    """A trainer as a command line: {data}, {out} and {round} in it are replaced, and whatever `values` names. No shell is between.

    CurateError where it fails, with the end of what it wrote (all of it: `train.log` beside the data).
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"train: {command!r} is no command line: {error}.") from None
    if not any("{data}" in word for word in words) or not any("{out}" in word for word in words):
        raise UsageError(
            f"train: wanted a command with {{data}} and {{out}}, found {command!r}, for example 'python train.py {{data}} {{out}}'."
        )

    def train(data: Path, out: Path, number: int) -> None:
        given = {**values, "data": data.resolve(), "out": out.resolve(), "round": number}
        filled = list(words)
        for name, value in given.items():
            filled = [word.replace(f"{{{name}}}", str(value)) for word in filled]
        log = data.with_name("train.log")
        try:
            with log.open("w", encoding="utf-8") as to:
                # with the lock: where we are killed, who goes on must not train beside it
                done = subprocess.run(filled, stdout=to, stderr=subprocess.STDOUT, check=False, close_fds=False)
        except OSError as error:
            raise UsageError(f"train: {filled[0]} cannot be started: {error.strerror}.") from None
        if done.returncode:
            end = "\n".join(f"    {line}" for line in log.read_text("utf-8", "replace").splitlines()[-8:])
            raise CurateError(f"train: {shlex.join(filled)}\n  ended with exit code {done.returncode} ({log}):\n{end}")

    return train


# ------------------------------------------------------------------------------------------------ files


def read_rows(loaded: Loaded, source: Source | None, setting: str, *, base: Path | None = None) -> list[Candidate]:
    assert source is not None
    reading = open_rows(loaded, source, setting, kind="sft", base=base)
    good = reading.good(
        source.on_bad_row, setting="source" if setting == "pool" else setting, target=str(loaded.path or source.path)
    )
    rows = [Candidate(r.row, r.columns) for r in good if isinstance(r.row, Example)]
    return rows[: source.limit]


def _read_rows(path: Path) -> list[Candidate]:
    from curate.data import read

    if not path.stat().st_size:
        return []
    records = read(path, kind="sft", format="prompt_completion").good()
    return [Candidate(r.row, r.columns) for r in records if isinstance(r.row, Example)]


def _write_rows(path: Path, rows: Sequence[Candidate]) -> None:
    _write(path, "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    """All of it or nothing: a file that is there was finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as new:
        new.write_text(text, encoding="utf-8")
