"""SFT prioritising: measure a training run's checkpoints, and export the rows whose like should be collected next.

    python pipelines/prioritize_sft.py configs/prioritize_sft.yaml [--set select.keep.rows=500]

Rows with a low pre-memorization accuracy are the ones that the run recites rather than solves (Kang et al. 2024, arXiv:2411.07681): more data
like them pays. Rows that were fluent from the start get 0 by the formula although most are easy, so they are counted apart and never
picked silently. Exit 0 done, 1 failed, 2 wrong recipe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import curate
from curate.errors import CurateError, UsageError
from curate.progress import Progress
from curate.recipe import load_recipe
from curate.show import out, table

SERIES = """
    SELECT checkpoint, max(value) FILTER (name = 'accuracy') AS accuracy, max(value) FILTER (name = 'premem_accuracy') AS premem
    FROM dataset_values WHERE checkpoint IS NOT NULL AND name IN ('accuracy', 'premem_accuracy')
    GROUP BY run, checkpoint, step ORDER BY run, step
"""
PICKED = """
    SELECT count(*) AS picked, count(*) FILTER (fluent = 1) AS fluent, count(*) FILTER (fluent IS NULL) AS undecided
    FROM selections JOIN scored USING (row_id) WHERE selection = ? AND kept
"""


def prioritize_sft(recipe: str | Path, *, overrides: list[str] | None = None, quiet: bool = False) -> str:
    """Run an SFT recipe over checkpoints. What it came to, as text: accuracy and pre-memorization accuracy per checkpoint, and the rows picked.

    Raises UsageError where the recipe does not score `premem_accuracy` and `fluent`, or selects nothing.
    """
    asked = load_recipe(recipe, set=overrides).recipe
    missing = [name for name in ("premem_accuracy", "fluent") if name not in {wanted.name for wanted in asked.scores}]
    if missing or asked.select is None:
        wanted = " and ".join(f"`{name}`" for name in missing) or "a `select:` section"
        raise UsageError(f"{recipe}: prioritising needs {wanted}. `curate init sft` writes a recipe that has them.")
    result = curate.run(recipe, set=overrides, progress=Progress(quiet=quiet))
    store, selection = result.store, result.selection
    assert selection is not None
    series = store.sql(SERIES, recipe=result.recipe)
    found = store.sql(PICKED, [selection.name], recipe=result.recipe).row(0, named=True)
    counts = selection.counts
    lines = []
    if len(series):
        lines += [table(series.rows(), head=("checkpoint", "train accuracy", "pre-memorization accuracy")), ""]
    lines.append(
        f"{found['picked']:,} of {counts['rows']:,} rows picked: the ones that this run does not solve before it recites them."
    )
    if found["fluent"]:
        lines.append(
            f"CAREFUL: {found['fluent']:,} of them were fluent from the start, so their 0 says nothing about them. "
            'Leave them out with `--set "select.where=premem_accuracy < 0.5 AND fluent = 0"`.'
        )
    if found["undecided"]:
        lines.append(
            f"For {found['undecided']:,} of them it is not known whether they were fluent from the start: no early checkpoint was measured."
        )
    if result.exported is not None:
        lines.append(
            f"Exported to {result.exported.path}. Collect or generate rows like these, add them to the data, train, and run this again."
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="put a value over the recipe's")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    asked = parser.parse_args()
    try:
        out(prioritize_sft(asked.recipe, overrides=asked.set, quiet=asked.quiet))
    except CurateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
