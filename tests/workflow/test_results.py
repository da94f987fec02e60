"""What a recipe gives: a dataset, scores that a plain loop confirms, selections, answers; whatever the order and the batches."""

from __future__ import annotations

import json

import numpy as np
import pytest

import curate
import curate.plan.missing
from curate.console import Progress
from curate.errors import CurateError, ModelError, StoreError, UsageError, ValidationError
from curate.recipe.load import load_recipe
from curate.workflow.run import make_plan
from tests.workflow.pairs import pairs, scored, write_rows


def test_the_line_from_rows_to_a_dataset(recipe, model, tmp_path):
    result = curate.run(recipe())
    frame = scored(result.store)
    assert len(frame) == 40 and frame.null_count().sum_horizontal().item() == 0
    # the scores are what a plain transformers loop says
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, module = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64),
    )
    row = result.store.sql("SELECT * FROM scored WHERE source = 'pairs.jsonl' ORDER BY position LIMIT 1").to_dicts()[0]

    def logp(response: str) -> float:
        prompt, full = (
            tokenizer(row["prompt"]).input_ids,
            [*tokenizer(row["prompt"] + response).input_ids, tokenizer.eos_token_id],
        )
        with torch.no_grad():
            table = module(torch.tensor([full])).logits[0].log_softmax(-1)
        return sum(float(table[t - 1, full[t]]) for t in range(len(prompt), len(full)))

    assert row["chosen_logp"] == pytest.approx(logp(row["chosen"]), rel=1e-5)
    assert row["ranking_gap"] == pytest.approx(logp(row["rejected"]) - logp(row["chosen"]), rel=1e-4)
    assert row["flip_loss"] == pytest.approx(np.log1p(np.exp(-0.1 * row["ranking_gap"])), rel=1e-9)
    assert row["flip_loss_b5"] == pytest.approx(np.log1p(np.exp(-0.5 * row["ranking_gap"])), rel=1e-9)
    # 10% of 40 dropped as the worst, then half of the 36 that are left
    assert result.selection.counts["kept"] == 18
    worst = result.store.sql(
        "SELECT min(ches_ln) AS low FROM scored JOIN selections USING (row_id) WHERE reason LIKE 'worst%'"
    )["low"][0]
    rest = result.store.sql(
        "SELECT max(ches_ln) AS high FROM scored JOIN selections USING (row_id) WHERE reason NOT LIKE 'worst%'"
    )["high"][0]
    assert worst >= rest
    assert result.selection.counts["dropped_by"] == {"keep": 18, "drop_worst": 4}
    import datasets

    exported = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    assert len(exported) == 18 and {"prompt", "chosen", "rejected", "topic", "flip_loss_b5"} <= set(
        exported.column_names
    )
    assert result.dataset.column_names == exported.column_names and result.dataset["row_id"] == exported["row_id"]
    shown = repr(result) + repr(result.plan)  # what a notebook prints: for people, without the rows
    assert "18 of 40 rows kept" in shown and exported["row_id"][0] not in shown and "object at" not in shown
    assert result.store.sql("SELECT outcome, version FROM runs").rows() == [("done", curate.__version__)]


def test_order_and_token_budget_change_no_value(recipe, tmp_path):
    first = scored(curate.run(recipe(select=None, export=None)).store)
    write_rows(tmp_path / "pairs.jsonl", pairs(40)[::-1])
    small = curate.run(recipe(select=None, export=None), set={"engine.token_budget": 64}, store=tmp_path / "other")
    second = scored(small.store)
    assert first["row_id"].equals(second["row_id"])
    scale = np.abs(first["ches"].to_numpy()).max()
    for name in ("ranking_gap", "chosen_logp"):
        np.testing.assert_allclose(first[name].to_numpy(), second[name].to_numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first["ches"].to_numpy(), second["ches"].to_numpy(), atol=1e-5 * scale)


def test_duplicate_rows_are_measured_once_and_said(recipe, tmp_path, capsys):
    write_rows(tmp_path / "pairs.jsonl", pairs(10) + pairs(4))
    result = curate.run(recipe(select={}, export=None), progress=Progress())
    assert result.measured == {"tokens": 10, "forward": 10}
    assert "4 of them occur more than once" in capsys.readouterr().err
    assert result.store.sql("SELECT sum(n_occurrences)::INT FROM scored").item() == 14


