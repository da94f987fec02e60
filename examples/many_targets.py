"""Which training rows taught this answer? Inner products of every training row's gradient with every target's, the strongest rows per target.

    python examples/many_targets.py MODEL TRAIN.jsonl TARGETS.jsonl [--top 3] [--factored 32] [--parameters all|lora|K] [--out influence.parquet]
    python examples/many_targets.py                 the demo's ready model on problems of its own task

TRAIN and TARGETS: SFT rows or preference pairs (of a pair: its margin), any format that `curate validate` takes. Sums over
checkpoints, each times its learning rate, are TracIn: run it per checkpoint and add the tables up.

Ranked by cosine: how much of a step on the row goes the target's way; high: it makes the target likelier. --products ranks by ⟨g_i, g_m⟩ themselves,
in which long rows weigh more. The table of --out has target_id, row_id, product, cosine, one line a pair.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from curate.console import out, told
from curate.errors import CurateError, UsageError
from curate.rows import Example, Pair, Row

WIDTH = 100  # characters of a text


def shortened(row: Row) -> str:
    """A row's response on one line, after the end of its prompt."""
    answer = row.chosen if isinstance(row, Pair) else row.completion
    text = " ".join(f"{_plain(row.prompt)[-WIDTH // 2 :]} » {_plain(answer)}".split())
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _plain(text: object) -> str:
    return text if isinstance(text, str) else "" if not text else str(text[-1]["content"])  # type: ignore[index]


def influence(
    path: str | Path,
    train: Sequence[Row],
    targets: Sequence[Row],
    *,
    parameters: str | int = "all",
    factored: int | None = None,
    max_length: int = 1024,
):
    """CrossProducts of rows and targets under one model (curate/passes/gradients/influence.py)."""
    from curate.passes.gradients.influence import cross_products
    from curate.passes.loading.model import load_model
    from curate.passes.tokens import Limits, encode, load_tokenizer

    tokenizer = load_tokenizer(path)
    sides = [[encode(row, tokenizer, Limits(max_length)) for row in rows] for rows in (train, targets)]
    with load_model(path) as model:
        return cross_products(model, *sides, parameters=parameters, factored=factored)  # type: ignore[arg-type]


def strongest(values: np.ndarray, top: int) -> list[list[int]]:
    """(N, M) -> per target the rows with the highest values, unknown ones left out."""
    filled = np.where(np.isnan(values), -np.inf, values)
    order = np.argsort(-filled, axis=0, kind="stable")[:top]
    return [[int(i) for i in order[:, m] if np.isfinite(filled[i, m])] for m in range(values.shape[1])]


def report(train: Sequence[Row], targets: Sequence[Row], values: np.ndarray, *, top: int) -> str:
    """Per target its `top` strongest rows, value first."""
    lines = []
    for m, rows in enumerate(strongest(values, top)):
        known = "" if rows else " — no row has a known value; is this target empty, or cut off before its response?"
        lines.append(f"target {m}  {targets[m].row_id}  {shortened(targets[m])}{known}")
        lines += [f"  {values[i, m]:+.4g}  {train[i].row_id}  {shortened(train[i])}" for i in rows]
    return "\n".join(lines)


def write(path: Path, train: Sequence[Row], targets: Sequence[Row], found) -> None:
    """target_id, row_id, product, cosine; NULL where unknown."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n, m = found.products.shape
    values = {name: x.T.ravel() for name, x in (("product", found.products), ("cosine", found.cosines))}
    columns = {
        "target_id": np.repeat([row.row_id for row in targets], n),
        "row_id": np.tile([row.row_id for row in train], m),
        **{name: pa.array(x, mask=np.isnan(x)) for name, x in values.items()},
    }
    pq.write_table(pa.table(columns), path)


def built_in() -> tuple[Path, list[Row], list[Row]]:
    """The demo's base, 60 problems, and as targets one more of three kinds."""
    from curate.jobs.demo.model import BASE
    from curate.jobs.demo.task import problem, problems

    rng = random.Random(0)
    taken: set[str] = set()
    train = problems(60, rng=rng, taken=taken)
    targets = [problem(rng, cell) for cell in ("big2", "times1", "pick1")]
    return BASE, *([Example(p.prompt, p.completion) for p in some] for some in (train, targets))  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or hub id, of a LoRA adapter too")
    parser.add_argument("train", nargs="?")
    parser.add_argument("targets", nargs="?")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="rows per target (default 3)")
    parser.add_argument("--factored", type=int, metavar="K", help="estimates by projections to K (default: exact)")
    parser.add_argument("--parameters", default="all", help="all, lora, or K: the last K layers and the head")
    parser.add_argument("--products", action="store_true", help="rank by inner products rather than cosines")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--out", type=Path, metavar="FILE.parquet")
    asked = parser.parse_args()
    try:
        if asked.targets is None and asked.model is not None:
            raise UsageError("wanted MODEL TRAIN TARGETS, or nothing at all for the built-in rows.")
        if asked.model is None:
            path, train, targets = built_in()
        else:
            import curate

            path, train, targets = asked.model, list(curate.load(asked.train)), list(curate.load(asked.targets))
        parameters = int(asked.parameters) if asked.parameters.isdigit() else asked.parameters
        found = influence(
            path, train, targets, parameters=parameters, factored=asked.factored, max_length=asked.max_length
        )
        out(report(train, targets, found.products if asked.products else found.cosines, top=asked.top))
        if found.error is not None:
            out(f"factored={asked.factored}: {found.error}")
        if asked.out is not None:
            write(asked.out, train, targets, found)
            out(f"{found.products.size:,} pairs written to {asked.out}")
    except CurateError as error:
        return told(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
