"""Preference filtering: score the pairs of a recipe, drop the worst, export the rest, and show what was dropped and why.

    python pipelines/filter_preferences.py configs/filter_preferences.yaml [--set select.drop_worst.ches_ln=0.1] [--show 5]

A job for cron, Kubernetes or a notebook: `curate.run` does the work (only what is new is measured), this prints what somebody should look at
before training on the result. Exit 0 done, 1 failed, 2 wrong recipe.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

import curate
from curate.console import Progress, cell, out, table, told
from curate.errors import CurateError, UsageError
from curate.recipe.load import load_recipe
from curate.rows import Pair, Text

SHOWN = 5  # dropped pairs, unless --show says otherwise
WIDTH = 160  # characters of a text


def filter_preferences(
    recipe: str | Path, *, overrides: list[str] | None = None, show: int = SHOWN, quiet: bool = False
) -> str:
    """Run a preference recipe. What it came to, as text: how many pairs each rule dropped, and the first `show` dropped pairs with their scores."""
    if load_recipe(recipe, set=overrides).recipe.select is None:
        raise UsageError(
            f"{recipe}: nothing is filtered without a `select:` section. `curate init preference` writes one."
        )
    result = curate.run(recipe, set=overrides, progress=Progress(quiet=quiet))
    selection = result.selection
    assert selection is not None
    counts = selection.counts
    lines = [f"{counts['kept']:,} of {counts['rows']:,} pairs kept."]
    if counts["dropped_by"]:
        lines += ["", table(counts["dropped_by"].items(), head=("dropped by", "pairs"))]
    dropped = list(islice(selection.dropped(result.scores), show))
    for number, row in enumerate(dropped, 1):
        numbers = "  ".join(f"{name} {cell(row.columns[name])}" for name in result.scores)
        lines += ["", f"dropped {number}: {row.row_id} ({row.source}, row {row.index}): {row.reason}", f"  {numbers}"]
        if isinstance(row.row, Pair):
            texts = (("prompt", row.row.prompt), ("chosen", row.row.chosen), ("rejected", row.row.rejected))
            lines += [f"  {name:<8}  {shortened(text)}" for name, text in texts]
    if dropped:
        lines += ["", f"Why, number by number: curate explain {result.store.folder} {dropped[0].row_id}"]
    if result.exported is not None:
        lines.append(
            f"Exported to {result.exported.path}; the dropped pairs, with reasons, are in its folder dropped/."
        )
    return "\n".join(lines)


def shortened(text: Text) -> str:
    """A text, or the last turn of a conversation, on one line."""
    last = text if isinstance(text, str) else text[-1]["content"] if text else ""
    flat = " ".join(last.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="put a value over the recipe's")
    parser.add_argument("--show", type=int, default=SHOWN, metavar="N", help=f"print N dropped pairs (default {SHOWN})")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    asked = parser.parse_args()
    try:
        out(filter_preferences(asked.recipe, overrides=asked.set, show=asked.show, quiet=asked.quiet))
    except (CurateError, KeyboardInterrupt) as error:
        return told(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
