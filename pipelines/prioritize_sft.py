"""SFT prioritising: measure a training run's checkpoints, and export the rows whose like should be collected next; or do that in rounds.

    python pipelines/prioritize_sft.py configs/prioritize_sft.yaml [--set select.keep.rows=500]
    python pipelines/prioritize_sft.py RECIPE --rounds 3 --take 500 --pool pool.jsonl --like states --model BASE
    python pipelines/prioritize_sft.py RECIPE --rounds 3 --take 500 --generate template.txt --train "python train.py {data} {out}"

Rows with a low pre-memorization accuracy are the ones that the run recites rather than solves (Kang et al. 2024, arXiv:2411.07681): more data
like them is said to pay; what the demo's task says of that: benchmarks/README.md. Rows that were fluent from the start get 0 by the
formula although most are easy: they are counted apart, never picked silently here, and never hard in rounds.

With --rounds: train, measure, collect `--take` rows like the hard ones, again, and a last training on everything. The rows to start from
are the recipe's source. New rows come from a pool (read as the source is; `--like states`, `group:COLUMN` or `module:function`) or from a
model that writes problems after `--generate`'s template and answers them (kept where the answers agree). None is known, held out or a
repetition. Training is TRL's SFTTrainer from --model, or a command of your own. Stopped, it goes on where it was. Exit 0 done, 1 failed, 2
wrong recipe or use.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import curate
from curate.console import Progress, out, table, told
from curate.errors import CurateError, UsageError
from curate.jobs.collect import candidates, rounds
from curate.recipe.load import load_recipe

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


def grow(recipe: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The rounds that the command line asks for. UsageError where it does not say where rows come from, or what is trained."""
    if (asked.pool is None) == (asked.generate is None):
        raise UsageError("--rounds: say where new rows come from, either --pool FILE or --generate TEMPLATE.")
    if (asked.model is None) == (asked.train is None):
        raise UsageError(
            '--rounds: say what is trained, either --model BASE or --train "python train.py {data} {out}".'
        )
    if asked.take is None:
        raise UsageError("--rounds: say how many rows a round collects, --take N.")
    script = shlex.join([sys.executable, str(Path(__file__).resolve().with_name("train_sft.py"))])
    command = asked.train or f"{script} {{data}} {{out}} --model {{model}} --seed {{seed}}"
    if asked.pool is not None:
        collect = candidates.from_pool(asked.pool, asked.like)
        source = {"pool": asked.pool, "like": asked.like}
    else:
        collect = candidates.from_model(asked.generate, generator=asked.generator, agree=asked.agree)
        source = {"generate": str(asked.generate), "generator": asked.generator, "agree": asked.agree}
    train = rounds.by_command(command, model=asked.model, seed=asked.seed)
    loaded = load_recipe(recipe, set=asked.set)
    if asked.pool is not None and loaded.recipe.source is not None:  # before hours of training, not after
        candidates.check_pool(loaded, asked.pool, asked.like)
    return rounds.grow(
        recipe,
        out=rounds_folder(asked),
        rounds=asked.rounds,
        take=asked.take,
        train=train,
        collect=collect,
        asked={**source, "model": asked.model, "train": asked.train},
        overrides=asked.set,
        seed=asked.seed,
        progress=Progress(quiet=asked.quiet),
    )


def rounds_folder(asked: argparse.Namespace) -> Path:
    folder: Path = asked.out or asked.recipe.with_name(f"{asked.recipe.stem}-rounds")
    return folder


def rounds_table(lines: list[dict[str, Any]]) -> str:
    """One line a training: what it was trained on, what came out, and what was collected after it."""
    columns = ("round", "rows", "train", "premem", "heldout", "hard", "fluent", "undecided", "collected")
    text = table([[line.get(name) for name in columns] for line in lines], head=columns)
    left_out = [f"round {x['round']}: {n:,} {why}" for x in lines for why, n in x.get("left_out", {}).items()]
    notes = [f"Left out in {', '.join(left_out)}."] if left_out else []
    if any(line["undecided"] for line in lines):
        notes.append("Undecided rows are not known to be hard or fluent: no early checkpoint was measured for them.")
    return "\n".join([text, *notes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="put a value over the recipe's")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    more = parser.add_argument_group("rounds")
    more.add_argument("--rounds", type=int, help="how often to train, measure and collect")
    more.add_argument("--take", type=int, help="rows to collect in a round")
    more.add_argument("--pool", help="rows to collect from: anything that a recipe's source can be")
    more.add_argument("--like", default="states", help="states (default), group:COLUMN, or package.module:function")
    more.add_argument("--generate", type=Path, metavar="TEMPLATE", help="a text with {1}, {2}, … for hard problems")
    more.add_argument(
        "--generator", metavar="MODEL", help="what writes and answers (default: the round's last checkpoint)"
    )
    more.add_argument("--agree", type=float, default=0.6, help="share of the answers that has to agree (default 0.6)")
    more.add_argument("--model", metavar="BASE", help="what TRL's trainer starts from")
    more.add_argument(
        "--train", metavar="COMMAND", help="a trainer of your own, with {data} and {out}; {round} and {seed} too"
    )
    more.add_argument("--out", type=Path, help="the rounds' folder (default: <recipe>-rounds beside it)")
    more.add_argument("--seed", type=int, default=0)
    more.add_argument("--json", action="store_true", help="print the rounds as JSON (kept in summary.json too)")
    asked = parser.parse_args()
    try:
        if asked.rounds is None:
            out(prioritize_sft(asked.recipe, overrides=asked.set, quiet=asked.quiet))
        else:
            lines = grow(asked.recipe, asked)
            out(json.dumps(lines, indent=2) if asked.json else rounds_table(lines))
            if not (asked.json or asked.quiet):
                last = f"round-{lines[-1]['round']}"
                folder = rounds_folder(asked)
                print(
                    f"The last training: {folder / 'runs' / last}, on {folder / last / 'data.jsonl'}.", file=sys.stderr
                )
    except (CurateError, KeyboardInterrupt) as error:
        return told(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
