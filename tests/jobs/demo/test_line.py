"""`curate demo`: its folder, its recipes, and the whole line on a small scale with real training and real recipes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

import curate
from curate.errors import UsageError
from curate.jobs.demo import line, task, training
from curate.jobs.demo.report import report
from curate.recipe.load import load_recipe


def test_prepare_writes_rows_and_recipes_and_leaves_them_alone_afterwards(tmp_path):
    out = tmp_path / "demo"
    rows = line.prepare(out, seed=5)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*line.RECIPES, "demo.json", "train.jsonl", "test.jsonl", "pool.jsonl"]
    )
    assert len((out / "train.jsonl").read_text().splitlines()) == len(rows["train"]) == 500
    (out / "sft.yaml").write_text("mine")
    assert line.prepare(out, seed=5) == rows
    assert (out / "sft.yaml").read_text() == "mine"


def test_a_folder_with_something_else_in_it_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        line.prepare(tmp_path, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    line.prepare(tmp_path / "new", seed=0)
    with pytest.raises(UsageError, match="seed 0"):
        line.prepare(tmp_path / "new", seed=1)


def test_recipes_and_training_speak_of_the_same_checkpoint(tmp_path):
    last = f"runs/sft/checkpoint-{line.STEPS}"
    folder = Path(line.__file__).parent
    assert load_recipe(folder / "pool.yaml").recipe.models.checkpoints == [last]
    assert load_recipe(folder / "preference.yaml").recipe.models.reference == last
    assert max(training.FRACTIONS) == 1.0


def test_the_threshold_is_below_what_can_be_learned():
    """A target that is understood and not memorised keeps the entropy of its filler words: τ lies below that for nearly every row."""
    from curate.jobs.demo.model import build_tokenizer

    tokenizer = build_tokenizer()
    scores = load_recipe(Path(line.__file__).parent / "sft.yaml").recipe.scores
    tau = {entry.params["threshold"] for entry in scores if "threshold" in entry.params}
    assert len(tau) == 1
    rows = task.splits(seed=0)["train"]
    floors = [
        task.irreducible_nll(row, n_tokens=len(tokenizer(row.completion, add_special_tokens=False)["input_ids"]) + 1)
        for row in rows
    ]
    assert min(floors) > tau.pop()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The whole line with fewer rows, a smaller batch, and transformers sampling: real all the same."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "splits", functools.partial(task.splits, train=60, test=16, pool=30))
        patch.setattr(training, "train_sft", functools.partial(training.train_sft, batch=8))
        line.prepare(out, seed=0)
        for name in line.RECIPES:
            recipe = (out / name).read_text() + "engine: {sampler: transformers}\n"
            (out / name).write_text(recipe)
        result = line.run_demo(out, seed=0)
        weights = (out / "runs/sft/checkpoint-400/model.safetensors").stat().st_mtime_ns
        again = line.run_demo(out, seed=0)
        assert (out / "runs/sft/checkpoint-400/model.safetensors").stat().st_mtime_ns == weights
    return out, result, again


def test_the_tables_are_full(small):
    _, result, _ = small
    assert [row["checkpoint"] for row in result.checkpoints] == [f"checkpoint-{n}" for n in (60, 100, 160, 240, 400)]
    for row in result.checkpoints:
        assert all(0 <= row[name] <= 1 for name in ("train", "premem", "test"))
        assert row["premem"] <= row["train"] + 1e-9
    assert result.checkpoints[-1]["train"] > 0.5 > result.checkpoints[0]["train"]
    assert result.checkpoints[-1]["nll"] < result.checkpoints[0]["nll"]
    assert {row["cell"] for row in result.cells} == set(task.CELLS)
    assert all(row["test"] is not None for row in result.cells)
    assert "transformers" in result.engine
    assert result.r2["premem"] > result.r2["train"]  # few rows are memorised at once, and train accuracy says so least


def test_pairs_are_a_right_and_a_wrong_answer_to_one_prompt(small):
    from curate.measurements.grading import grader

    out, result, _ = small
    pairs = [json.loads(text) for text in (out / "pairs.jsonl").read_text().splitlines()]
    answers = {row["prompt"]: row["answer"] for row in map(json.loads, (out / "pool.jsonl").read_text().splitlines())}
    assert len(pairs) == result.n_pairs == len({pair["prompt"] for pair in pairs}) >= 3
    grade = grader("gsm8k").grade
    for pair in pairs:
        assert grade(pair["chosen"], answers[pair["prompt"]])
        assert not grade(pair["rejected"], answers[pair["prompt"]])


def test_both_datasets_are_exported(small):
    from datasets import load_from_disk

    out, result, _ = small
    hard, pairs = load_from_disk(str(out / "hard"))["train"], load_from_disk(str(out / "pairs"))["train"]
    assert hard.num_rows == result.hard_rows > 0
    assert max(hard["premem_accuracy"]) < 0.5
    assert "cell" in hard.column_names
    assert pairs.num_rows == result.kept_pairs
    assert 0 <= result.n_pairs - result.kept_pairs - int(0.1 * result.n_pairs) <= 1
    assert {"prompt", "chosen", "rejected", "ches_ln"} <= set(pairs.column_names)


def test_dpo_widens_the_margin_in_every_arm(small):
    _, result, _ = small
    assert [row["arm"] for row in result.pairs] == ["all", "selected", "random"]
    assert all(row["margin"] > 0 and 0 <= row["test"] <= 1 for row in result.pairs)
    assert result.pairs[1]["pairs"] == result.pairs[2]["pairs"] == result.kept_pairs


def test_a_second_run_measures_nothing_and_says_the_same(small):
    out, result, again = small
    assert again.to_json() | {"seconds": 0} == result.to_json() | {"seconds": 0}
    counts = curate.Store(out / "store").sql("SELECT counts FROM runs ORDER BY id")["counts"].to_list()
    assert len(counts) == 8
    assert [bool(json.loads(text)["measured"]) for text in counts] == [True] * 4 + [False] * 4


def test_the_report_shows_the_numbers_and_commands_that_exist(small):
    out, result, _ = small
    text = result.text()
    assert text == report(result.to_json())
    assert f"{result.checkpoints[-1]['train']:.2f}" in text
    for command in [row.strip() for row in text.splitlines() if row.startswith("  curate ")]:
        assert command.split()[1] in {"summary", "sql", "run", "scores", "init"}
    assert str(out / "hard") in text
