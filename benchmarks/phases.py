"""Are the phases right? On the demo's task, whose generator knows which skill (cell) a row needs, trained on the spot.

    python benchmarks/phases.py [--seed 1]         trains, samples and measures: five to ten minutes on one core with vLLM
    python benchmarks/phases.py --demo FOLDER      reads the store of `curate demo --out FOLDER` instead (five checkpoints); no smoothing table

A skill is known at a checkpoint where the held-out rows of its cell are answered right at least half the time; the first such checkpoint is its
onset. Against it stand the phases of the rows trained on, and, as the rival, plain train accuracy (right: accuracy ≥ 0.5), which counts
what is recited:

    onset      where half of a cell's rows are learned (right): Spearman and Kendall over the cells, and how many checkpoints off on average
    rows       Cohen's kappa between "row is learned (right) at k" and "its skill is known at k"
    shares     share of a cell's rows that are learned (right) at k against the cell's held-out accuracy at k: R² about y = x

Smoothing: labels from 4 samples a row and checkpoint against labels from 20 other ones, which have little sampling noise left. Beside it a
hidden Markov model whose states are the phases themselves, started from the rules' labels: what EM makes of it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import curate
from curate.console import Progress, table
from curate.jobs.demo import task, training
from curate.jobs.demo.line import one_thread
from curate.scores import hmm
from curate.scores.calibration import r_squared
from curate.scores.phases import FORGOTTEN, LEARNED, NAMES, by_rules, smoothed
from curate.store import Store
from curate.store.runs import stored_runs

TAU = 0.66  # as in the demo
LEVEL = 0.5
STEPS = 400
FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
FEW, MANY, ROWS, DRAWS = 4, 20, 160, 8  # samples of a label, of its check; rows that get both; random splits of them
RECIPE = """kind: sft
store: {store}
source: {{path: {source}}}
{heldout}
models: {{checkpoints: runs/sft}}
tokens: {{max_length: 256}}
sampling: {{samples: {samples}, temperature: 0.8, top_p: 0.95, max_new_tokens: 64, grader: gsm8k}}
scores: [phase: {{threshold: {tau}}}]
"""


def measured(folder: Path, seed: int) -> tuple[Store, Store]:
    """Train the demo's model with eleven checkpoints and measure it: all rows with few samples; some training rows with many."""
    rows = task.splits(seed=seed)
    parts = {"train": rows["train"], "test": rows["test"], "many": rows["train"][:ROWS]}
    for name, problems in parts.items():
        task.write_jsonl(folder / f"{name}.jsonl", problems)
    with one_thread():
        texts = [(row.prompt, row.completion) for row in rows["train"]]
        if not (folder / "runs" / "sft" / f"checkpoint-{STEPS}").is_dir():
            training.train_sft(texts, folder / "runs" / "sft", steps=STEPS, seed=seed, fractions=FRACTIONS)
    heldout = "heldout: {path: test.jsonl}"
    stores = []
    for name, source, other, samples in (("few", "train", heldout, FEW), ("many", "many", "", FEW + MANY)):
        recipe = folder / f"{name}.yaml"
        recipe.write_text(
            RECIPE.format(store=f"store_{name}", source=f"{source}.jsonl", heldout=other, samples=samples, tau=TAU)
        )
        stores.append(curate.run(recipe, progress=Progress(quiet=True)).store)
    return stores[0], stores[1]


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two labellings; unknown labels (NaN) are left out."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    agreed = (a == b).mean()
    by_chance = sum((a == c).mean() * (b == c).mean() for c in np.unique([*a, *b]))
    return float((agreed - by_chance) / (1 - by_chance))


def onset(curve: np.ndarray) -> int:
    """The first checkpoint at or above one half; their number where there is none."""
    return int(np.argmax(curve >= LEVEL)) if (curve >= LEVEL).any() else len(curve)


def ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """τ-b, which knows ties."""
    a, b = (np.sign(v[:, None] - v[None, :]) for v in (x, y))
    return float((a * b).sum() / np.sqrt((a != 0).sum() * (b != 0).sum()))


