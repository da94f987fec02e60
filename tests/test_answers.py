"""Sampled answers are kept: other graders, thresholds and numbers of samples read them again; grades against what a new store gets."""

from __future__ import annotations

import json
import sys

import pytest

import curate
import curate.passes.sampling.open
from curate.console import Progress
from curate.recipe.load import load_recipe
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

OWN = """
def other_names(prompt, answer):
    return [] if prompt.startswith("cy") else ["the " + prompt, (prompt + " so", "t")]

def share(text, answer):  # a number, the share of the letters that the answer is
    return text.count(answer) / max(len(text), 1)
"""
RECIPE = """
kind: sft
source: rows.jsonl
models: {reference: model}
tokens: {max_length: 24}
engine: {sampler: transformers}
sampling: {samples: 4, temperature: 1.0, top_p: 1.0, max_new_tokens: 6, grader: {regex: "([a-z])"}}
scores: [accuracy]
"""
ANSWERS = "SELECT row_id, sample, text, n_tokens, logp, finished FROM samples ORDER BY ALL"
GRADED = "SELECT row_id, sample, text, correct, n_tokens, finished FROM samples ORDER BY ALL"
OTHER = ["sampling.grader={regex: '([a-m])'}"]


@pytest.fixture
def line(tmp_path):
    """A recipe over five rows, one of which leaves no room for an answer."""
    rows = [
        {"prompt": f"{word} says", "completion": f" {word[0]}", "answer": word[0]}
        for word in ["ada", "bea", "cy", "dot"]
    ]
    rows.append({"prompt": "a prompt of more than max_length", "completion": " e", "answer": "e"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "own_for_answers.py").write_text(OWN)
    make_llama(tmp_path / "model", seed=3)
    yield tmp_path / "recipe.yaml"
    sys.modules.pop("own_for_answers", None)


@pytest.fixture
def no_engine(monkeypatch):
    def opened(*_, **__):
        raise AssertionError("a sampling engine was started")

    monkeypatch.setattr(curate.passes.sampling.open, "open_sampler", opened)


def plan_of(recipe, settings):
    return make_plan(load_recipe(recipe, set=settings), progress=Progress(quiet=True))


def fresh(recipe, settings, name="fresh"):
    return curate.run(recipe, set=settings, store=recipe.parent / name).store


def test_another_grader_asks_no_model(line, request):
    first = curate.run(line).store
    before = first.sql(ANSWERS)
    assert len(before) == 4 * 4
    plan = plan_of(line, OTHER)
    assert "16 sampled answers are kept and graded anew" in plan.text() and "none has to be sampled" in plan.text()
    assert plan.to_json()["missing"] == 0 and plan.to_json()["steps"][-1]["answers_kept"] == 16
    wanted = fresh(line, OTHER)
    request.getfixturevalue("no_engine")
    result = curate.run(line, set=OTHER)
    assert result.measured == {"kept answers graded anew": 5}
    assert result.store.sql(ANSWERS).equals(before)
    assert result.store.sql(GRADED).equals(wanted.sql(GRADED))
    for view in ("scored", "trajectories"):
        columns = "SELECT row_id, n_samples, n_correct, accuracy FROM " + view + " ORDER BY row_id"
        assert result.store.sql(columns).equals(wanted.sql(columns))
    assert plan_of(line, OTHER).text().count("Everything is measured already") == 1
    assert curate.run(line).measured == {}  # the first grader's grades are there too, and shown again
    assert len(result.store.sql(GRADED)) == 16


def test_more_samples_draw_only_the_further_ones(line, monkeypatch):
    first = curate.run(line).store.sql(ANSWERS)
    wanted = fresh(line, ["sampling.samples=10"]).sql(ANSWERS)
    asked = []
    original = curate.passes.sampling.hf.HfSampler.sample

    def sample(self, prompts, sampling):
        asked.append((len(prompts), sampling.n, {p.first for p in prompts}))
        return original(self, prompts, sampling)

    monkeypatch.setattr(curate.passes.sampling.hf.HfSampler, "sample", sample)
    plan = plan_of(line, ["sampling.samples=10"])
    assert "16 sampled answers are kept" in plan.text() and "at most 24 more are sampled" in plan.text()
    more = curate.run(line, set=["sampling.samples=10"]).store.sql(ANSWERS)
    assert asked == [(4, 6, {4})]
    assert more.equals(wanted)
    assert more.filter(more["sample"] < 4).equals(first)
    fifth = more.filter(more["sample"] == 4)["text"].to_list()
    assert fifth != more.filter(more["sample"] == 0)["text"].to_list()  # a draw of its own


def test_fewer_samples_are_the_first(line, request):
    curate.run(line)
    request.getfixturevalue("no_engine")
    result = curate.run(line, set=["sampling.samples=3", *OTHER])
    assert result.measured == {"kept answers graded anew": 5}
    found = result.store.sql(ANSWERS)
    assert found["sample"].to_list() == [0, 1, 2] * 4
    assert result.store.sql("SELECT DISTINCT n_samples FROM scored WHERE n_samples > 0").to_series().to_list() == [3]


def test_greedy_answers_are_one(line, request):
    greedy = ["sampling.temperature=0", "sampling.samples=1"]
    curate.run(line, set=greedy)
    request.getfixturevalue("no_engine")
    result = curate.run(line, set=["sampling.temperature=0", "sampling.samples=3"])
    assert result.measured == {"kept answers graded anew": 5}
    assert result.store.sql("SELECT count(*), count(DISTINCT text) <= 4 FROM samples").row(0) == (12, True)


def test_other_settings_of_the_prompt_are_other_answers(line):
    curate.run(line)
    for changed in (
        "sampling.system=be brief",
        "sampling.temperature=0.5",
        "sampling.max_new_tokens=5",
        "engine.seed=1",
    ):
        assert not any(step.kept for step in plan_of(line, [changed]).steps), changed


def test_answers_to_perturbations_are_kept_too(line, request):
    perturb = ["sampling.perturb=own_for_answers:other_names", "scores=[limem]"]
    curate.run(line, set=perturb)
    assert len(curate.Store(line.parent / "store").sql(ANSWERS)) == 16  # `samples` shows answers to the rows themselves
    wanted = fresh(line, [*perturb, *OTHER, "sampling.samples=6"])
    more = curate.run(line, set=[*perturb, "sampling.samples=6"]).store
    query = "SELECT row_id, n_perturbed, perturbed_accuracy, accuracy, limem FROM scored ORDER BY row_id"
    request.getfixturevalue("no_engine")
    assert curate.run(line, set=[*perturb, *OTHER, "sampling.samples=6"]).store.sql(query).equals(wanted.sql(query))
    assert more.sql("SELECT max(perturbed_accuracy) FROM scored").item() is not None


def test_every_engine_seeds_a_sample_by_its_number():
    """Answers 4 and 5, drawn later, have the seeds that they would have had among six."""
    import numpy as np

    from curate.passes.sampling.hf import _uniforms
    from curate.passes.sampling.types import Prompt, Sampling, engine_seed
    from curate.passes.sampling.vllm import VllmSampler

    row, later = Prompt([1], "a", None, 7), Prompt([1], "a", None, 7, first=4)
    np.testing.assert_array_equal(_uniforms([later], 2, 9), _uniforms([row], 6, 9)[4:])
    sampler, calls = VllmSampler.__new__(VllmSampler), []
    sampler.context = 64
    sampler._call = lambda name, **given: calls.append(given) or [[("b", 1, -1.0, True)] * 2]
    sampler.sample([later], Sampling(2))
    assert calls[0]["seeds"] == [engine_seed(7) + 4]  # vLLM gives sample k of a request its seed + k


def test_explain_shows_a_few_answers_with_their_grades(line):
    from curate.report.explain import explain_row

    store = curate.run(line, set=["sampling.samples=6"]).store
    row_id = store.sql("SELECT row_id FROM scored WHERE prompt = 'ada says'").item()
    right = store.sql("SELECT count(*) FILTER (correct) FROM samples WHERE row_id = ?", [row_id]).item()
    text = explain_row(store, row_id).text()
    assert f"answers of model: {right} of 6 right" in text and "2 more answers: --all" in text
    every = explain_row(store, row_id, every_answer=True)
    assert every.text().count("\n  right") + every.text().count("\n  wrong") == 6 and "--all" not in every.text()
    assert len(every.to_json()["answers"]) == 6
