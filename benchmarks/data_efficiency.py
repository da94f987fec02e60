"""Data efficiency: does growing a training set by rows like the hard ones need fewer rows than growing it at random?

    python benchmarks/data_efficiency.py            # the table of what is measured so far, and what is left
    python benchmarks/data_efficiency.py --run      # goes on measuring, run by run; may be stopped and started again
    python benchmarks/data_efficiency.py --calibrate    # how the threshold and the checkpoints were chosen, on a seed of no study

Algorithm 1 of Kang et al. 2024 (arXiv:2411.07681) on the demo's task, against four rivals. All share the base, the start set, the steps and
the seeds; they differ in where a round's new rows come from:

    rounds   like the rows with pre-memorization accuracy below 1/2 that were not fluent from the start
    iid      the task's own distribution: its eight kinds of problem, equally often
    loss     like as many rows with the highest NLL per token (mean over the checkpoints)
    first    like as many rows with the lowest accuracy at the first checkpoint
    length   like as many of the rows with the longest targets (tokens)

"Like" is: a kind is drawn as often as it occurs among the picked rows, and a fresh problem of that kind is made. One line of
data_efficiency.jsonl is one training run: (seed, method, rows). Seeds are taken until the 95% interval of rounds − iid has a half-width of
at most .02 of accuracy at every budget, or until 20 are spent; the three rivals that are neither take part in the first eight. Threshold,
checkpoints and learning rate were fixed before, on other seeds: with checkpoints too far apart, every row is memorised between two of them,
nearly all count as hard, and the rounds are i.i.d. growth by another name; at the demo's own learning rate (twice this one) single
retrainings are noisier.

The data ratio is how many times as many rows the i.i.d. curve needs for the same test accuracy: the curve is the mean over the seeds, made
monotone, linear in log rows. Its interval resamples the seeds, all methods of a seed together.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curate.console import table
from curate.jobs.demo import task, training
from curate.jobs.demo.line import one_thread

RESULTS = Path(__file__).with_suffix(".jsonl")
METHODS = ("rounds", "iid", "loss", "first", "length")
SEEDS, LEAST_SEEDS, WANTED = 20, 8, 0.02
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
           2.093)  # fmt: skip  # the 97.5% quantile of Student's t for 2 to 20 seeds
SETTINGS: dict[str, Any] = {
    "start": 240, "round": 160, "rounds": 3, "beyond": [1200],  # rows; beyond: i.i.d. only, so that a ratio can be read
    "steps": 800, "batch": 16, "rate": 1.5e-3, "fractions": [0.1, 0.2, 0.3, 0.45, 0.6, 1.0], "test": 1000,
    "samples": 4, "temperature": 0.8, "top_p": 0.95, "threshold": 0.7, "hard_below": 0.5,
}  # fmt: skip
BUDGETS = [SETTINGS["start"] + SETTINGS["round"] * t for t in range(1, SETTINGS["rounds"] + 1)]

Line = dict[str, Any]  # one training run: seed, method, rows, accuracy, kinds, picked, hard, fluent, seconds
Cell = tuple[int, str, int]  # (seed, method, rows)


def cells_of(seed: int) -> list[Cell]:
    """A seed's training runs in the order in which they can be done: the start set is everybody's, `rounds` says how many rows are picked."""
    grown = [(seed, method, rows) for rows in BUDGETS for method in METHODS if taking_part(method, [seed])]
    return [(seed, "start", SETTINGS["start"]), *grown, *((seed, "iid", rows) for rows in SETTINGS["beyond"])]


def taking_part(method: str, seeds: Sequence[int]) -> list[int]:
    """Those of the seeds in which the method is run: the first LEAST_SEEDS for the rivals that say little about the claim."""
    return [seed for seed in seeds if seed < LEAST_SEEDS or method in ("start", "rounds", "iid")]


# ------------------------------------------------------------------------------------------------ one training run


def training_rows(seed: int, method: str, rows: int, done: dict[Cell, Line]) -> list[task.Problem]:
    """The start set and what each round of the method added, made again from the seeds and the kinds that earlier runs picked."""
    made = task.splits(seed=seed, train=SETTINGS["start"], test=SETTINGS["test"], pool=0)
    grown, size = list(made["train"]), SETTINGS["start"]
    taken = {row.prompt for split in made.values() for row in split}
    while size < rows:
        n = min(SETTINGS["round"], rows - size) if size < BUDGETS[-1] else rows - size
        rng = random.Random(f"data-efficiency/{seed}/{method}/{size}")
        if method == "iid":
            grown += task.problems(n, rng=rng, taken=taken)
        else:
            before = done[(seed, "start" if size == SETTINGS["start"] else method, size)]
            for kind in apportioned(before["picked"][method], n, rng):
                row = task.problem(rng, kind)
                while row.prompt in taken:
                    row = task.problem(rng, kind)
                taken.add(row.prompt)
                grown.append(row)
        size += n
    return grown


def apportioned(picked: dict[str, int], n: int, rng: random.Random) -> list[str]:
    """`n` kinds in the shares of `picked`: whole parts first, the rest drawn by the remainders, so that chance adds as little as it can."""
    total = sum(picked.values())
    wanted = {kind: n * count / total for kind, count in picked.items()}
    kinds = [kind for kind, share in wanted.items() for _ in range(math.floor(share))]
    left = {kind: share - math.floor(share) for kind, share in wanted.items()}
    while len(kinds) < n:
        kind = rng.choices(list(left), weights=[max(weight, 1e-9) for weight in left.values()])[0]
        left[kind] = 0.0
        kinds.append(kind)
    return kinds


def run_cell(cell: Cell, done: dict[Cell, Line], folder: Path) -> Line:
    """Train on the cell's rows, test, and pick what its next round is to be like."""
    seed, method, size = cell
    started = time.process_time()
    rows = training_rows(seed, method, size, done)
    test = task.splits(seed=seed, train=0, test=SETTINGS["test"], pool=0)["test"]
    checkpoints = training.train_sft(
        [(row.prompt, row.completion) for row in rows],
        folder,
        steps=SETTINGS["steps"],
        batch=SETTINGS["batch"],
        rate=SETTINGS["rate"],
        fractions=SETTINGS["fractions"],
        seed=seed,
    )
    right = sampled_accuracy(checkpoints[-1:], test, samples=1, temperature=0.0)[:, 0]
    line: Line = {"seed": seed, "method": method, "rows": len(rows), "accuracy": round(float(right.mean()), 4)}
    line["kinds"] = {
        kind: round(float(np.mean([x for x, row in zip(right, test, strict=True) if row.cell == kind])), 3)
        for kind in task.CELLS
    }
    last = size >= BUDGETS[-1]
    if method == "start" or not (last or method == "iid"):
        of_rounds = done.get((seed, "rounds", size))
        line |= pick(method, rows, checkpoints, n=of_rounds["hard"] if of_rounds else None, seed=seed)
    return {**line, "seconds": round(time.process_time() - started, 1)}


