"""Weights that stand for several checkpoints: in one run at two steps, and as step 0 of two runs in one store."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

import curate
from curate.console import Progress
from curate.recipe.load import load_recipe
from curate.store.runs import stored_runs
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

ROWS = [{"prompt": f"{i} + 2 =", "completion": f" {i + 2}"} for i in range(4)]
PLACES = "SELECT DISTINCT run, checkpoint, step FROM trajectories ORDER BY run, step"


@pytest.fixture
def write(tmp_path):
    """write(name, **rest) -> the recipe's file, of target_nll over the checkpoints of the run of that name."""
    make_llama(tmp_path / "base", seed=0)
    for run, seeds in (("a", (1, 1, 2)), ("b", (3, 4))):
        for i, seed in enumerate(seeds, 1):
            make_llama(tmp_path / run / f"checkpoint-{10 * i}", seed=seed)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def write(name, **models):
        recipe = {
            "kind": "sft",
            "source": "rows.jsonl",
            "models": {"checkpoints": name} | models,
            "scores": ["confidence", "loss_drop"],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        return tmp_path / f"{name}.yaml"

    return write


def test_two_steps_of_a_run_with_the_same_weights(write):
    """Measured once, and two checkpoints all the same: what a mean over checkpoints is over."""
    result = curate.run(write("a"))
    assert result.measured["forward"] == 2 * len(ROWS)
    assert result.store.sql(PLACES).rows() == [("a", f"checkpoint-{step}", step) for step in (10, 20, 30)]
    nll = result.store.sql("SELECT target_nll FROM trajectories ORDER BY row_id, step")["target_nll"].to_numpy()
    nll = nll.reshape(len(ROWS), 3)
    np.testing.assert_array_equal(nll[:, 0], nll[:, 1])
    found = result.store.sql("SELECT confidence FROM scored ORDER BY row_id")["confidence"].to_numpy()
    np.testing.assert_allclose(found, np.exp(-nll).mean(1))
    (run,) = stored_runs(result.store, ["target_nll"], kind="sft", recipe=result.store.recipes()[0])
    assert run.steps == (10, 20, 30) and run.values["target_nll"].shape == (len(ROWS), 3)


def test_step_0_of_two_runs(write):
    first = curate.run(write("a", reference="base"))
    wanted = [("a", "base", 0), *(("a", f"checkpoint-{step}", step) for step in (10, 20, 30))]
    assert first.store.sql(PLACES).rows() == wanted
    second = curate.run(write("b", reference="base"))
    assert second.measured["forward"] == 2 * len(ROWS)  # the base was measured
    other = [("b", "base", 0), ("b", "checkpoint-10", 10), ("b", "checkpoint-20", 20)]
    assert second.store.sql(PLACES).rows() == second.store.sql(PLACES, recipe="b").rows() == other
    assert second.store.sql(PLACES, recipe="a").rows() == wanted
    for recipe in second.store.recipes():
        (run,) = stored_runs(second.store, ["target_nll"], kind="sft", recipe=recipe)
        assert run.run == recipe["name"] and run.steps[0] == 0
    plan = make_plan(load_recipe(write("a", reference="base")), progress=Progress(quiet=True))
    assert not plan.missing
