"""Rows that are too long: nothing is measured on them, or they go past the model's positions."""

from __future__ import annotations

import json

import curate
import curate.plan.missing
from curate.console import Progress
from curate.recipe.load import load_recipe
from curate.workflow import run
from curate.workflow.run import make_plan
from tests.workflow.pairs import pairs, write_rows


def test_the_column_of_token_problems_is_text_even_where_there_are_none(recipe, tmp_path):
    write_rows(tmp_path / "pairs.jsonl", pairs(4))
    store = curate.run(recipe(scores=["ranking_gap"], select=None, export=None)).store
    assert store.sql("SELECT count(*) AS n FROM scored WHERE token_problem LIKE 'x%'")["n"].item() == 0


def test_a_row_that_cannot_be_measured_goes_where_a_rule_uses_its_score(recipe, tmp_path, capsys):
    write_rows(tmp_path / "pairs.jsonl", [*pairs(4), {"prompt": "ada " * 200, "chosen": " bea.", "rejected": " cy!"}])
    for number, (rule, kept) in enumerate([
        ({"keep": {"share": 1.0}}, 5),  # no rule uses a score
        ({"where": "edit_distance >= 0"}, 4),
        ({"drop_worst": {"ches_ln": 0.01}}, 4),
        ({"order_by": "flip_loss"}, 4),
        ({"where": "token_problem IS NULL"}, 4),
    ]):  # fmt: skip
        over = {"select": {**rule, "unknown": "drop"}, "export": {"to": f"out{number}"}}
        changed = load_recipe(recipe(scores=["flip_loss", "ches_ln", "edit_distance"], **over))
        found = run.run_steps(changed, run.STEPS if number < 2 else ("select", "export"), progress=Progress())
        assert (found.selection.counts["kept"], found.exported.n_rows) == (kept, kept), rule
    said = capsys.readouterr().err
    assert (
        "1 row cannot be measured" in said and "treats them by select.unknown; `where: token_problem IS NULL`" in said
    )


def test_rows_beyond_the_models_positions_are_said(recipe, tmp_path, capsys, monkeypatch):
    long = " ada" * 200  # more than the model's 128 positions in whatever way it is split
    beyond = [(long, " bea", " cy"), ("dot", long, " cy"), ("dot", " bea", long)]
    cut = ("ada " * 1100, " bea", " cy")  # its prompt fills max_length: nothing is measured on it
    more = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in [*beyond, cut]]
    write_rows(tmp_path / "pairs.jsonl", [*pairs(4), *more])
    loaded = load_recipe(recipe(scores=["ranking_gap"], select=None, export=None, tokens={"max_length": 1024}))
    says = "of 8 rows are longer than the 128 positions of reference: their values are beyond what it was trained on. "
    says += "Set `tokens.max_length: 128`."
    quiet = Progress(quiet=True)
    before = make_plan(loaded, progress=quiet).to_json()["notes"]
    assert before[0].startswith("By their characters about 1 of the missing rows cannot be measured (max_length 1024, ")
    assert before[1:] == [f"By their characters about 3 {says}"]
    for _ in range(2):  # where nothing is left to measure, too
        result = run.run_steps(loaded, run.STEPS, progress=Progress())
        assert f"\n3 {says}\n" in "\n" + capsys.readouterr().err
        assert result.to_json()["notes"] == make_plan(loaded, progress=quiet).notes() == [f"3 {says}"]
    fits = load_recipe(recipe(scores=["ranking_gap"], select=None, export=None, tokens={"max_length": 128}))
    assert not any("positions" in note for note in make_plan(fits, progress=quiet).notes())
    monkeypatch.setattr("curate.models.fingerprints.FingerprintCache.positions", lambda cache, folder: None)
    assert not make_plan(loaded, progress=quiet).notes()


def test_the_way_out_keeps_prompts_without_a_completion(model, tmp_path, capsys):
    """Among rows that have one: a prompt's column says so too, and it is no row to leave out."""
    rows = [{"prompt": f"ada {i}", "completion": " bea"} for i in range(2)]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "ada " * 200, "completion": " cy"}])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "ada says", "final_answer": "a"}])
    raw = {"kind": "sft", "source": ["rows.jsonl", "prompts.jsonl"], "models": {"reference": str(model)}}
    raw |= {"tokens": {"max_length": 128}, "scores": ["target_nll"], "select": {"unknown": "drop"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    curate.run(tmp_path / "recipe.yaml", progress=Progress())
    said = capsys.readouterr().err
    clean = said.partition("`where: ")[2].partition("`")[0]
    result = curate.run(tmp_path / "recipe.yaml", set={"select.where": clean}, progress=Progress(quiet=True))
    kept = result.store.sql("SELECT prompt FROM rows JOIN selections USING (row_id) WHERE kept ORDER BY prompt")
    assert kept["prompt"].to_list() == ["ada 0", "ada 1", "ada says"]