def pick(method: str, rows: Sequence[task.Problem], checkpoints: list[Path], *, n: int | None, seed: int) -> Line:
    """The kinds of the rows that the method (after the start set: every method) picks, as counts. n: how many; None: the hard rows decide."""
    from curate.scores.premem import from_the_start, running

    wanted = METHODS if method == "start" else (method,)
    ranked: dict[str, np.ndarray] = {"length": -target_tokens(rows, checkpoints[-1])}  # the lowest are picked
    found: Line = {}
    if {"rounds", "loss"} & set(wanted):
        nll = target_nll(checkpoints, rows)  # (rows, K)
        ranked["loss"] = -nll.mean(1)
    if "rounds" in wanted:
        accuracy = sampled_accuracy(
            checkpoints, rows, samples=SETTINGS["samples"], temperature=SETTINGS["temperature"], top_p=SETTINGS["top_p"]
        )
        premem = running(accuracy, nll, SETTINGS["threshold"])[:, -1]
        fluent = from_the_start(nll, SETTINGS["threshold"], None) == 1
        hard = (premem < SETTINGS["hard_below"]) & ~fluent
        n = int(hard.sum())
        found = {"hard": n, "fluent": int(fluent.sum()), "premem": round(float(premem.mean()), 4)}
        ranked["rounds"], ranked["first"] = np.where(hard, 0.0, 1.0), accuracy[:, 0]
    elif "first" in wanted:
        ranked["first"] = sampled_accuracy(
            checkpoints[:1], rows, samples=SETTINGS["samples"], temperature=SETTINGS["temperature"], top_p=SETTINGS["top_p"]
        )[:, 0]  # fmt: skip
    assert n is not None
    chance = np.random.default_rng(seed).random(len(rows))  # ties are broken by lot
    picked = {}
    for name in wanted:
        if name != "iid":
            order = np.lexsort((chance, ranked[name]))[:n]
            picked[name] = dict(sorted(Counter(rows[i].cell for i in order).items()))
    return {**found, "picked": picked}


