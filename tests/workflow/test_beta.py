"""One β for DPO: forecast.beta is what scores, dataset values and the exported trainer's settings take; another one is said."""

from __future__ import annotations

import json

import pytest

import curate
from curate.console import Progress
from curate.plan.beta import dpo_beta
from curate.recipe.load import load_recipe
from curate.recipe.schema import ScoreRequest
from curate.report.summary import summarise
from curate.workflow.run import make_plan
from tests.workflow.pairs import pairs, write_rows

SAID = "DPO's β is 0.3 in this recipe (forecast.beta), and another one in flip_loss_b5 (0.5)"


def requests(*entries):
    return [ScoreRequest.read(entry) for entry in entries]


@pytest.mark.parametrize(
    ("given", "scores", "expected"),
    [
        (None, ["ches"], 0.1),
        (None, ["flip_loss"], 0.1),
        (0.3, ["flip_loss", {"implicit_reward_gap": {"beta": 0.5}}], 0.3),
        (None, ["implicit_reward_gap", {"flip_loss": {"beta": 0.3}}], 0.3),  # the scores agree
        (None, [{"flip_loss": {"beta": 0.3}}, {"flip_loss": {"beta": 0.5, "as": "other"}}], 0.1),
        (None, ["batch_forecast", {"flip_loss": {"beta": 0.3}}], 0.1),  # what the forecast was measured with
        (None, [{"mine:score": {"beta": 7}}], 0.1),
    ],
)
def test_the_beta_of_a_recipe(given, scores, expected):
    assert dpo_beta(given, requests(*scores)) == expected


def test_scores_values_card_and_trainer_take_the_recipes_beta(recipe, tmp_path):
    """A default flip_loss would have been 0.1, here and in trainer_args.json."""
    write_rows(tmp_path / "pairs.jsonl", pairs(12))
    scores = ["flip_loss", {"flip_loss": {"beta": 0.5, "as": "flip_loss_b5"}}]
    path = recipe(scores=scores, select={}, export={"to": "out"}, forecast={"beta": 0.3})
    assert any(note.startswith(SAID) for note in make_plan(load_recipe(path), progress=Progress(quiet=True)).notes())
    result = curate.run(path)
    gap = "rejected_logp - chosen_logp"
    found = result.store.sql(
        f"SELECT max(abs(flip_loss - ln(1 + exp(-0.3 * ({gap}))))) AS own, max(abs(flip_loss_b5 - ln(1 + exp(-0.5 * ({gap}))))) AS other FROM scored"
    )
    assert found["own"][0] < 1e-12 and found["other"][0] < 1e-12
    assert json.loads((tmp_path / "out" / "trainer_args.json").read_text())["beta"] == 0.3
    assert SAID in (tmp_path / "out" / "README.md").read_text()
    assert "flip_loss" in result.scores and not any("forecast.beta" in note for note in result.plan.unused)
    flips = summarise(result.store).flips
    assert all(flip.beta == 0.3 for flip in flips)


def test_a_forecasts_beta_is_the_trainers(recipe, tmp_path):
    """It was exported without any. The forecast is about every row at once, in one step."""
    write_rows(tmp_path / "pairs.jsonl", pairs(4))
    path = recipe(scores=["batch_forecast"], select={}, export={"to": "out"}, forecast={"beta": 0.3})
    curate.run(path)
    assert json.loads((tmp_path / "out" / "trainer_args.json").read_text())["beta"] == 0.3
    assert "DPO's β is" not in (tmp_path / "out" / "README.md").read_text()
