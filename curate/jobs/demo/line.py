"""`curate demo`: the whole line on the embedded task, from rows to two curated datasets, with real training in between.

    task -> SFT with checkpoints -> curate run sft.yaml (samples, likelihoods, pre-memorization accuracy, hard rows)
         -> curate run pool.yaml (right and wrong samples of fresh prompts) -> pairs -> curate run preference.yaml -> DPO -> curate run dpo.yaml

Everything it does is an ordinary recipe in the demo's folder, so every step can be repeated and changed there by hand.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import curate
from curate.console import Progress
from curate.errors import UsageError
from curate.jobs.demo import task, training
from curate.jobs.demo.report import report
from curate.recipe.bounds import own_object
from curate.workflow import run as workflow

RECIPES = ("sft.yaml", "pool.yaml", "preference.yaml", "dpo.yaml")
STEPS = 400


@dataclass
class DemoResult:
    """What the demo found. checkpoints, cells, pairs: the three tables, a dict a line; r2: about y = x over the checkpoints."""

    folder: Path
    seed: int
    engine: str = ""
    seconds: float = 0.0
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    r2: dict[str, float] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    hard_rows: int = 0
    n_pairs: int = 0
    kept_pairs: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def text(self) -> str:
        """The tables, what they say, and what to try next."""
        return report(self.to_json())


def run_demo(out: Path, *, seed: int = 0, progress: Progress | None = None) -> DemoResult:
    """Generate, fine-tune, measure, select, build pairs, select again, train on them, and say what came out. Everything lands in `out`.

    A folder where this demo (same seed) was stopped or finished is gone on with: nothing measured is measured again. Raises UsageError for a
    folder with anything else in it, and CurateError from the steps.
    """
    progress = progress or Progress(quiet=True)
    started = time.monotonic()
    result = DemoResult(out, seed)
    rows = prepare(out, seed=seed)
    progress.say(
        f"1/6  {len(rows['train'])} word problems to train on, {len(rows['test'])} to test, {len(rows['pool'])} more, in {out}"
    )
    with one_thread():
        fine_tune(rows["train"], out, seed=seed, progress=progress)
        progress.say(
            "3/6  curate run sft.yaml: sample answers at every checkpoint, grade them, measure the targets' likelihood, select, export"
        )
        read_sft(workflow.run(out / "sft.yaml", progress=progress), result)
        progress.say("4/6  curate run pool.yaml: eight answers to every fresh prompt, to be paired")
        pairs = build_pairs(workflow.run(out / "pool.yaml", progress=progress), out)
        progress.say(
            f"5/6  curate run preference.yaml: {len(pairs)} pairs of a right and a wrong answer, scored, selected, exported"
        )
        kept = workflow.run(out / "preference.yaml", progress=progress).dataset
        selected = list(zip(kept["prompt"], kept["chosen"], kept["rejected"], strict=True))
        compare_dpo(pairs, selected, out, seed=seed, result=result, progress=progress)
    result.seconds = time.monotonic() - started
    return result


def prepare(out: Path, *, seed: int) -> dict[str, list[task.Problem]]:
    """The rows of the seed, written with the recipes to `out`. Recipes that are there already are left as they are."""
    mark = out / "demo.json"
    if mark.is_file():
        stored_mark = own_object(mark)
        if stored_mark != _mark(seed):
            raise UsageError(
                f"{out}: holds the demo of seed {stored_mark.get('seed')} (version {stored_mark.get('version')}). Name another folder with --out."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not empty, and not the demo's. Name another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(_mark(seed)), encoding="utf-8")
    rows = task.splits(seed=seed)
    for name, problems in rows.items():
        if not (out / f"{name}.jsonl").is_file():
            task.write_jsonl(out / f"{name}.jsonl", problems)
    for name in RECIPES:
        if not (out / name).is_file():
            shutil.copyfile(Path(__file__).parent / name, out / name)
    return rows


def _mark(seed: int) -> dict[str, Any]:
    return {"demo": "curate", "seed": seed, "version": curate.__version__}


def fine_tune(rows: Sequence[task.Problem], out: Path, *, seed: int, progress: Progress) -> list[Path]:
    """SFT into `out/runs/sft`, unless it was finished there before. A run that was killed is started again."""
    runs, done = out / "runs" / "sft", out / "runs" / "sft.done"
    if done.is_file():
        progress.say("2/6  fine-tuned before: the checkpoints are there")
        return sorted(runs.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(runs, ignore_errors=True)
    progress.say(
        f"2/6  fine-tuning a Llama of 353k parameters, {STEPS} steps in plain torch on the CPU; five checkpoints"
    )
    with progress.bar("SFT", STEPS, unit="steps") as count:
        texts = [(row.prompt, row.completion) for row in rows]
        checkpoints = training.train_sft(texts, runs, steps=STEPS, seed=seed, progress=lambda *_: count(1))
    done.touch()
    return checkpoints


def read_sft(ran: workflow.Result, result: DemoResult) -> None:
    """The checkpoints' and the cells' tables out of the store: plain queries that anybody can type after `curate sql`."""
    from curate.scores.calibration import r_squared

    store = ran.store
    values = store.sql(
        "SELECT checkpoint, any_value(value) FILTER (name = 'accuracy') AS train, any_value(value) FILTER (name = 'target_nll') AS nll, "
        "any_value(value) FILTER (name = 'premem_accuracy') AS premem, any_value(value) FILTER (name = 'heldout_accuracy') AS test "
        "FROM dataset_values WHERE step IS NOT NULL GROUP BY checkpoint, step ORDER BY step",
        recipe="sft",
    )
    result.checkpoints = values.to_dicts()
    test = values["test"].to_numpy()
    result.r2 = {name: float(r_squared(values[name].to_numpy(), test)) for name in ("train", "premem")}
    result.cells = store.sql(
        "SELECT cell, avg(t.accuracy) FILTER (source = 'train.jsonl') AS train, "
        "avg(premem_accuracy) FILTER (source = 'train.jsonl') AS premem, avg(t.accuracy) FILTER (source = 'test.jsonl') AS test "
        "FROM scored JOIN (SELECT row_id, arg_max(accuracy, step) AS accuracy FROM trajectories GROUP BY row_id) t USING (row_id) "
        "GROUP BY cell ORDER BY test DESC, cell",
        recipe="sft",
    ).to_dicts()
    result.engine = ", ".join(sorted({measured.engine for measured in store.measured(reads="sample")}))
    result.hard_rows = ran.selection.counts["kept"] if ran.selection is not None else 0


def build_pairs(ran: workflow.Result, out: Path) -> list[tuple[str, str, str]]:
    """One (prompt, right answer, wrong answer) for every prompt that got both, written to `out/pairs.jsonl`.

    The first right and the first wrong sample that ended on their own and say anything at all.
    """
    answered = ran.store.sql(
        "SELECT r.prompt, arg_min(s.text, s.sample) FILTER (s.correct) AS chosen, arg_min(s.text, s.sample) FILTER (NOT s.correct) AS rejected "
        "FROM samples s JOIN scored r USING (row_id) WHERE s.finished AND trim(s.text) <> '' GROUP BY r.position, r.prompt "
        "HAVING chosen IS NOT NULL AND rejected IS NOT NULL ORDER BY r.position",
        recipe="pool",
    ).to_dicts()
    text = "".join(json.dumps(pair) + "\n" for pair in answered)
    (out / "pairs.jsonl").write_text(text, encoding="utf-8")
    return [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in answered]


def compare_dpo(
    pairs: list[tuple[str, str, str]],
    selected: list[tuple[str, str, str]],
    out: Path,
    *,
    seed: int,
    result: DemoResult,
    progress: Progress,
) -> None:
    """DPO three times with as many steps, on all pairs, the selected ones, and as many at random: what happens to all pairs, and to test accuracy."""
    result.n_pairs, result.kept_pairs = len(pairs), len(selected)
    sets = {
        "all": pairs,
        "selected": selected,
        "random": random.Random(f"curate-demo/arm/{seed}").sample(pairs, len(selected)),
    }
    steps = 3 * -(-len(pairs) // 16)
    progress.say(
        "6/6  DPO on all pairs, on the selected ones, on as many at random; then curate run dpo.yaml: test accuracy"
    )
    with progress.bar("DPO", steps * len(sets), unit="steps") as count:
        for name, chosen in sets.items():
            change = training.train_dpo(
                chosen,
                out / "runs" / "dpo" / name,
                reference=out / "runs" / "sft" / f"checkpoint-{STEPS}",
                steps=steps,
                seed=seed,
                measure=pairs,
                progress=lambda *_: count(1),
            )
            result.pairs.append({"arm": name, "pairs": len(chosen), **asdict(change), "margin": change.margin})
    store = workflow.run(out / "dpo.yaml", progress=progress).store
    accuracy = store.sql("SELECT checkpoint, value FROM dataset_values WHERE name = 'accuracy'", recipe="dpo")
    after = dict(accuracy.iter_rows())
    for line in result.pairs:
        line["test"] = after[line["arm"]]


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on more threads, and a run repeats itself exactly on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