# ------------------------------------------------------------------------------------------------ measuring a run


def sampled_accuracy(
    checkpoints: Sequence[Path], rows: Sequence[task.Problem], *, samples: int, temperature: float, top_p: float = 1.0
) -> np.ndarray:
    """(rows, checkpoints) share of right answers, graded as the demo's recipe does."""
    from curate.measurements.grading import grader
    from curate.passes.sampling.hf import HfSampler
    from curate.passes.sampling.types import Prompt, Sampling
    from curate.passes.tokenizer import load_tokenizer
    from curate.passes.tokens import encode_prompt

    gsm8k, tokenizer = grader("gsm8k"), load_tokenizer(checkpoints[0])
    examples = [as_example(row) for row in rows]
    tokens = [encode_prompt(example, tokenizer) for example in examples]
    prompts = [
        Prompt(t.ids, t.text, None, int(example.row_id, 16) % 2**63)
        for t, example in zip(tokens, examples, strict=True)
    ]
    asked = Sampling(samples, temperature, top_p, max_new_tokens=64)
    columns = []
    with HfSampler(checkpoints[0], device="cpu") as sampler:
        for checkpoint in checkpoints:
            sampler.use(checkpoint)
            answers = sampler.sample(prompts, asked)
            columns.append(
                [
                    np.mean([gsm8k.grade(s.text, row.answer) for s in found])
                    for found, row in zip(answers, rows, strict=True)
                ]
            )
    return np.array(columns).T


def target_nll(checkpoints: Sequence[Path], rows: Sequence[task.Problem]) -> np.ndarray:
    """(rows, checkpoints) nats per target token, EOS included."""
    from curate.measurements import MEASUREMENTS
    from curate.passes.forward import load_model, measure
    from curate.passes.tokenizer import load_tokenizer
    from curate.passes.tokens import encode

    tokenizer = load_tokenizer(checkpoints[0])
    encoded = [encode(as_example(row), tokenizer) for row in rows]
    columns = []
    with load_model(checkpoints[0], device="cpu") as model:
        for checkpoint in checkpoints:
            model.use(checkpoint)
            logp = measure(model, encoded, [MEASUREMENTS["target_likelihood"]])["target_logp"]
            columns.append(-logp / np.array([e.n_response for e in encoded]))
    return np.array(columns).T


def target_tokens(rows: Sequence[task.Problem], checkpoint: Path) -> np.ndarray:
    """(rows,) tokens of the targets, EOS included."""
    from curate.passes.tokenizer import load_tokenizer
    from curate.passes.tokens import encode

    tokenizer = load_tokenizer(checkpoint)
    return np.array([encode(as_example(row), tokenizer).n_response for row in rows])


