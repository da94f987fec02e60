"""Whom a recipe measures: a reference, a policy, a run's checkpoints, each with its own tokenizer."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml

import curate
import curate.plan.missing
from curate.errors import UsageError
from tests.tiny_models import make_llama
from tests.workflow.pairs import WORDS, pairs, scored, write_rows


def test_a_reference_is_step_0_of_the_run_that_was_measured_last(tmp_path, model, other_model):
    """Two runs from one base in one store: its values are measured once, and stand in the series of the recipe that asks."""
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}:", "completion": f" {WORDS[i]}"} for i in range(4)])
    for run in "ab":
        shutil.copytree(other_model, tmp_path / "runs" / run / "checkpoint-7")
        models = {"reference": str(model), "checkpoints": f"runs/{run}"}
        text = yaml.safe_dump({"kind": "sft", "source": "rows.jsonl", "models": models, "scores": ["loss_drop"]})
        (tmp_path / f"{run}.yaml").write_text(text)
        store = curate.run(tmp_path / f"{run}.yaml").store
        found = store.sql("SELECT DISTINCT run, step FROM trajectories ORDER BY step", recipe=run).rows()
        assert found == [(run, 0), (run, 7)]


def test_a_policy_measures_flips_and_implicit_rewards(recipe, model, other_model, tmp_path):
    write_rows(tmp_path / "pairs.jsonl", pairs(12))
    scores = ["implicit_reward_gap", "ranking_gap"]
    alone = curate.run(recipe(models={"reference": str(other_model)}, scores=["ranking_gap"], select=None, export=None))
    policy_gap = scored(alone.store, "row_id, ranking_gap")["ranking_gap"].to_numpy()
    both = recipe(
        models={"reference": str(model), "policy": str(other_model)}, scores=scores, select=None, export=None
    ).rename(tmp_path / "both.yaml")
    again = curate.run(both)
    assert again.measured == {"forward": 12}  # the policy was measured before, as the other recipe's reference
    frame = again.store.sql("SELECT * FROM scored ORDER BY row_id")
    expected = 0.1 * (policy_gap - frame["ranking_gap"].to_numpy())
    np.testing.assert_allclose(frame["implicit_reward_gap"], -expected, rtol=1e-9, atol=1e-9)
    names = set(again.store.sql("SELECT DISTINCT name FROM dataset_values")["name"])
    assert {"flips_wrong_right", "flips_right_wrong", "flipped_to_right", "ranking_accuracy"} <= names


def test_plain_columns_of_pairs_are_the_references_even_where_checkpoints_are_named(
    recipe, model, other_model, tmp_path
):
    write_rows(tmp_path / "pairs.jsonl", pairs(12))
    both = {"reference": str(model), "checkpoints": [str(other_model)]}
    of = {}
    for name, models in (
        ("both", both),
        ("reference", {"reference": str(model)}),
        ("last", {"checkpoints": [str(other_model)]}),
    ):
        found = curate.run(recipe(models=models, scores=["ranking_gap"], select=None, export=None))
        assert (found.measured == {}) is (name == "reference")
        of[name] = scored(found.store, "row_id, ranking_gap")
    assert of["both"].equals(of["reference"]) and not of["both"].equals(of["last"])


def test_a_series_is_measured_in_step_order_from_the_reference_on(tmp_path, model, other_model):
    rows = [{"prompt": f"ada {i}:", "completion": " bea."} for i in range(4)]
    write_rows(tmp_path / "rows.jsonl", rows)
    raw = {"kind": "sft", "source": "rows.jsonl", "tokens": {"max_length": 64}, "scores": ["confidence"]}
    raw["models"] = {"reference": str(model), "checkpoints": [str(other_model)]}
    (tmp_path / "series.yaml").write_text(yaml.safe_dump(raw))
    result = curate.run(tmp_path / "series.yaml")
    assert [s.checkpoint.step for s in result.plan.steps if s.reads == "forward"] == [0, 1]
    assert result.store.sql("SELECT DISTINCT step FROM trajectories ORDER BY 1")["step"].to_list() == [0, 1]
    zero = make_llama(tmp_path / "run" / "checkpoint-0", seed=4)
    with pytest.raises(UsageError, match="run/checkpoint-0 is, with other weights"):
        curate.run(tmp_path / "series.yaml", set={"models.checkpoints": str(zero.parent)})
    of_zero = {"models.checkpoints": str(zero.parent), "models.reference": str(zero)}
    with pytest.raises(UsageError, match="confidence is about a training run and needs 1 .* names no checkpoint"):
        curate.run(tmp_path / "series.yaml", set=of_zero)  # the untrained model alone
    alone = curate.run(tmp_path / "series.yaml", set=of_zero | {"scores": ["loss_drop"]})
    assert [s.checkpoint.step for s in alone.plan.steps if s.reads == "forward"] == [0]


def test_models_with_tokenizers_of_their_own_are_tokenised_on_their_own(recipe, model, tmp_path):
    """A score of the user's own may ask for the policy's token counts; a shared pass would give it the reference's."""
    policy = make_llama(tmp_path / "policy", seed=2)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_tokens(["ada", "bea", "cy"])
    tokenizer.save_pretrained(policy)
    (tmp_path / "own_scores.py").write_text(
        "import curate\n\n\n@curate.score(needs=('prompt_tokens', 'policy.prompt_tokens'), kind='preference', unit='tokens', worst='none')\n"
        "def saved(prompt_tokens, policy_prompt_tokens):\n    return prompt_tokens - policy_prompt_tokens\n"
    )
    models = {"reference": str(model), "policy": str(policy)}
    result = curate.run(recipe(models=models, scores=["own_scores:saved"], select=None, export=None))
    assert result.plan.steps[0].reads == result.plan.steps[1].reads == "tokens"
    frame = result.store.sql("SELECT prompt, saved FROM scored")
    spared = [2 * p.count("ada") + 2 * p.count("bea") + p.count("cy") for p in frame["prompt"]]
    assert frame["saved"].to_list() == spared and max(spared) > 0
