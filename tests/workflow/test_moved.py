"""Measured on one machine, scored, selected and exported on another: a copied store and recipe, without models and without sources."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

import curate
from curate.console import Progress
from curate.errors import CurateError, ModelError, UsageError, ValidationError
from curate.recipe.load import load_recipe
from curate.report.describe import store_status
from curate.report.explain import explain_row
from curate.report.summary import summarise
from curate.store import Store
from curate.store.openings import kept_open
from curate.workflow import run as workflow
from tests.old_store.models import make_models
from tests.tiny_models import make_llama
from tests.workflow.pairs import pairs, write_rows

SFT = {
    "kind": "sft",
    "source": {"path": "rows.jsonl"},
    "heldout": {"path": "held.jsonl"},
    "models": {"reference": "base", "checkpoints": "runs/sft"},
    "engine": {"sampler": "transformers", "device": "cpu"},
    "sampling": {"samples": 2, "max_new_tokens": 4, "few_shot": "shots.txt", "grader": "moved_grader:right"},
    "scores": ["accuracy", "target_nll", "loss_drop", {"premem_accuracy": {"threshold": 1.0}}],
    "select": {"order_by": "target_nll", "keep": {"rows": 4}, "unknown": "keep"},
    "export": {"to": "out/sft", "columns": "scores"},
}
PAIRS = {
    "kind": "preference",
    "source": {"path": ["pairs.jsonl", "more.jsonl"]},
    "models": {"reference": "base", "policy": "runs/sft/checkpoint-20"},
    "engine": {"device": "cpu"},
    "scores": ["ranking_gap", "ches_ln", "implicit_reward_gap", {"flip_loss": {"beta": 0.1}}],
    "select": {"drop_worst": {"ches_ln": 0.2}, "keep": {"share": 0.5}, "order_by": "flip_loss"},
    "export": {"to": "out/pairs", "columns": "scores"},
}
OFFLINE = ("score", "select", "export")


def step(recipe: Path, name: str, progress: Progress | None = None, **change):
    steps = workflow.STEPS if name == "run" else (name,)
    return workflow.run_steps(
        load_recipe(recipe, set=change), steps, progress=progress or Progress(quiet=True), command=name
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder with both recipes run in it."""
    folder = tmp_path_factory.mktemp("gpu_box")
    make_models(folder, make_llama(tmp_path_factory.mktemp("model") / "base", seed=0))
    rows = [{"prompt": f"is {i} more?", "completion": f" yes {i}", "answer": str(i), "n": i} for i in range(8)]
    write_rows(folder / "rows.jsonl", rows[:6])
    (folder / "shots.txt").write_text("is 3 more? yes 3\n")
    (folder / "moved_grader.py").write_text("def right(text, answer):\n    return answer in text\n")
    write_rows(folder / "held.jsonl", rows[6:])
    write_rows(folder / "pairs.jsonl", pairs(8))
    write_rows(folder / "more.jsonl", pairs(4, start=50))
    for name, recipe in (("sft", SFT), ("pairs", PAIRS)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        curate.run(folder / f"{name}.yaml")
    return folder


@pytest.fixture
def laptop(measured, tmp_path) -> Path:
    """The store and the recipes, nothing else, elsewhere."""
    folder = tmp_path / "laptop"
    shutil.copytree(measured / "store", folder / "store")
    (folder / "store" / "weights.json").unlink()
    for name in ("sft", "pairs"):
        shutil.copy(measured / f"{name}.yaml", folder)
    return folder


def shown(folder: Path, name: str) -> list[list[dict]]:
    store = Store(folder / "store")
    views = ("scored", "trajectories", "samples", "dataset_values", "selections", "occurrences")
    exported = pl.read_parquet(folder / "out" / name / "data" / "train-00000.parquet")
    with kept_open():
        found = [store.sql(f"SELECT * FROM {view} ORDER BY ALL", recipe=name).to_dicts() for view in views]
    return [*found, exported.to_dicts()]


@pytest.mark.parametrize("name", ["sft", "pairs"])
def test_no_model_and_no_source_is_needed_after_measuring(measured, laptop, name, capsys, monkeypatch):
    from curate.plan import identity

    monkeypatch.setattr(identity, "engine_name", lambda *_: "the laptop's own")
    monkeypatch.delitem(sys.modules, "moved_grader", raising=False)
    for each in OFFLINE:
        step(laptop / f"{name}.yaml", each, Progress())
    said = capsys.readouterr().err
    assert said.count("not here: as measured on 20") == 3 and "checkpoint-20" in said  # once a command
    assert shown(laptop, name) == shown(measured, name)  # to the last digit

    def card(folder: Path) -> str:
        return (folder / "out" / name / "README.md").read_text()

    assert card(laptop) == card(measured)
    store = Store(laptop / "store")
    row = store.scored(recipe=name)["row_id"][0]
    assert row in explain_row(store, row, name).text()
    assert store_status(store).text() and summarise(store, recipe=name).text()
    for command in ("run", "measure"):
        with pytest.raises(CurateError, match=r"rows.jsonl|pairs.jsonl|no such model folder"):
            step(laptop / f"{name}.yaml", command)


def test_settings_may_change_measurements_may_not(measured, laptop):
    shutil.copy(measured / "pairs.jsonl", laptop)  # one of two files
    recipe = laptop / "pairs.yaml"
    step(recipe, "score", scores=[{"flip_loss": {"beta": 0.7}}, "ches_ln"])
    kept = step(
        recipe, "select", scores=[{"flip_loss": {"beta": 0.7}}, "ches_ln"], **{"select.keep.share": 0.25}
    ).selection
    assert kept.counts["kept"] == 3
    with pytest.raises(UsageError, match="entk of base was never measured.*curate measure"):
        step(recipe, "score", scores=["gradient_norm"])
    with pytest.raises(UsageError, match="was never measured as the recipe has it now"):
        step(recipe, "score", **{"tokens.max_length": 30})
    with pytest.raises(ModelError, match="no such model folder"):
        step(recipe, "score", **{"models.reference": "other"})
    with pytest.raises(UsageError, match="more.jsonl is not here.*read in another way"):
        step(recipe, "score", **{"source.limit": 5})
    write_rows(laptop / "pairs.jsonl", pairs(7))
    with pytest.raises(UsageError, match="pairs.jsonl has changed since it was read"):
        step(recipe, "score")
    with pytest.raises(ValidationError, match="other.jsonl"):
        step(recipe, "score", **{"source.path": "other.jsonl"})


def test_what_is_there_is_checked(measured, laptop):
    """A checkpoint of another content than the measured one is no stand-in, whether its neighbours are there or not."""
    recipe = laptop / "sft.yaml"
    for checkpoint in ("checkpoint-10", "checkpoint-20"):
        shutil.copytree(measured / "runs" / "sft" / "checkpoint-10", laptop / "runs" / "sft" / checkpoint)
    (laptop / "runs" / "sft" / "checkpoint-10" / "model.safetensors").unlink()  # weights deleted, the folder left
    with pytest.raises(
        UsageError, match="checkpoint-10 is not here, and checkpoint-20 is not as it was measured on 20"
    ):
        step(recipe, "score")
    shutil.rmtree(laptop / "runs" / "sft" / "checkpoint-20")
    shutil.copytree(measured / "runs" / "sft" / "checkpoint-20", laptop / "runs" / "sft" / "checkpoint-20")
    step(recipe, "score")
    shutil.copytree(measured / "base", laptop / "runs" / "sft" / "checkpoint-30")
    with pytest.raises(UsageError, match="checkpoint-10 is not here, and checkpoint-30 is not as"):
        step(recipe, "score")
    shutil.rmtree(laptop / "runs")
    step(recipe, "score")


def test_the_store_names_no_folder_of_the_machine(measured):
    found = [path for path in measured.joinpath("store").rglob("*") if path.is_file() and path.name != "weights.json"]
    assert len(found) > 10
    assert [path.name for path in found if str(measured).encode() in path.read_bytes()] == []


def test_another_grader_over_kept_answers_needs_no_model(measured, laptop, capsys):
    (laptop / "other_grader.py").write_text("def kind(text, answer):\n    return True\n")
    recipe = laptop / "sft.yaml"
    change = {"sampling.grader": "other_grader:kind"}
    found = step(recipe, "score", Progress(), **change)
    assert "graded as the recipe says now; no model is asked" in capsys.readouterr().err
    assert found.store.scored(recipe="sft")["accuracy"].drop_nulls().to_list() == [1.0] * 6
    fewer = step(recipe, "score", **change, **{"sampling.samples": 1})
    assert fewer.store.scored(recipe="sft")["accuracy"].drop_nulls().to_list() == [1.0] * 6
    with pytest.raises(UsageError, match="never measured as the recipe has it now"):
        step(recipe, "score", **change, **{"sampling.samples": 3})
