"""What a recipe costs beside its models, by the number of rows: reading, planning, scoring, selecting, exporting, and a run that finds nothing to do.

    python benchmarks/scale.py                                     100,000 and a million rows, half an hour, most of it for the rivals
    python benchmarks/scale.py --rows 100000 1000000 10000000      ten million, too
    python benchmarks/scale.py --rows 1000000 --without datasets   without a rival
    python benchmarks/scale.py --rows 100000 --profile  where the time goes, step by step

The rows are made up: preference pairs with a prompt of about 100 characters, responses of about 200, two columns of the user's own. They go through
curate's own reader. No model is run: what the plan says is missing is written into the store's tables as SQL makes it up, one line a row and
measurement, two in a hundred of them NULL. Every step is a process of its own: CPU seconds (of all its threads), seconds, peak memory (VmHWM, which
a new program begins at nothing; what the system says of a child that ended holds its parent's peak, too).

Beside it `datasets` (batched) and polars select by the same rule from a Parquet file of the same rows with their scores, and write the same
files: the kept rows as a save_to_disk folder and as Parquet, the dropped ones with a reason.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARS_MAX_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

SCORES = ("ranking_gap", "ranking_correct", "flip_loss", "ches_ln", "valley_depth", "squeezed_mass")
WHERE, WORST, SHARE, ORDER = (
    "quality > 0.1 AND chosen_tokens < 500",
    {"ches_ln": 0.05, "valley_depth": 0.05},
    0.9,
    "flip_loss",
)
RULES: dict[str, dict[str, Any]] = {
    "select": {"order_by": f"{ORDER} desc", "keep": {"share": SHARE}},
    "select, 50 groups": {"order_by": f"{ORDER} desc", "keep": {"share": SHARE}, "per": "topic"},
    "select, token budget": {"order_by": f"{ORDER} desc", "keep": {"tokens": 100_000_000}},
}
WORDS = [f"{a}{b}{c}" for a in "bdfklm" for b in "aeiou" for c in "nrst"]


# ---- the rows and what is measured on them --------------------------------------------------------------------------------------------------


def make(folder: Path, rows: int) -> Path:
    """The recipe's folder: rows, a model's configuration, the recipe."""
    import duckdb
    import yaml

    from curate.jobs.demo.model import BASE

    def text(salt: int, words: int) -> str:
        listed = "[" + ", ".join(f"'{word}'" for word in WORDS) + "]"
        return f"array_to_string(list_transform(range({words}), lambda j: ({listed})[(1 + hash(n * 97 + j * {salt}) % {len(WORDS)})::INT]), ' ')"

    duckdb.execute(
        f"COPY (SELECT 'Question ' || n || ': ' || {text(3, 22)} || '?' AS prompt, {text(5, 50)} AS chosen, {text(7, 50)} AS rejected, "
        f"'topic ' || hash(n * 3) % 50 AS topic, (hash(n * 5) % 10000) / 10000 AS quality FROM range({rows}) t(n)) "
        f"TO '{folder / 'pairs.jsonl'}' (FORMAT json)"
    )
    shutil.copytree(BASE, folder / "model")
    recipe = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"reference": "model"},
        "engine": {"device": "cpu"},
        "scores": list(SCORES),
        "select": {"where": WHERE, "drop_worst": WORST, "unknown": "drop", **RULES["select"]},
        "export": {"to": "out", "columns": "scores"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def fill(recipe: Path) -> None:
    """A line for every row under every fingerprint of the plan, values made up."""
    from curate.console import Progress
    from curate.recipe.load import load_recipe
    from curate.store import Store
    from curate.store.sql import quote
    from curate.store.tables import merge, remember, table_of
    from curate.workflow.run import make_plan

    loaded = load_recipe(recipe)
    plan = make_plan(loaded, progress=Progress(quiet=True))
    with Store(loaded.store).database.write() as con:
        for task in [task for step in plan.steps for task in step.tasks]:
            remember(con, task.measured)
            of_tokens = task.measurement.reads == "tokens"
            made_up = {
                name: f"1 + hash(row_id || '{name}') % 600"
                if of_tokens
                else f"CASE WHEN hash(row_id || '{name}?') % 50 > 0 THEN (hash(row_id || '{name}') % 1000000) / 5000 - 200 END"
                for name in task.measurement.columns
            }
            if of_tokens:
                made_up |= {"token_problem": "NULL::VARCHAR", "truncated": "false"}
            columns = ", ".join(f"{value} AS {quote(name)}" for name, value in made_up.items())
            made = f"SELECT '{task.fingerprint}' AS fingerprint, row_id, {columns} FROM data.rows"
            con.execute(f"CREATE OR REPLACE TEMP TABLE incoming AS {made}")
            merge(con, table_of(task.measurement.name), "incoming")
            con.execute("DROP TABLE incoming")


# ---- the steps, each in a process of its own ------------------------------------------------------------------------------------------------


def step(folder: Path, name: str, said: list[str]) -> None:
    """Run one step of the recipe here. said: overrides, as `--set` takes them."""
    from curate.console import Progress
    from curate.recipe.load import load_recipe
    from curate.workflow.run import STEPS, make_plan, run_steps

    loaded = load_recipe(folder / "recipe.yaml", set=said)
    if name == "plan":
        make_plan(loaded, progress=Progress(quiet=True))
    else:
        run_steps(loaded, STEPS if name == "run" else (name,), progress=Progress(quiet=True), command=name)


def rival_datasets(folder: Path) -> None:
    """The rule and the files with `datasets`, its maps and filters batched."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    cache = folder / "cache"
    rows = datasets.Dataset.from_parquet(str(folder / "scored.parquet"), cache_dir=str(cache))

    def known(batch: dict[str, Any]) -> list[bool]:
        return (~np.isnan([np.asarray(batch[name], float) for name in (*WORST, ORDER)]).any(0)).tolist()

    def where(batch: dict[str, Any]) -> list[bool]:
        return ((np.asarray(batch["quality"]) > 0.1) & (np.asarray(batch["chosen_tokens"]) < 500)).tolist()

    rows = rows.add_column("at", np.arange(len(rows)))
    left = rows.filter(where, batched=True)
    candidates, worst = len(left), set()
    for name, share in WORST.items():
        of = left.filter(lambda batch, name=name: [value is not None for value in batch[name]], batched=True)
        worst |= set(
            of.sort([name, "row_id"], reverse=[True, False]).select(range(int(share * candidates + 0.5)))["at"]
        )
    left = left.filter(known, batched=True)
    left = left.filter(lambda batch: [at not in worst for at in batch["at"]], batched=True)
    left = left.sort([ORDER, "row_id"], reverse=[True, False])
    kept_at = set(left.select(range(int(SHARE * len(left) + 0.5)))["at"])
    kept = rows.filter(lambda batch: [at in kept_at for at in batch["at"]], batched=True)
    dropped = rows.filter(lambda batch: [at not in kept_at for at in batch["at"]], batched=True)
    dropped = dropped.map(
        lambda batch: {"reason": ["worst" if at in worst else "beyond, unknown or where" for at in batch["at"]]},
        batched=True,
    )
    split = time.process_time(), time.perf_counter()
    columns = ["prompt", "chosen", "rejected", "row_id", "topic", "quality", *SCORES]
    out = folder / "out-datasets"
    (out / "data").mkdir(parents=True)
    kept = kept.select_columns(columns)
    kept.to_parquet(str(out / "data" / "train-00000.parquet"))
    datasets.DatasetDict({"train": kept}).save_to_disk(str(out))
    dropped.select_columns([*columns, "reason"]).to_parquet(str(out / "dropped.parquet"))
    print(json.dumps({"kept": len(kept), "cpu": split[0], "until": split[1]}))


