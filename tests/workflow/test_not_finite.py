"""Models that give no finite number: said of some rows, an error where it is all of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import curate
from curate.console import Progress
from curate.errors import ModelError
from curate.measurements import MEASUREMENTS
from curate.passes.tokens import Encoded
from curate.recipe.load import load_recipe
from curate.workflow.runners.forward import ForwardRunner
from tests.tiny_models import make_llama
from tests.workflow.pairs import pairs, write_rows

SCORES = ["ranking_gap", "squeezed_vocabulary"]


@pytest.fixture
def spoil(tmp_path):
    """A recipe over 6 pairs whose model has NaN as the embedding of these characters; its head is of its own."""

    def spoil(characters: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = make_llama(tmp_path / "model", seed=0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            for id in AutoTokenizer.from_pretrained(folder)(characters)["input_ids"][1:]:
                model.model.embed_tokens.weight[id] = float("nan")
        model.save_pretrained(folder)
        write_rows(tmp_path / "pairs.jsonl", pairs(6))
        recipe = {"kind": "preference", "source": "pairs.jsonl", "models": {"reference": "model"}, "scores": SCORES}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        return tmp_path / "recipe.yaml"

    return spoil


def test_no_value_of_any_row_is_an_error_and_nothing_is_kept(spoil):
    recipe = spoil("abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(ModelError, match=r"model: the model gives no finite number for any of 6 rows.*engine\.dtype"):
        curate.run(recipe, progress=Progress(quiet=True))
    store = curate.Store(recipe.parent / "store")
    assert [m.measurement for m in store.measured(reads="forward")] == []


def test_rows_without_a_value_are_counted_and_null(spoil, capsys):
    recipe = spoil("v")  # of ivy and eve
    store = curate.run(recipe, progress=Progress()).store
    rows = store.sql("SELECT prompt || chosen || rejected AS text, * FROM scored").to_dicts()
    spoilt = [row for row in rows if "v" in row["text"]]
    assert 0 < len(spoilt) < 6
    for row in rows:
        values = [row[name] for name in ("ranking_gap", "squeezed_vocabulary", "chosen_logp")]
        assert (
            all(value is None for value in values)
            if "v" in row["prompt"]
            else None not in values[1:] or "v" in row["text"]
        )
    n = sum(row["chosen_logp"] is None and row["rejected_logp"] is None for row in rows)
    assert f"{n} of 6 rows: the model (model) gives no finite number" in capsys.readouterr().err


def test_answers_without_a_distribution_are_no_wrong_answers(spoil, capsys):
    """Sampled with transformers: unknown where some rows have none, an error where all have."""

    def recipe(characters):
        folder = spoil(characters).parent
        rows = [{"prompt": f"{name} has 2 and 3:", "completion": " 5", "answer": "5"} for name in ("ivy", "ann", "bob")]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sampling = {"samples": 2, "max_new_tokens": 2, "grader": "number", "stop": ["v"]}
        raw = {"kind": "sft", "source": "rows.jsonl", "models": {"reference": "model"}, "scores": ["accuracy"]}
        raw |= {
            "engine": {"sampler": "transformers", "device": "cpu"},
            "sampling": sampling,
            "store": f"of_{len(characters)}",
        }
        (folder / "recipe.yaml").write_text(json.dumps(raw))
        return folder / "recipe.yaml"

    store = curate.run(recipe("v"), progress=Progress()).store
    known = store.sql("SELECT accuracy IS NOT NULL AS known, n_samples FROM scored ORDER BY position").rows()
    assert known == [(False, None), (True, 2), (True, 2)]
    assert "1 row: the model (model) gives no finite number" in capsys.readouterr().err
    with pytest.raises(ModelError, match="gives no finite number for any of 3 prompts"):
        curate.run(recipe("abcdefghijklmnopqrstuvwxyz"), progress=Progress(quiet=True))


def test_a_measurement_of_the_users_own_may_have_no_value(tmp_path):
    """Nor need those of prompts alone: a prompt without a user's turn has no question."""
    write_rows(tmp_path / "pairs.jsonl", pairs(2))
    raw = {"kind": "preference", "source": "pairs.jsonl", "models": {"reference": "model"}, "scores": SCORES}
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    runner = ForwardRunner(load_recipe(tmp_path / "recipe.yaml"), Progress(quiet=True))
    own = replace(MEASUREMENTS["likelihood"], function=lambda batch: {})
    nothing = {column: np.full(2, np.nan) for m in (own, MEASUREMENTS["angles"]) for column in m.columns}
    rows = [Encoded(np.arange(1, 9, dtype=np.int32), 4)] * 2
    runner._count_without_value(rows, nothing, [own, MEASUREMENTS["angles"]])
    assert runner.notes() == [] and runner.measured == 0
