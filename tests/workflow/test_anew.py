"""What is measured anew, and what never: other settings, rows that grew or changed, recipes that share a store, killed processes (really killed)."""

from __future__ import annotations

import json
import shutil
import signal
import textwrap
from pathlib import Path

import polars as pl
import pytest
import yaml

import curate
import curate.plan.missing
from curate.console import Progress
from curate.errors import UsageError
from curate.passes import forward
from curate.recipe.load import load_recipe
from curate.workflow import run
from curate.workflow.run import make_plan
from tests import forked
from tests.workflow.pairs import pairs, scored, write_rows

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_nothing_measured_once_is_measured_again(recipe, monkeypatch):
    path = recipe()
    first = curate.run(path)
    assert first.measured == {"tokens": 40, "forward": 40}
    again = curate.run(path, set={"scores": [{"flip_loss": {"beta": 1.0}}, "ches_ln"], "select": {}, "export": None})
    assert again.measured == {}  # β and the selection are free to change
    assert scored(again.store, "row_id, chosen_logp").equals(scored(first.store, "row_id, chosen_logp"))


def test_what_changes_a_value_never_reuses_it(recipe, other_model):
    path = recipe(select=None, export=None)
    curate.run(path)

    def missing(change: dict) -> int:
        plan = make_plan(load_recipe(path, set=change), progress=Progress(quiet=True))
        return {step.reads: step.missing for step in plan.steps}["forward"]

    assert missing({"engine.token_budget": 64}) == 0
    for change in (
        {"tokens.max_length": 12},
        {"tokens.truncation": "keep_end"},
        {"engine.dtype": "bfloat16"},
        {"models.reference": str(other_model)},
    ):
        assert missing(change) == 40, change


def test_a_new_chat_template_is_a_new_tokenizer(recipe, model, tmp_path):
    import shutil

    copy = shutil.copytree(model, tmp_path / "copy")
    path = recipe(models={"reference": str(copy)}, select=None, export=None)
    curate.run(path)
    assert (
        curate.run(recipe(select=None, export=None)).measured == {}
    )  # the same content in another place is the same model
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    changed = curate.run(recipe(models={"reference": str(copy)}, select=None, export=None))
    assert changed.measured == {"tokens": 40, "forward": 40}