def rival_polars(folder: Path) -> None:
    """The rule and the files with polars; the save_to_disk folder is Arrow's stream format, as `datasets` writes it."""
    import polars as pl
    import pyarrow as pa

    rows = pl.read_parquet(folder / "scored.parquet").with_row_index("at")
    where = pl.col("quality").gt(0.1) & pl.col("chosen_tokens").lt(500)
    left = rows.select("at", "row_id", "quality", "chosen_tokens", *WORST, ORDER).filter(where)
    worst = pl.concat(
        [
            left.drop_nulls(name)
            .sort([name, "row_id"], descending=[True, False])
            .head(int(share * len(left) + 0.5))
            .select("at")
            for name, share in WORST.items()
        ]
    ).unique()
    left = (
        left.drop_nulls([*WORST, ORDER])
        .join(worst, on="at", how="anti")
        .sort([ORDER, "row_id"], descending=[True, False])
    )
    kept_at = left.head(int(SHARE * len(left) + 0.5)).select("at", is_kept=True)
    marked = rows.join(kept_at, on="at", how="left", maintain_order="left")
    columns = ["prompt", "chosen", "rejected", "row_id", "topic", "quality", *SCORES]
    kept, dropped = marked.filter("is_kept").select(columns), marked.filter(pl.col("is_kept").is_null()).select(columns)
    dropped = dropped.with_columns(reason=pl.lit("beyond, worst, unknown or where"))
    split = time.process_time(), time.perf_counter()
    out = folder / "out-polars"
    (out / "data").mkdir(parents=True)
    kept.write_parquet(out / "data" / "train-00000.parquet")
    table = kept.to_arrow()
    with (
        pa.OSFile(str(out / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table, 10_000)
    dropped.write_parquet(out / "dropped.parquet")
    print(json.dumps({"kept": len(kept), "cpu": split[0], "until": split[1]}))


RIVALS: dict[str, Callable[[Path], None]] = {"datasets": rival_datasets, "polars": rival_polars}


# ---- measuring ------------------------------------------------------------------------------------------------------------------------------


class Cost:
    """What a process took: CPU seconds, seconds, peak MB; and what it printed."""

    def __init__(self, *given: str):
        start = time.perf_counter()
        with tempfile.NamedTemporaryFile() as peak, tempfile.TemporaryFile() as out:
            process = subprocess.Popen([sys.executable, __file__, *given, "--peak", peak.name], stdout=out)
            _, status, usage = os.wait4(process.pid, 0)
            out.seek(0)
            self.said = out.read().decode()
            told = peak.read().decode()
        if status:
            raise SystemExit(f"{' '.join(given)} failed")
        self.cpu, self.wall = usage.ru_utime + usage.ru_stime, time.perf_counter() - start
        self.peak = float(told) if told else usage.ru_maxrss / 1024


def own_peak() -> float:
    """MB, of this process' memory since it began this program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(rows: int, rounds: int, profile: bool, rivals: list[str]) -> dict[str, tuple[float, float, float]]:
    """step -> CPU seconds, seconds, peak MB at this number of rows; medians of the rounds where a step can be repeated."""
    found: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        recipe = make(folder, rows)
        more = ["--profile"] if profile else []

        def ask(title: str, *given: str) -> Cost:
            cost = Cost("--folder", kept, *given, *more)
            found.setdefault(title, []).append(cost)
            if profile:
                print(f"\n==== {title}: {cost.cpu:.1f} s of CPU time\n{cost.said}")
            return cost

        ask("read + first plan", "--step", "plan")
        Cost("--folder", kept, "--fill")
        ask("plan, all measured", "--step", "plan")
        ask("score", "--step", "score")
        for number in range(rounds):
            for title, rule in list(RULES.items())[:: -1 if number % 2 else 1]:
                said = [f"--set=select.{key}={json.dumps(value)}" for key, value in rule.items()]
                ask(title, "--step", "select", *said, f"--set=select.where={WHERE} AND {number} = {number}")
        for number in range(rounds):
            shutil.rmtree(folder / "out", ignore_errors=True)
            ask("select + export: select", "--step", "select", f"--set=select.where={WHERE} AND {number} = {number}")
            ask("select + export: export", "--step", "export", f"--set=select.where={WHERE} AND {number} = {number}")
            if number == 0:
                export_scored(recipe)
            for name in rivals:
                for left in (folder / f"out-{name}", folder / "cache"):
                    shutil.rmtree(left, ignore_errors=True)
                ask(name, "--rival", name)
        ask("run, after other settings", "--step", "run")
        for _ in range(rounds):
            ask("run, nothing changed", "--step", "run")
        check_alike(folder, rivals)
    return {
        title: tuple(statistics.median(getattr(cost, what) for cost in costs) for what in ("cpu", "wall", "peak"))  # type: ignore[misc]
        for title, costs in found.items()
    }


def export_scored(recipe: Path) -> None:
    """The rows with their scores as the Parquet file that the rivals start from."""
    from curate.recipe.load import load_recipe

    loaded = load_recipe(recipe)
    import duckdb

    columns = ", ".join(["prompt", "chosen", "rejected", "row_id", "topic", "quality", "chosen_tokens", *SCORES])
    with duckdb.connect(str(loaded.store / "curate.duckdb"), read_only=True) as con:
        con.execute(
            f"COPY (SELECT {columns} FROM scored ORDER BY position) TO '{recipe.parent / 'scored.parquet'}' (FORMAT parquet)"
        )


def check_alike(folder: Path, rivals: list[str]) -> None:
    """All kept the same rows."""
    import polars as pl

    ours = pl.read_parquet(folder / "out" / "data" / "*.parquet", columns=["row_id"])
    for name in rivals:
        other = pl.read_parquet(folder / f"out-{name}" / "data" / "*.parquet", columns=["row_id"])
        if not ours.equals(other):
            raise SystemExit(f"{name} keeps {len(other):,} rows, curate {len(ours):,}; not the same ones")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where the time goes, of every step")
    parser.add_argument("--without", choices=list(RIVALS), nargs="+", default=[], help="rivals that are left out")
    for name in ("folder", "step", "rival", "peak"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        inside(given)
        return
    from curate.console import table

    tables = {}
    rivals = [name for name in RIVALS if name not in given.without]
    for rows in given.rows:
        tables[rows] = measure(rows, given.rounds, given.profile, rivals)
        lines = [
            (title, *(f"{value:,.1f}" for value in cost[:2]), f"{cost[2]:,.0f}") for title, cost in tables[rows].items()
        ]
        print(f"\n{rows:,} rows\n" + table(lines, head=("step", "CPU s", "s", "peak MB")), flush=True)
        ours = sum(tables[rows][f"select + export: {part}"][0] for part in ("select", "export"))
        for name in rivals:
            print(f"select + export: {name} takes {tables[rows][name][0] / ours:.2f} times curate's CPU time")
    if len(given.rows) > 1:
        print(slopes(tables))


def slopes(tables: dict[int, dict[str, tuple[float, float, float]]]) -> str:
    """What a million rows more cost, between the two largest tables, and what that comes to at a hundred million."""
    from curate.console import table

    (less, small), (more, large) = sorted(tables.items())[-2:]
    lines = []
    for title, (cpu, _, peak) in large.items():
        per = [
            (now - before) / (more - less) * 1e6 for now, before in ((cpu, small[title][0]), (peak, small[title][2]))
        ]
        far = [now + one * (1e8 - more) / 1e6 for now, one in zip((cpu, peak), per, strict=True)]
        lines.append((title, f"{per[0]:,.1f}", f"{per[1]:,.0f}", f"{far[0]:,.0f}", f"{far[1]:,.0f}"))
    head = ("step", "CPU s a million", "MB a million", "CPU s at 100M", "MB at 100M")
    return "\n" + table(lines, head=head)


def inside(given: argparse.Namespace) -> None:
    """What a process of ours does."""
    folder = Path(given.folder)
    if given.peak and Path("/proc/self/status").is_file():
        atexit.register(lambda: Path(given.peak).write_text(str(own_peak())))

    def work() -> None:
        if given.fill:
            fill(folder / "recipe.yaml")
        elif given.rival:
            RIVALS[given.rival](folder)
        else:
            step(folder, given.step, given.set)

    if not given.profile:
        work()
        return
    import cProfile
    import pstats

    profile = cProfile.Profile(time.process_time)
    profile.runcall(work)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    main()
