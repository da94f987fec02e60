"""The fixed cost of `curate.run`: 40 pairs on the demo's model, six scores, a selection, an export; the first time, and again when nothing changed.

    python benchmarks/small_run.py [--rounds 5]

Printed are medians of CPU seconds, one thread, and how often the database was opened for writing and for reading. Every round
has a store of its own; one before them is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml

import curate
from curate.console import table
from curate.jobs.demo.model import BASE
from curate.store import database

ROWS = 40
RECIPE: dict[str, Any] = {
    "kind": "preference",
    "source": "pairs.jsonl",
    "models": {"reference": str(BASE)},
    "engine": {"device": "cpu"},
    "scores": ["ranking_gap", "flip_loss", {"flip_loss": {"beta": 0.5, "as": "flip_loss_b5"}}, "ches", "ches_ln", "edit_distance"],
    "select": {"drop_worst": {"ches_ln": 0.1}, "order_by": "flip_loss desc", "keep": {"share": 0.5}},
    "export": {"to": "out", "columns": "scores"},
}  # fmt: skip


def made(folder: Path) -> Path:
    rows = [{"prompt": f"{i} + {i % 7} =", "chosen": f" {i + i % 7}", "rejected": f" {i * 3 + 1}"} for i in range(ROWS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder / "recipe.yaml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    openings: list[bool] = []
    connect = database.Database._connect

    def counted(self: Any, opening: Any, read_only: bool, patience: float) -> Any:
        openings.append(read_only)
        return connect(self, opening, read_only, patience)

    database.Database._connect = counted  # type: ignore[method-assign]
    seconds: dict[str, list[float]] = {"first": [], "nothing changed": []}
    opened: dict[str, tuple[int, int]] = {}
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            recipe = made(Path(folder))
            for what in seconds:
                openings.clear()
                started = time.process_time()
                curate.run(recipe)
                seconds[what] += [time.process_time() - started] if number else []
                opened[what] = openings.count(False), openings.count(True)
    lines = [[what, f"{statistics.median(took):.2f}", *map(str, opened[what])] for what, took in seconds.items()]
    print(table(lines, head=["run", "CPU s", "opened for writing", "for reading"]))


if __name__ == "__main__":
    main()
