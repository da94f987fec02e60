"""A row becomes tokens once, whatever the number of passes and checkpoints."""

from __future__ import annotations

import json

import numpy as np
import yaml

import curate
from curate.passes import tokens
from curate.passes.tokens import Encoded
from curate.workflow.encodings import Encodings
from tests.tiny_models import make_llama


def test_fifty_rows_and_two_checkpoints_are_fifty_encodings(tmp_path, monkeypatch):
    """It was 150: the tokens pass and each checkpoint. Values are those of checkpoints that are measured one by one."""
    pairs = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?"} for i in range(50)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for step in (1, 2):
        make_llama(tmp_path / "run" / f"checkpoint-{step}", seed=step)
    raw = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"checkpoints": "run"},
        "engine": {"device": "cpu"},
        "scores": ["flipped"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    alone = {}
    for step in (1, 2):
        over = {"models": {"reference": f"run/checkpoint-{step}"}, "scores": ["ranking_gap"]}
        found = curate.run(tmp_path / "recipe.yaml", set=over, store=tmp_path / f"alone {step}").store
        alone[step] = found.sql("SELECT row_id, ranking_gap AS gap FROM scored ORDER BY position")
    encoded, encode = [], tokens.encode
    monkeypatch.setattr(tokens, "encode", lambda row, *given: encoded.append(row.row_id) or encode(row, *given))
    result = curate.run(tmp_path / "recipe.yaml")
    trial = len(encoded) - len(set(encoded))  # a few rows are tried before anything is measured
    assert len(set(encoded)) == 50 and trial <= 10
    for step, expected in alone.items():
        got = result.store.sql(
            "SELECT row_id, rejected_logp - chosen_logp AS gap FROM trajectories JOIN data.rows USING (row_id) WHERE step = ? ORDER BY position",
            [step],
        )
        np.testing.assert_allclose(got["gap"], expected["gap"], rtol=1e-12)


def test_what_is_kept_is_bounded():
    made = []

    def encode(name):
        made.append(name)
        return Encoded(np.zeros(100, np.int32), 1)

    kept = Encodings(limit=2500)  # 1,000 bytes each
    for _ in range(2):
        for name in ("a", "b", "c"):
            kept.of("how", name, lambda name=name: encode(name))
    kept.of("otherwise", "a", lambda: encode("a otherwise"))
    assert made == ["a", "b", "c", "c", "a otherwise"] and kept.left == 500
