"""Two tiny models, and a recipe over 40 pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.tiny_models import make_llama
from tests.workflow.pairs import pairs, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "reference", seed=0)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "reference", seed=1)


@pytest.fixture
def recipe(tmp_path, model):
    """A recipe file over 40 pairs; keyword arguments go over its keys."""

    def recipe(**over) -> Path:
        if not (tmp_path / "pairs.jsonl").exists():
            write_rows(tmp_path / "pairs.jsonl", pairs(40))
        raw = {
            "kind": "preference",
            "source": {"path": "pairs.jsonl"},
            "models": {"reference": str(model)},
            "tokens": {"max_length": 128},
            "scores": [
                "ranking_gap",
                {"flip_loss": {"beta": 0.1}},
                {"flip_loss": {"beta": 0.5, "as": "flip_loss_b5"}},
                "ches",
                "ches_ln",
                "edit_distance",
            ],
            "select": {"drop_worst": {"ches_ln": 0.1}, "order_by": "flip_loss desc", "keep": {"share": 0.5}},
            "export": {"to": "out", "columns": "scores"},
        }
        raw.update(over)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}, sort_keys=False))
        return path

    return recipe