def compare_skills(store: Store, recipe: str, sources: tuple[str, str]) -> str:
    """The tables about onsets, rows and shares."""
    mine = next(r for r in store.recipes() if r["name"] == recipe)
    train, test = (
        stored_runs(store, ("accuracy", "target_nll"), kind="sft", recipe=mine, sources=[source])[0]
        for source in sources
    )
    cell_of = dict(store.sql("SELECT row_id, cell FROM scored", recipe=recipe).iter_rows())
    cells = np.array([cell_of[row] for row in train.row_ids])
    held = np.array([cell_of[row] for row in test.row_ids])
    accuracy, nll, steps = train.values["accuracy"], train.values["target_nll"], np.array(train.steps)
    known = np.stack([np.nanmean(test.values["accuracy"][held == cell], axis=0) for cell in task.CELLS])  # (cells, K)
    labels = {
        "learned, smoothed": by_rules(smoothed(accuracy, nll), nll, TAU, steps=steps) == LEARNED,
        "learned, rules alone": by_rules(accuracy, nll, TAU, steps=steps) == LEARNED,
        "right (train accuracy)": accuracy >= LEVEL,
    }
    shares = {n: np.stack([of[cells == cell].mean(axis=0) for cell in task.CELLS]) for n, of in labels.items()}
    true = np.array([onset(curve) for curve in known])
    found = {n: np.array([onset(curve) for curve in of]) for n, of in shares.items()}
    names = [*(str(step) for step in train.steps), "never"]
    per_cell = [
        (c, names[true[i]], *(names[f[i]] for f in found.values()), known[i, -1]) for i, c in enumerate(task.CELLS)
    ]
    at_rows = (known >= LEVEL)[[task.CELLS.index(c) for c in cells]].astype(float)  # (rows, K)
    measures = [
        (
            name,
            spearman(found[name], true),
            kendall(found[name], true),
            float(np.abs(found[name] - true).mean()),
            kappa(of.astype(float).ravel(), at_rows.ravel()),
            r_squared(shares[name].ravel(), known.ravel()),
        )
        for name, of in labels.items()
    ]
    head = ("label of the rows", "Spearman", "Kendall τ-b", "checkpoints off", "kappa of rows", "R² of shares")
    onsets = ("cell", "held-out", *labels, "held-out accuracy, last")
    return "\n".join(
        [
            f"Onsets of {len(task.CELLS)} skills over {len(steps)} checkpoints, {len(cells)} rows trained on, {len(held)} held out.",
            table(per_cell, head=onsets),
            "",
            table(measures, head=head),
        ]
    )


def compare_smoothing(store: Store) -> str:
    """How often labels from FEW samples agree with labels from MANY others, with and without smoothing; means over random splits."""
    run = stored_runs(store, ("accuracy", "target_nll"), kind="sft")[0]
    nll, steps = run.values["target_nll"], np.array(run.steps)
    place = {row: i for i, row in enumerate(run.row_ids)}
    graded = np.full((len(place), len(steps), FEW + MANY), np.nan)
    found = store.sql("SELECT row_id, step, list(correct::INTEGER ORDER BY sample) AS graded FROM samples GROUP BY ALL")
    for row, step, marks in found.iter_rows():
        graded[place[row], run.steps.index(step)] = marks
    rng = np.random.default_rng(0)
    results: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(DRAWS):
        order = rng.permutation(FEW + MANY)
        few, many = graded[:, :, order[:FEW]].mean(axis=2), graded[:, :, order[FEW:]].mean(axis=2)
        truth, plain = by_rules(many, nll, TAU, steps=steps), by_rules(few, nll, TAU, steps=steps)
        for name, codes in (
            ("rules alone", plain),
            ("rules on smoothed accuracies (`phase`)", by_rules(smoothed(few, nll), nll, TAU, steps=steps)),
            ("states named by the rules, then EM", named_states(plain, few, nll)),
        ):
            agree = codes == truth
            results.setdefault(name, []).append(
                (kappa(codes.ravel(), truth.ravel()), agree.mean(), agree[:, -1].mean(), (codes != plain).mean())
            )
    lines = [(name, *np.mean(values, axis=0).tolist()) for name, values in results.items()]
    head = (f"labels from {FEW} samples", "kappa", "agreement", "at the last checkpoint", "labels changed")
    return f"Against labels from {MANY} other samples ({len(place)} rows, {len(steps)} checkpoints):\n" + table(
        lines, head=head
    )


def named_states(codes: np.ndarray, accuracy: np.ndarray, nll: np.ndarray) -> np.ndarray:
    """The way not taken: one state a phase, started at the means of its labels, moving only as the rules can, fitted by EM; its Viterbi path."""
    x = np.stack([(v - v.mean()) / v.std() for v in (nll, accuracy)], axis=-1)
    of = codes[:, :, None] == np.arange(len(NAMES))
    mean = np.stack(
        [x[of[..., s]].mean(axis=0) if of[..., s].any() else x.mean(axis=(0, 1)) for s in range(len(NAMES))]
    )
    moves = np.ones((len(NAMES), len(NAMES)))
    moves[:2, FORGOTTEN] = moves[LEARNED:, :2] = moves[LEARNED, LEARNED + 1] = (
        0  # see the rules: what was solved stays solved
    )
    for k in range(1, codes.shape[1]):
        moves += np.einsum("na,nb->ab", of[:, k - 1].astype(float), of[:, k].astype(float))
    start = of[:, 0].mean(axis=0) + 0.01
    first = hmm.Model(
        start / start.sum(), moves / moves.sum(axis=1, keepdims=True), mean, np.full((len(NAMES), 2), 0.3)
    )
    model, _ = hmm.fit(first, x, floor=0.05)
    return hmm.viterbi(model, hmm.log_emission(model, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seed", type=int, default=1, help="of the task and the training (the settings were chosen on 0)"
    )
    parser.add_argument("--keep", type=Path, help="a folder to work in and to go on with (default: a temporary one)")
    parser.add_argument("--demo", type=Path, help="the folder of a `curate demo` that has run")
    a = parser.parse_args()
    if a.demo is not None:
        print(compare_skills(Store(a.demo / "store"), "sft", ("train.jsonl", "test.jsonl")))
        return
    with tempfile.TemporaryDirectory() as folder:
        few, many = measured(a.keep or Path(folder), a.seed)
        print(compare_skills(few, "few", ("train.jsonl", "test.jsonl")))
        print()
        print(compare_smoothing(many))


if __name__ == "__main__":
    main()
