"""What `curate run` would refuse hours later, `curate plan` refuses now, with the same words."""

from __future__ import annotations

import json

import pytest
import yaml

import curate
from curate.console import Progress
from curate.errors import EngineError, ModelError, StoreError, UsageError, ValidationError
from curate.recipe.load import load_recipe
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?"} for i in range(6)]
SFT = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "answer": str(i + 1)} for i in range(6)]
PROMPTS = [{"prompt": f"{i} + 1 ="} for i in range(6)]
TALKS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "1"}], "answer": "1"}
    for i in range(3)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("models") / "reference", seed=0)


def write(folder, model, rows=PAIRS, kind="preference", **over):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "kind": kind,
        "source": "rows.jsonl",
        "models": {"reference": str(model)} if model else {},
        "engine": {"device": "cpu"},
        "scores": ["ranking_gap"] if kind == "preference" else ["accuracy"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw | over))
    return folder / "recipe.yaml"


def refused(path, error, says):
    """Both, and nothing is measured."""
    with pytest.raises(error, match=says) as planned:
        make_plan(load_recipe(path), progress=Progress(quiet=True))
    with pytest.raises(error, match=says) as run:
        curate.run(path)
    assert str(planned.value) == str(run.value)
    assert not curate.Store(path.parent / "store").measured()


SELECT = {"select": {"keep": {"rows": 3}}}
SAMPLED = {"engine": {"device": "cpu", "sampler": "transformers"}}


@pytest.mark.parametrize(
    ("rows", "kind", "over", "error", "says"),
    [
        (TALKS, "sft", {"scores": ["target_nll"]}, ModelError, "chat template"),
        (TALKS, "sft", SAMPLED, ModelError, "chat template"),
        (PAIRS, "preference", {"engine": {"device": "cuda:9"}}, ModelError, "engine.device: wanted cuda:9"),
        (SFT, "sft", {"engine": {"device": "cuda:9", "sampler": "transformers"}}, ModelError, "engine.device: wanted cuda"),
        (SFT, "sft", {"sampling": {"grader": "gsmk8"}, **SAMPLED}, UsageError, "gsmk8"),
        (SFT, "sft", {"sampling": {"grader": "missing_module:grade"}, **SAMPLED}, UsageError, "missing_module"),
        (SFT, "sft", {"sampling": {"few_shot": "shots.txt"}, **SAMPLED}, UsageError, "sampling.few_shot: shots.txt"),
        (PAIRS, "preference", {"tokens": {"max_length": 8, "truncation": "error"}}, ValidationError, "max_length"),
        (PAIRS, "preference", {**SELECT, "export": {"to": "rows.jsonl"}}, UsageError, "export.to"),
        (PAIRS, "preference", {**SELECT, "export": {"to": "rows.jsonl/inside"}}, UsageError, "export.to"),
        (PROMPTS, "sft", {**SELECT, "scores": [], "export": {"to": "out", "format": "prompt_completion"}}, ValidationError, "completion"),
        (PAIRS, "preference", {**SELECT, "export": {"to": "out", "push_to_hub": "me/set"}}, UsageError, "push_to_hub"),
    ],
)  # fmt: skip
def test_a_plan_refuses_what_a_run_would(model, tmp_path, monkeypatch, rows, kind, over, error, says):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused(write(tmp_path, model, rows, kind, **over), error, says)


def test_vllm_that_is_not_installed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("curate.passes.sampling.engines.vllm_distribution", lambda: None)
    over = {"engine": {"device": "cpu", "sampler": "vllm"}}
    refused(write(tmp_path, model, SFT, "sft", **over), EngineError, "vLLM is not installed here")


def test_a_store_without_room_for_shards(model, tmp_path):
    path = write(tmp_path, model)
    curate.run(path, set={"scores": []})
    folder = tmp_path / "store" / "shards"
    for file in sorted(folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(StoreError, match="store: .*shards"):
        make_plan(load_recipe(path), progress=Progress(quiet=True))


def test_a_server_alone_measures_no_weights(tmp_path):
    pytest.importorskip("openai")
    from tests.served import Served

    with Served() as server:
        over = {"engine": {"sampler": "openai", "device": "cpu"}, "server": {"url": server.url}}
        refused(write(tmp_path, None, **over), UsageError, "models.reference")


def test_a_url_without_its_sampler_names_the_key(model, tmp_path):
    path = write(tmp_path, model, SFT, "sft", server={"url": "http://localhost:1/v1"})
    with pytest.raises(UsageError, match=r"engine\.sampler=openai"):
        load_recipe(path)
    notes = make_plan(load_recipe(path, set={"engine.sampler": "transformers"}), progress=Progress(quiet=True)).notes()
    assert any("server.url (engine.sampler is transformers)" in note for note in notes)


def test_settings_that_no_score_reads_are_named(model, tmp_path):
    policy = make_llama(tmp_path / "policy", seed=3)
    unused = {
        "models": {"reference": str(model), "policy": str(policy)},
        "sampling": {"samples": 9},
        "gradients": {"parameters": 1},
        "forecast": {"warmup_steps": 3},
        "targets": {"refusals": {"path": "rows.jsonl", "of": "chosen"}},
    }
    path = write(tmp_path, model, **unused)
    (note,) = make_plan(load_recipe(path), progress=Progress(quiet=True)).unused
    assert note.startswith(
        "Not used by any score of this recipe: sampling.samples, gradients.parameters, forecast.warmup_steps, targets.refusals, models.policy."
    )
    idle = {"temperature": 0, "top_k": 5, "min_p": 0.1, "unfinished": "leave_out"}
    path = write(tmp_path, model, scores=["on_policy_gap"], sampling=idle, engine={"sampler": "transformers"})
    (note,) = make_plan(load_recipe(path), progress=Progress(quiet=True)).unused
    assert all(f"sampling.{key} (" in note for key in ("top_k", "min_p", "unfinished"))
    path = write(tmp_path, model, models=unused["models"], scores=["implicit_reward_gap"])
    assert make_plan(load_recipe(path), progress=Progress(quiet=True)).unused == []
