"""Scores that need gradients, from a recipe to the store: one pass for both kinds of measurement, and what comes later is added."""

from __future__ import annotations

import json

import numpy as np
import yaml

import curate
from curate.passes import forward
from curate.passes.gradients import backward
from tests.tiny_models import make_llama


def test_a_recipe_with_gradients(tmp_path, monkeypatch):
    make_llama(tmp_path / "model", seed=0)
    rows = [
        {"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?" + "!" * (i % 3)} for i in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*scores: str):
        recipe = {
            "kind": "preference",
            "source": {"path": "pairs.jsonl"},
            "models": {"reference": "model"},
            "tokens": {"max_length": 128},
            "scores": list(scores),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return curate.run(tmp_path / "recipe.yaml")

    ran = []
    for part in (forward, backward):
        whole = part.measure
        name = part.__name__.rpartition(".")[2]
        monkeypatch.setattr(part, "measure", lambda *a, whole=whole, name=name, **k: ran.append(name) or whole(*a, **k))
    store = run("displacement_share", "steps_to_flip", "ranking_gap").store
    assert ran == ["backward"]  # the log-probabilities come with it
    frame = store.sql("SELECT * FROM scored")
    assert len(frame) == 12
    cc, cr, rr = (frame[name].to_numpy() for name in ("entk_cc", "entk_cr", "entk_rr"))
    np.testing.assert_allclose(frame["displacement_share"].to_numpy(), (cc - cr) / (cc - 2 * cr + rr), rtol=1e-9)
    np.testing.assert_allclose(
        frame["ranking_gap"].to_numpy(), (frame["rejected_logp"] - frame["chosen_logp"]).to_numpy(), rtol=1e-9
    )
    run("displacement_share", "ches_ln")  # only the states are missing now
    assert ran == ["backward", "forward"]