def test_another_end_of_answers_is_another_accuracy(tmp_path, model):
    """generation_config.json says what ends a sampled answer; the fingerprint of the weights covers config.json alone."""
    shutil.copytree(model, tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b", "answer": "b"}])
    raw = {
        "kind": "sft",
        "source": "rows.jsonl",
        "models": {"reference": "model"},
        "scores": ["accuracy", "target_nll"],
    }
    raw["engine"] = {"sampler": "transformers"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    generation = tmp_path / "model" / "generation_config.json"

    def prints(ends) -> dict:
        generation.unlink(missing_ok=True)
        if ends is not None:
            generation.write_text(json.dumps({"eos_token_id": ends}))
        return run.make_plan(load_recipe(tmp_path / "recipe.yaml"), progress=Progress(quiet=True)).bindings

    accuracy, nll = ("", "accuracy", None), ("", "target_nll", None)
    none, same, other = prints(None), prints(config["eos_token_id"]), prints([config["eos_token_id"], 5])
    assert none == same and none[accuracy] != other[accuracy] and none[nll] == other[nll]


def test_a_source_that_grew_is_measured_only_where_it_is_new(recipe, tmp_path):
    path = recipe(select=None, export=None)
    before = scored(curate.run(path).store)
    write_rows(tmp_path / "pairs.jsonl", pairs(47))
    grown = curate.run(path)
    assert grown.measured == {"tokens": 7, "forward": 7}
    after = scored(grown.store)
    assert len(after) == 47
    assert after.filter(pl.col("row_id").is_in(before["row_id"].to_list())).equals(before)


def test_no_selection_or_export_of_rows_that_have_changed_since(recipe, tmp_path):
    """One step at a time over a source that grew: what was made of the rows before is refused, with the command that makes it anew."""
    loaded = load_recipe(recipe(select={"order_by": "flip_loss", "unknown": "keep"}))
    step = lambda *steps: run.run_steps(loaded, steps, progress=Progress(quiet=True))  # noqa: E731
    step("measure", "score", "select")
    write_rows(tmp_path / "pairs.jsonl", pairs(47))
    with pytest.raises(UsageError, match=r"as scores of 'recipe' comes from other .*rows.*curate score"):
        step("select")
    with pytest.raises(UsageError, match=r"as selection of 'recipe' comes from other .*rows.*curate select"):
        step("export")
    step("score")  # before the new rows are measured: their scores are NULL
    step("measure")
    with pytest.raises(UsageError, match=r"as scores of 'recipe' comes from other .*measurements.*curate score"):
        step("select")
    step("score")
    step("select")
    assert step("export").exported.n_rows == 47


def test_two_folders_that_name_their_rows_alike(recipe, tmp_path):
    """In one store they would replace each other's rows: an error that names the other folder, and nothing is lost."""
    path = recipe(export=None, select=None, scores=["edit_distance"])
    result = curate.run(path)
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "pairs.jsonl", pairs(5))
    (other / "second.yaml").write_text(path.read_text())
    with pytest.raises(UsageError, match=r"'pairs.jsonl' from another folder \(recipe 'recipe', .*--store"):
        curate.run(other / "second.yaml", store=result.store.folder)
    assert result.store.sql("SELECT count(*) AS n FROM occurrences")["n"][0] == 40
    full = {"source.path": str(other / "pairs.jsonl")}
    assert (
        curate.run(other / "second.yaml", store=result.store.folder, set=full).store.sql(
            "SELECT count(*) AS n FROM occurrences"
        )["n"][0]
        == 45
    )


def test_two_recipes_of_one_store_stay_apart(recipe, tmp_path):
    curate.run(recipe(select=None, export=None))
    write_rows(tmp_path / "more.jsonl", pairs(5, start=100))
    other = tmp_path / "second.yaml"
    other.write_text(recipe().read_text().replace("pairs.jsonl", "more.jsonl"))
    second = curate.run(other, set={"select": None, "export": None})
    assert second.measured == {"tokens": 5, "forward": 5}
    assert len(second.store.scored(recipe="second")) == 5 and len(second.store.scored(recipe="recipe")) == 40
    assert len(second.store.scored(recipe="recipe", source="pairs.jsonl")) == 40


DRIVER = """
    import os, signal, sys
    import curate.plan.step, curate.store.sources, curate.store.shards as shards
    from curate.passes import forward
    curate.plan.step.SHARD_ROWS.update(tokens=8, forward=8)
    how, at, log = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    rows_run, writes = forward.measure, shards.write_parquet
    done = 0

    def measured(model, encoded, *args, **kwargs):
        with open(log, "a") as file:
            file.write(f"{len(encoded)}\\n")
        return rows_run(model, encoded, *args, **kwargs)

    def written(table, folder, name):
        global done
        done += 1
        if done == at and how == "before the rename":
            half = folder / f".shard.parquet.{os.getpid()}-x.tmp"
            folder.mkdir(parents=True, exist_ok=True)
            half.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        path = writes(table, folder, name)
        if done == at and how == "after the rename":
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    forward.measure, shards.write_parquet = measured, written
    sys.argv = ["curate", "run", sys.argv[4], "--quiet"]
    from curate.cli import main
    main()
"""


@pytest.mark.parametrize(("how", "at"), [("before the rename", 7), ("after the rename", 12)])
def test_killed_at_any_moment_the_same_recipe_goes_on(recipe, tmp_path, monkeypatch, how, at):
    """40 rows in shards of 8: 5 token shards, then likelihood and hidden for each of 5 forward shards."""
    path, log = recipe(select=None, export=None), tmp_path / "log"
    done = forked.run(textwrap.dedent(DRIVER), how, at, log, path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = len(list((tmp_path / "store" / "shards").glob("*/*.parquet")))
    assert kept == (at - 1 if how == "before the rename" else at)
    rows = [int(n) for n in log.read_text().split()]
    measure = forward.measure

    def counted(model, encoded, *args, **kwargs):
        rows.append(len(encoded))
        return measure(model, encoded, *args, **kwargs)

    monkeypatch.setattr(forward, "measure", counted)
    for name in ("tokens", "forward"):
        monkeypatch.setitem(curate.plan.missing.SHARD_ROWS, name, 8)
    killed = curate.run(path).store
    assert not list((tmp_path / "store" / "shards").glob("**/*.tmp"))
    assert 40 <= sum(rows) <= 48  # at most one shard was run twice
    assert [r for (r,) in killed.sql("SELECT outcome FROM runs ORDER BY id").rows()] == ["killed", "done"]
    whole = curate.run(path, store=tmp_path / "whole").store
    assert scored(killed).equals(scored(whole))  # to the last bit