def as_example(row: task.Problem) -> Any:
    from curate.rows import Example

    return Example(row.prompt, row.completion, row.answer)


# ------------------------------------------------------------------------------------------------ the table


def load(path: Path = RESULTS) -> dict[Cell, Line]:
    """What is measured: {(seed, method, rows): line}. A last line that was cut off is left out; other settings are refused."""
    if not path.is_file():
        return {}
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    if json.loads(head) != SETTINGS:
        sys.exit(f"{path}: was measured with other settings. Move it away, or go back to its settings.")
    done = {}
    for text in lines:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        done[line["seed"], line["method"], line["rows"]] = line
    return done


def finished_seeds(done: dict[Cell, Line]) -> list[int]:
    return [seed for seed in range(SEEDS) if all(cell in done for cell in cells_of(seed))]


def curve(done: dict[Cell, Line], seeds: Sequence[int], method: str, sizes: Sequence[int]) -> np.ndarray:
    """(seeds, sizes) test accuracy."""
    return np.array([[done[seed, method, size]["accuracy"] for size in sizes] for seed in seeds])


def interval(values: np.ndarray) -> tuple[float, float]:
    """(mean, half-width of the 95% interval) of (seeds,): Student's t."""
    n = len(values)
    half = STUDENT[n - 2] * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return float(values.mean()), float(half)


def rows_needed(accuracy: float, sizes: Sequence[int], mean: np.ndarray) -> float:
    """How many i.i.d. rows reach an accuracy; inf beyond the curve's end, and its first size at least."""
    smooth = np.maximum.accumulate(mean)
    if accuracy > smooth[-1]:
        return math.inf
    at = int(np.searchsorted(smooth, accuracy))
    if at == 0:
        return float(sizes[0])
    low, high = smooth[at - 1], smooth[at]
    share = (accuracy - low) / (high - low)
    return float(math.exp(math.log(sizes[at - 1]) * (1 - share) + math.log(sizes[at]) * share))


def ratios(done: dict[Cell, Line], seeds: Sequence[int], method: str, *, resamples: int = 2000) -> list[tuple[float, float, float]]:  # fmt: skip
    """Per budget: (data ratio, low, high), the 95% percentile interval over resampled seeds."""
    sizes = [SETTINGS["start"], *BUDGETS, *SETTINGS["beyond"]]
    iid = np.hstack([curve(done, seeds, "start", sizes[:1]), curve(done, seeds, "iid", sizes[1:])])
    mine = curve(done, seeds, method, BUDGETS)
    rng = np.random.default_rng(0)
    draws = [np.arange(len(seeds)), *(rng.integers(0, len(seeds), len(seeds)) for _ in range(resamples))]
    found = np.array(
        [[rows_needed(a, sizes, iid[d].mean(0)) / b for a, b in zip(mine[d].mean(0), BUDGETS, strict=True)] for d in draws]
    )  # fmt: skip
    low, high = np.quantile(found[1:], [0.025, 0.975], axis=0, method="nearest")
    return list(zip(found[0], low, high, strict=True))


