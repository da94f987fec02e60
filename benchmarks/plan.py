"""What planning costs: 200,000 pairs and 51 checkpoints, three measurements of each, nothing measured yet and everything measured.

    python benchmarks/plan.py            some minutes, most of it for the rows; --quick: 20,000 rows and 11 checkpoints, half a minute

The rows go through curate's own reader; the checkpoints are the demo's model 51 times, each with weights of its own. No model is run: what is
measured is written into the store's tables as SQL makes it up, one line a row and measurement. Printed are CPU seconds of `curate plan`, one thread,
and how often it opened the database.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml
from safetensors.numpy import load_file, save_file

from curate.console import Progress, table
from curate.jobs.demo.model import BASE
from curate.plan.plan import Plan
from curate.recipe.load import load_recipe
from curate.store import Store, database
from curate.store.sql import quote
from curate.store.tables import merge, remember, table_of
from curate.workflow.run import make_plan

MEASURED = 10  # checkpoints of those that are measured in the second row; all are in the third
SCORES = """from curate import score


@score(needs=("chosen_logp", "chosen_entropy", "hidden_cc"), over="checkpoints")
def three(logp, entropy, products):
    return (logp + entropy + products)[:, -1]
"""


def make(folder: Path, rows: int, checkpoints: int) -> Path:
    """The recipe's folder: rows, models, recipe."""
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(rows):
            row = {"prompt": f"{i} + {i % 7} =", "chosen": f" {i + i % 7}", "rejected": f" {i * 3 + 1}"}
            file.write(json.dumps(row) + "\n")
    weights = load_file(BASE / "model.safetensors")
    for step in range(checkpoints):
        place = folder / "run" / f"checkpoint-{step}"
        shutil.copytree(BASE, place)
        moved = {name: (values * (1 + step / 1000)).astype(values.dtype) for name, values in weights.items()}
        save_file(moved, place / "model.safetensors", metadata={"format": "pt"})
    recipe = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"reference": "run/checkpoint-0", "checkpoints": "run"},
        "engine": {"device": "cpu"},
        "scores": ["plan_scores:three"],
    }
    (folder / "plan_scores.py").write_text(SCORES)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def fill(store: Store, plan: Plan, checkpoints: int) -> None:
    """A line for every row under every fingerprint of the plan's first checkpoints, values made up."""
    models = list(dict.fromkeys(step.checkpoint.path for step in plan.steps))[:checkpoints]
    with store.database.write() as con:
        for task in [task for step in plan.steps if step.checkpoint.path in models for task in step.tasks]:
            remember(con, task.measured)
            made_up = dict.fromkeys(task.measurement.columns, "random()")
            if task.measurement.reads == "tokens":
                made_up |= {"token_problem": "NULL::VARCHAR", "truncated": "false"}
            columns = ", ".join(f"{value} AS {quote(name)}" for name, value in made_up.items())
            made = f"SELECT '{task.fingerprint}' AS fingerprint, row_id, {columns} FROM data.rows"
            con.execute(f"CREATE OR REPLACE TEMP TABLE incoming AS {made}")
            merge(con, table_of(task.measurement.name), "incoming")
            con.execute("DROP TABLE incoming")


def timed(recipe: Path) -> tuple[Plan, float, float, int]:
    """A plan, its CPU seconds, its seconds, and how often the database was opened."""
    opened = 0
    own = database.Database._connect

    def counted(self: database.Database, *given: Any) -> Any:
        nonlocal opened
        opened += 1
        return own(self, *given)

    database.Database._connect = counted  # type: ignore[method-assign]
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        plan = make_plan(load_recipe(recipe), progress=Progress(quiet=True))
        return plan, time.process_time() - cpu, time.perf_counter() - wall, opened
    finally:
        database.Database._connect = own  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 rows and 11 checkpoints")
    parser.add_argument("--profile", action="store_true", help="where the time goes, of every plan")
    given = parser.parse_args()
    rows, checkpoints = (20_000, 11) if given.quick else (200_000, 51)
    lines = []
    with tempfile.TemporaryDirectory() as kept:
        recipe = make(Path(kept), rows, checkpoints)
        plan, cpu, _, _ = timed(recipe)
        print(f"{rows:,} rows read, engine named and models fingerprinted in {cpu:.1f} s of CPU time (once)")
        store = Store(load_recipe(recipe).store)
        for what, measured in (("nothing", 0), (f"{MEASURED} checkpoints", MEASURED), ("everything", len(plan.steps))):
            if measured:
                fill(store, plan, measured)
            if given.profile:
                import cProfile
                import pstats

                with cProfile.Profile(time.process_time) as profile:
                    timed(recipe)
                pstats.Stats(profile).sort_stats("cumulative").print_stats(35)
            found, cpu, wall, opened = min((timed(recipe) for _ in range(2)), key=lambda one: one[1])
            tasks = sum(len(step.tasks) for step in found.steps)
            lines.append((what, tasks, found.missing, f"{cpu:.2f}", f"{wall:.2f}", opened))
    print(table(lines, head=("measured", "tasks", "rows missing", "CPU seconds", "seconds", "database opened")))


if __name__ == "__main__":
    main()