def test_a_score_of_the_users_own(recipe, tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "import curate\n\n\n@curate.score(needs=('chosen_tokens', 'rejected_tokens', 'row.topic'), kind='preference', unit='tokens', worst='high')\n"
        "def longer(chosen_tokens, rejected_tokens, topic, *, plus: float = 0.0):\n    "
        "return (chosen_tokens - rejected_tokens) * (topic == 'a') + plus\n"
    )
    result = curate.run(
        recipe(scores=[{"my_scores:longer": {"plus": 2}}], select={"drop_worst": {"longer": 0.1}}, export=None)
    )
    frame = result.store.sql("SELECT longer, chosen_tokens - rejected_tokens AS d, topic FROM scored")
    expected = [2.0 + (d if topic == "a" else 0) for d, topic in frame.select("d", "topic").iter_rows()]
    assert frame["longer"].to_list() == expected
    assert result.measured == {"tokens": 40}  # it needs no model run


def test_limit_takes_the_first_rows(recipe):
    result = curate.run(recipe(select=None, export=None), set={"source.limit": 6})
    assert result.measured == {"tokens": 6, "forward": 6}


def test_groups_weights_and_resampling(recipe, tmp_path):
    path = recipe(
        select={"keep": {"share": 1.0}, "per": {"topic": {"a": 0.5, "b": 1.0}}},
        export={"to": "out", "columns": ["ches"], "weight": "edit_distance", "resample": 60},
    )
    result = curate.run(path)
    assert result.selection.counts["kept_per_group"] == {"a": 10, "b": 20}
    import datasets

    assert len(datasets.load_from_disk(str(tmp_path / "out"))["train"]) == 60


def test_results_speak_json_and_text(recipe):
    result = curate.run(recipe())
    from curate.console import to_json

    shown = json.loads(to_json(result.to_json()))
    assert shown["selection"]["kept"] == 18 and shown["measured"] == {"tokens": 40, "forward": 40}
    assert "18 of 40 rows kept" in result.text()

    plan = make_plan(load_recipe(recipe()), progress=Progress(quiet=True))
    assert plan.missing == 0 and "Everything is measured already." in plan.text()
    assert all(issubclass(e, CurateError) for e in (ModelError, StoreError, UsageError, ValidationError))


def test_flags_in_words_and_what_to_do(recipe, tmp_path):
    """The signs of `explain` are those that `squeezing_prone` counts; the card counts the pairs; settings for TRL lie beside them."""
    from curate.report.explain import explain_row

    path = recipe(
        scores=["ches", {"squeezing_prone": {"share": 0.25}}, {"flip_loss": {"beta": 0.3}}],
        select={},
        export={"to": "out", "columns": "scores"},
    )
    result = curate.run(path)
    found = result.store.sql("SELECT row_id, squeezing_prone AS n, valley_depth FROM scored ORDER BY n DESC")
    assert set(found["n"]) == {0.0, 1.0, 2.0} and found["valley_depth"].null_count() == 0
    for row_id, n in zip(found["row_id"], found["n"], strict=True):
        explained = explain_row(result.store, row_id)
        assert len(explained.flags) == n
        assert ("an NLL term on the chosen response" in explained.text()) == (n > 0)
    flagged = int((found["n"] > 0).sum())
    assert f"{flagged} of the kept pairs are squeezing-prone" in (tmp_path / "out" / "README.md").read_text()
    settings = json.loads((tmp_path / "out" / "trainer_args.json").read_text())
    assert (settings["beta"], settings["loss_type"], settings["max_length"]) == (0.3, ["sigmoid", "sft"], 128)


def test_on_policy_gap_samples_the_prompts_of_pairs(recipe):
    over = {
        "engine.sampler": "transformers",
        "sampling": {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 5},
        "source.limit": 8,
    }
    result = curate.run(recipe(scores=["on_policy_gap"], select=None, export=None), set=over)
    assert result.measured == {"tokens": 8, "sample": 8, "forward": 8}
    drawn = result.store.sql(
        "SELECT row_id, sum(logp) / sum(n_tokens) AS own FROM samples GROUP BY row_id ORDER BY row_id"
    )
    frame = result.store.sql("SELECT * FROM scored ORDER BY row_id")
    expected = drawn["own"].to_numpy() - (frame["rejected_logp"] / frame["rejected_tokens"]).to_numpy()
    np.testing.assert_allclose(frame["on_policy_gap"].to_numpy(), expected, rtol=1e-9)