def report(done: dict[Cell, Line]) -> str:
    """The table: accuracy and difference to i.i.d. with 95% intervals, and the data ratio with its own."""
    seeds = finished_seeds(done)
    if len(seeds) < 2:
        return f"{len(done)} runs measured, {len(seeds)} seeds finished: too few for a table. Go on with --run."
    iid = {size: curve(done, seeds, "iid", [size])[:, 0] for size in (*BUDGETS, *SETTINGS["beyond"])}
    start, half = interval(curve(done, seeds, "start", [SETTINGS["start"]])[:, 0])
    lines = [
        f"{len(seeds)} seeds, {SETTINGS['steps']} steps of {SETTINGS['batch']} for every run; "
        f"start set of {SETTINGS['start']} rows: test accuracy {start:.3f} ± {half:.3f}",
        *(_beyond(size, iid) for size in SETTINGS["beyond"]),
        "",
    ]
    body = []
    for method in METHODS:
        own = taking_part(method, seeds)
        found, random = (curve(done, own, name, BUDGETS) for name in (method, "iid"))
        if method == "iid":
            body += [
                (method, len(own), size, f"{mean:.3f}", "", "")
                for size, mean in zip(BUDGETS, found.mean(0), strict=True)
            ]
            continue
        for k, (budget, ratio) in enumerate(zip(BUDGETS, ratios(done, own, method), strict=True)):
            mean, half = interval(found[:, k] - random[:, k])
            body.append(
                (method, len(own), budget, f"{found[:, k].mean():.3f}", f"{mean:+.3f} ± {half:.3f}", _ratio(*ratio))
            )
        mean, half = interval(found.mean(1) - random.mean(1))
        body.append((method, len(own), "all", "", f"{mean:+.3f} ± {half:.3f}", ""))
    lines += [
        table(body, head=("method", "seeds", "rows", "accuracy", "over i.i.d.", "data ratio")),
        "",
        *kinds(done, seeds),
    ]
    return "\n".join(lines)


def kinds(done: dict[Cell, Line], seeds: Sequence[int]) -> list[str]:
    """What was picked: per kind of problem, the i.i.d. runs' test accuracy, and each method's share of picked rows, over all rounds."""
    picked: dict[str, Counter[str]] = {name: Counter() for name in METHODS if name != "iid"}
    hard = []
    for (seed, _, size), line in done.items():
        if seed in seeds:
            for name, counts in line.get("picked", {}).items():
                picked[name].update(counts)
            hard += [line["hard"] / size] if "hard" in line else []
    accuracy = {
        kind: np.mean([done[s, "iid", b]["kinds"][kind] for s in seeds for b in BUDGETS]) for kind in task.CELLS
    }
    body = [
        (kind, f"{accuracy[kind]:.2f}", *(f"{counts[kind] / counts.total():.0%}" for counts in picked.values()))
        for kind in sorted(task.CELLS, key=accuracy.get)  # type: ignore[arg-type]
    ]
    title = f"What was picked ({np.mean(hard):.0%} of the rows were hard; i.i.d. takes {1 / len(task.CELLS):.1%} of each kind):"
    return [title, table(body, head=("kind", "i.i.d. accuracy", *picked))]


def _beyond(size: int, iid: dict[int, np.ndarray]) -> str:
    """The i.i.d. curve past the last budget, and whether it still rises: where it does not, no ratio can be read off its end."""
    mean, half = interval(iid[size] - iid[BUDGETS[-1]])
    text = f"i.i.d. at {size} rows: {iid[size].mean():.3f}, {mean:+.3f} ± {half:.3f} over {BUDGETS[-1]} rows"
    return text if mean > half else f"{text}: not known to rise, so ratios near its end say little"


def _ratio(value: float, low: float, high: float) -> str:
    def shown(x: float) -> str:
        return "beyond" if math.isinf(x) else f"{x:.2f}"

    return f"{shown(value)} ({shown(low)} to {shown(high)})"


def widest(done: dict[Cell, Line]) -> float:
    """The largest half-width of rounds − iid over the budgets, of the finished seeds."""
    seeds = finished_seeds(done)
    gaps = curve(done, seeds, "rounds", BUDGETS) - curve(done, seeds, "iid", BUDGETS) if seeds else np.zeros((1, 1))
    return max(interval(gap)[1] for gap in gaps.T)


def left(done: dict[Cell, Line]) -> list[Cell]:
    """What is still to be run, in order; nothing once the interval is narrow enough."""
    if len(finished_seeds(done)) >= LEAST_SEEDS and widest(done) <= WANTED:
        return []
    return [cell for seed in range(SEEDS) for cell in cells_of(seed) if cell not in done]


