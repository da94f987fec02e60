"""What `curate plan` says before anything runs, and what it costs to say it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import curate
from curate import engines
from curate.checkpoints import Subject
from curate.fingerprints import FingerprintCache
from curate.recipe import load_recipe
from tests.tiny_models import make_llama

REPOSITORY = Path(__file__).resolve().parent.parent
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?"} for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "reference", seed=0)


def write(folder: Path, model: Path, **over) -> Path:
    """A recipe over PAIRS; keyword arguments go over its keys."""
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    raw = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"reference": str(model)},
        "engine": {"device": "cpu"},
        "scores": ["ranking_gap"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw | over))
    return folder / "recipe.yaml"


def test_a_plan_of_measured_rows_loads_no_torch(model, tmp_path):
    """Nor transformers: what they would say of an unchanged model is known from the run."""
    path = write(tmp_path, model)
    curate.run(path)
    code = "import sys\nfrom curate.cli import main\ntry: main()\nfinally: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "plan", str(path), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Everything is measured already." in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_a_known_engine_is_the_one_that_torch_names(model, tmp_path, monkeypatch):
    """Kept only where no GPU can be, under all that it depends on: another dtype, another version is asked for anew."""
    from curate.passes import model as of_torch

    path, subject = write(tmp_path, model), Subject(str(model), "0")
    asked = []
    own = of_torch.engine_identity

    def counted(**settings):
        asked.append(settings["dtype"])
        return own(**settings)

    monkeypatch.setattr(of_torch, "engine_identity", counted)

    def name(reads="forward", **over):
        recipe = load_recipe(path, set={f"engine.{key}": value for key, value in over.items()}).recipe
        return engines.engine_name(recipe, reads, subject, FingerprintCache(tmp_path / "weights.json"))

    for _ in range(2):
        assert name(dtype="bfloat16") == own(dtype="bfloat16", device="cpu")
        assert name("direction", dtype="bfloat16") == own(dtype="float32", device="cpu")
    assert asked == ["bfloat16", "float32"]
    monkeypatch.setattr(engines, "may_have_gpu", lambda: True)
    name(device="auto"), name(device="auto")
    assert asked[2:] == ["auto", "auto"]
    version = engines.importlib.metadata.version
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda of: "9.9" if of == "torch" else version(of))
    name(dtype="bfloat16")
    assert asked[4:] == ["bfloat16"]


def test_no_gpu_is_said_only_where_torch_finds_none():
    import torch

    assert engines.may_have_gpu() or not (torch.cuda.is_available() or torch.backends.mps.is_available())
