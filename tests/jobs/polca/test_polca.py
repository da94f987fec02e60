"""POLCA from a recipe: what is kept, what is run again, what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from curate.errors import UsageError
from curate.jobs.polca.polca import audit
from curate.passes.loading import model as models
from pipelines import polca
from tests.tiny_models import make_llama

pytest.importorskip("sklearn", reason="POLCA clusters with scikit-learn, the extra `report`")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("polca")
    for k in range(1, 4):
        make_llama(folder / "run" / f"checkpoint-{10 * k}", seed=k, scale=0.06)
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}."} for a in range(5) for b in range(4)]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "add", "completion": "more " * 9}])
    )
    file = folder / "recipe.yaml"
    file.write_text(
        "kind: sft\nsource: rows.jsonl\nmodels: {checkpoints: run}\ntokens: {max_length: 30, truncation: drop}\nscores: [target_nll]\n"
    )
    return file


def test_a_run_is_taken_apart_and_kept(recipe, monkeypatch):
    found = audit(recipe, smallest=4)
    d = found.decomposition
    assert d.losses.shape == (21, 3) and d.parts.shape == (21, 2, 2)
    assert len(d.rows) == 20 and found.notes and "1 of 21 rows" in found.notes[0]
    assert d.completeness()["worst_segment"] <= 0.02
    assert [f.direction for f in found.by_direction] == [None, 0, 1]
    for part in found.by_direction:
        inside = [i for c in part.clusters for i in c.rows]
        assert sorted([*inside, *part.outliers]) == d.rows.tolist()
    text, shown = found.text(), json.loads(json.dumps(found.to_json()))
    assert "Plain loss, the control" in text and "Completeness" in text
    assert shown["checkpoints"] == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert sum(x["loss_share"] for x in shown["directions"][1:]) == pytest.approx(1)

    segment = found.kept_in / "segment-001.npz"
    segment.unlink()  # stopped before the last segment
    again = audit(recipe, smallest=4)
    np.testing.assert_allclose(again.decomposition.parts, d.parts, atol=1e-6)
    monkeypatch.setattr(models, "load_model", None)  # whatever would be run now fails
    assert audit(recipe, smallest=4).to_json() == again.to_json()
    with pytest.raises(TypeError):
        audit(recipe, set={"tokens.max_length": 7})  # other tokens: another decomposition


def test_what_cannot_be_taken_apart_is_refused(recipe):
    with pytest.raises(UsageError, match="found kind sft and no checkpoints"):
        audit(recipe, set={"models.checkpoints": None, "models.reference": "run/checkpoint-10"})
    with pytest.raises(UsageError, match="two checkpoints or more, found 1"):
        audit(recipe, set={"models.checkpoints": ["run/checkpoint-10"]})
    with pytest.raises(UsageError, match="--smallest 1: expected .* 2 or more"):
        audit(recipe, smallest=1)
    with pytest.raises(UsageError, match="--tolerance nan: expected a share"):
        audit(recipe, tolerance=float("nan"))


def test_as_a_job(recipe, monkeypatch, capsys):
    command = ["polca.py", str(recipe), "--json", "--quiet", "--smallest", "4"]
    monkeypatch.setattr(sys, "argv", command)
    assert polca.main() == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 20
    monkeypatch.setattr(sys, "argv", [*command, "--set", "models.checkpoints=null"])
    assert polca.main() == 2
    assert capsys.readouterr().err.startswith("UsageError: ")