def status(done: dict[Cell, Line]) -> str:
    missing = left(done)
    per_run = np.mean([line["seconds"] for line in done.values()]) if done else math.nan
    text = f"{len(done)} runs and {len(finished_seeds(done))} of at most {SEEDS} seeds measured"
    if finished_seeds(done):
        text += f"; rounds − iid is known to ± {widest(done):.3f} at its widest (wanted: {WANTED})"
    if not missing:
        return text + ". Nothing is left."
    return (
        text
        + f". At most {len(missing)} runs are left, about {per_run * len(missing) / 60:.0f} minutes of one core: --run"
    )


def run(path: Path = RESULTS, *, minutes: float = math.inf) -> None:
    """Measure what is left; a line is written as soon as its run is done."""
    done, until = load(path), time.monotonic() + 60 * minutes
    whole = "".join(json.dumps(line) + "\n" for line in (SETTINGS, *done.values()))
    if not path.is_file() or path.read_text(encoding="utf-8") != whole:  # new, or a last line that was cut off
        path.write_text(whole, encoding="utf-8")
    with one_thread():
        while (missing := left(done)) and time.monotonic() < until:
            with tempfile.TemporaryDirectory() as folder:
                line = run_cell(missing[0], done, Path(folder))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            done[missing[0]] = line
            print(
                f"seed {line['seed']} {line['method']} {line['rows']}: {line['accuracy']:.3f} ({line['seconds']:.0f} s)",
                flush=True,
            )


def calibrate(seed: int = 101) -> None:
    """Pre-memorization accuracy against test accuracy for several thresholds, with all checkpoints and without the two before the last."""
    from curate.scores.premem import running

    with one_thread(), tempfile.TemporaryDirectory() as folder:
        test = task.splits(seed=seed, train=0, test=SETTINGS["test"], pool=0)["test"]
        for size in (SETTINGS["start"], BUDGETS[1]):
            rows = training_rows(seed, "iid", size, {})
            checkpoints = training.train_sft(
                [(row.prompt, row.completion) for row in rows], Path(folder) / str(size), steps=SETTINGS["steps"],
                batch=SETTINGS["batch"], rate=SETTINGS["rate"], fractions=SETTINGS["fractions"], seed=seed,
            )  # fmt: skip
            right = sampled_accuracy(checkpoints[-1:], test, samples=1, temperature=0.0)
            nll = target_nll(checkpoints, rows)
            accuracy = sampled_accuracy(
                checkpoints, rows, samples=SETTINGS["samples"], temperature=SETTINGS["temperature"], top_p=SETTINGS["top_p"]
            )  # fmt: skip
            print(f"{size} rows: test accuracy {right.mean():.2f}, train accuracy {accuracy[:, -1].mean():.2f}")
            few = [at for at in range(len(checkpoints)) if at not in (len(checkpoints) - 2, len(checkpoints) - 3)]
            body = []
            for tau in (0.5, 0.6, 0.66, 0.7, 0.775):
                line = [tau]
                for kept in (list(range(len(checkpoints))), few):
                    value = running(accuracy[:, kept], nll[:, kept], tau)[:, -1]
                    line += [round(float(value.mean()), 2), f"{(value < SETTINGS['hard_below']).mean():.0%}"]
                body.append(line)
            print(table(body, head=("threshold", "premem", "hard", "premem, fewer checkpoints", "hard")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure what is left; without it only the table is printed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further run after so many")
    parser.add_argument("--calibrate", action="store_true", help="premem against test accuracy, by threshold")
    asked = parser.parse_args()
    if asked.calibrate:
        calibrate()
        return
    if asked.run:
        run(minutes=asked.minutes)
    done = load()
    print(report(done), status(done), sep="\n\n")


if __name__ == "__main__":
    main()
