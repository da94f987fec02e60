"""A LoRA run from a recipe to the store: what PEFT's merged models give, gradients over A and B, and what the plan says of it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml

import curate
from curate.console import Progress
from curate.errors import ModelError, UsageError
from curate.jobs.collect import rounds
from curate.jobs.collect.candidates import from_pool
from curate.recipe.load import load_recipe
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

pytest.importorskip("peft", reason="PEFT is not installed (extra: prove)")

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?" + "!" * (i % 3)} for i in range(8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a run of two adapters and a half-written third, the same two merged by PEFT, and pairs."""
    from tests.passes.test_adapter import adapt

    folder = tmp_path_factory.mktemp("lora")
    make_llama(folder / "base", seed=0)
    for step in (10, 20):
        model = adapt(folder / "base", folder / "runs" / "dpo" / f"checkpoint-{step}", LORA, seed=step)
        model.merge_and_unload().save_pretrained(folder / "merged" / f"checkpoint-{step}")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / "merged" / f"checkpoint-{step}" / file).write_bytes((folder / "base" / file).read_bytes())
    half = folder / "runs" / "dpo" / "checkpoint-30"
    half.mkdir()
    (half / "adapter_config.json").write_text((half.parent / "checkpoint-20" / "adapter_config.json").read_text())
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return folder


def recipe(place, name: str, scores: list, **sections):
    told = {"kind": "preference", "store": f"stores/{name}", "source": "pairs.jsonl", "tokens": {"max_length": 64}}
    (place / f"{name}.yaml").write_text(yaml.safe_dump({**told, "scores": scores, **sections}))
    return place / f"{name}.yaml"


def test_a_run_of_adapters_equals_the_merged_models(place, capsys):
    skip = {"on_broken_checkpoint": "skip"}
    plans, frames = {}, {}
    alone = recipe(place, "run_lora", ["ranking_gap"], models={"reference": "runs/dpo/checkpoint-20"})
    curate.run(alone)  # a model of its own first, a checkpoint of the run afterwards
    for name, run in (("lora", "runs/dpo"), ("merged", "merged")):
        models = {"reference": "base", "policy": f"{run}/checkpoint-20", "checkpoints": run, **skip}
        result = curate.run(recipe(place, f"run_{name}", ["never_flipped", "implicit_reward_gap"], models=models))
        plans[name] = result.plan
        frames[name] = result.store.sql(
            "SELECT row_id, checkpoint, chosen_logp, rejected_logp FROM trajectories WHERE run <> '' ORDER BY row_id, step"
        )
        scored = result.store.sql("SELECT * FROM scored ORDER BY row_id")
        frames[name, "gap"] = scored["implicit_reward_gap"].to_numpy()
    assert len(frames["lora"]) == 2 * len(PAIRS)
    for column in ("chosen_logp", "rejected_logp"):
        np.testing.assert_allclose(frames["lora"][column].to_numpy(), frames["merged"][column].to_numpy(), rtol=1e-4)
    np.testing.assert_allclose(frames["lora", "gap"], frames["merged", "gap"], rtol=1e-3, atol=1e-4)
    assert len(plans["lora"].notes()) == 1 and "checkpoint-30" in plans["lora"].notes()[0]
    assert not plans["merged"].notes()
    again = curate.run(
        place / "run_lora.yaml"
    )  # measures nothing, prints nothing: the result itself says what is left out
    assert (
        not again.measured and again.text().startswith("Left out: ") and "checkpoint-30" in again.text().splitlines()[0]
    )
    assert again.to_json()["notes"] == plans["lora"].notes()
    capsys.readouterr()
    told = curate.run(place / "run_lora.yaml", progress=Progress())  # said while it runs, so not once more
    assert capsys.readouterr().err.count("checkpoint-30") == 1 and "checkpoint-30" not in told.text()


def test_gradients_over_the_adapter_are_their_own_measurement(place):
    models = {"reference": "runs/dpo/checkpoint-10"}
    found = {}
    for over in ("all", "lora", 1):
        file = recipe(place, "gradients", ["gradient_cosine"], models=models, gradients={"parameters": over})
        result = curate.run(file)
        assert result.measured.get("backward") == len(PAIRS)
        frame = result.store.sql("SELECT * FROM scored ORDER BY row_id", recipe="gradients")
        found[over] = frame["entk_cc"].to_numpy()
        shown = {"all": "entk", "lora": "entk (lora)", 1: "entk (last layer)"}[over]
        assert f" {shown} " in f" {result.plan.text()} "
    assert (found["lora"] < found["all"]).all() and not np.allclose(found[1], found["all"])
    again = curate.run(
        recipe(place, "gradients", ["gradient_cosine"], models=models)
    )  # "all" is as it was without the key
    assert not again.measured


def test_directions_over_the_adapter(place):
    """A and B alone move, and exact products say so; Adam's state of A and B says nothing of whole weights."""
    import torch

    from curate.passes.gradients import derivatives, mean
    from curate.passes.gradients.adam import second_moments
    from curate.passes.loading.model import load_model
    from curate.passes.tokenizer import load_tokenizer
    from curate.passes.tokens import Limits, encode
    from curate.rows import Pair

    adapter = place / "runs" / "dpo" / "checkpoint-10"
    models = {"reference": "base", "policy": "runs/dpo/checkpoint-10"}
    score = {"batch_forecast": {"step": "adam", "at": "policy"}}
    with load_model(adapter, base=place / "base", dtype="float32", device="cpu") as model:
        factors = [p.requires_grad_(True) for name, p in model.module.named_parameters() if "lora_" in name]
        optimizer = torch.optim.AdamW(factors, lr=0.0)
        for p in factors:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        torch.save(optimizer.state_dict(), place / "adam.pt")
    whole = recipe(place, "adam", [score], models=models, forecast={"optimizer": "adam.pt"})
    with pytest.raises(ModelError, match=r"(?s)of other parameters .*gradients\.parameters=lora"):
        make_plan(load_recipe(whole), progress=Progress(quiet=True))
    over = {"gradients": {"parameters": "lora"}, "forecast": {"optimizer": "adam.pt"}}
    result = curate.run(recipe(place, "adam", [score], models=models, **over))
    found = result.store.sql("SELECT row_id, batch_forecast FROM scored", recipe="adam")
    pairs = [Pair(**row) for row in PAIRS]
    encoded = [encode(pair, load_tokenizer(place / "base"), Limits(64)) for pair in pairs]
    logps = result.store.sql("SELECT row_id, chosen_logp, rejected_logp FROM scored", recipe="adam")
    by_id = {row[0]: row[1:] for row in logps.iter_rows()}
    reference = np.asarray([by_id[pair.row_id] for pair in pairs])
    with load_model(adapter, base=place / "base", dtype="float32", device="cpu") as model:
        weigh = mean.dpo_weights(0.1, len(pairs), reference)
        g = mean.accumulate(model, encoded, weigh, parameters="lora")
        assert all(".lora_" in name for name in g)
        v = mean.precondition(g, "adam", g, second_moments(place / "adam.pt", model.module))
        exact = derivatives.exact_products(model, encoded, v)[:, 0]
    values = dict(found.iter_rows())
    found = np.asarray([values[pair.row_id] for pair in pairs])
    assert np.abs(found - exact).max() < 5e-3 * exact.std()


def test_less_over_a_runs_adapters(place):
    """Cosines over A and B at both checkpoints against float64 autograd of their own factors, with each one's own Adam."""
    import torch

    from curate.passes.loading.model import load_model
    from curate.passes.tokenizer import load_tokenizer
    from curate.passes.tokens import Limits, encode
    from curate.rows import Example
    from tests.passes.test_backward import gradient

    rows = [Example(row["prompt"], row["chosen"]) for row in PAIRS]
    (place / "pool.jsonl").write_text(
        "\n".join(json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows)
    )
    (place / "target.jsonl").write_text(json.dumps({"prompt": "2 + 2 =", "completion": " 4"}))
    run = place / "runs" / "less"
    wanted, tokenizer = np.zeros(len(rows)), load_tokenizer(place / "base")
    for step in (10, 20):
        folder = shutil.copytree(place / "runs" / "dpo" / f"checkpoint-{step}", run / f"checkpoint-{step}")
        with load_model(folder, base=place / "base", dtype="float32", device="cpu") as model:
            named = {name: p for name, p in model.module.named_parameters() if "lora_" in name}
            optimizer = torch.optim.AdamW([p.requires_grad_(True) for p in named.values()], lr=0.0)
            for p in named.values():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            p = torch.cat(
                [1 / (p.grad.abs().double().flatten() + 1e-8) for p in named.values()]
            )  # v̂ = g² after one step
            module = model.module.double()
            factors = [p for name, p in module.named_parameters() if "lora_" in name]
            *mine, target = (
                gradient(module, encode(row, tokenizer, Limits(64)), factors)
                for row in (*rows, Example("2 + 2 =", " 4"))
            )
            for i, g in enumerate(mine):
                wanted[i] += float(torch.nn.functional.cosine_similarity(g * p, target, 0)) / 2
    result = curate.run(
        recipe(
            place, "less", [{"influence_cosine": {"target": "sums", "step": "adam"}}], kind="sft", source="pool.jsonl",
            models={"checkpoints": "runs/less", "base": "base"}, gradients={"parameters": "lora"},
            targets={"sums": {"path": "target.jsonl", "of": "completion"}},
        )
    )  # fmt: skip
    values = dict(result.store.sql("SELECT row_id, influence_cosine FROM scored").iter_rows())
    np.testing.assert_allclose([values[row.row_id] for row in rows], wanted, atol=1e-5)


def test_lora_gradients_of_a_whole_model_are_refused_before_anything_runs(place):
    file = recipe(place, "whole", ["gradient_cosine"], models={"reference": "base"}, gradients={"parameters": "lora"})
    with pytest.raises(UsageError, match=r"base is a whole model, not a LoRA adapter"):
        curate.run(file)


def test_checkpoints_that_no_score_asks_for_are_said(place):
    models = {"reference": "base", "checkpoints": ["runs/dpo/checkpoint-10", "runs/dpo/checkpoint-20"]}
    loaded = load_recipe(recipe(place, "plain", ["ranking_gap"], models=models))
    plan = make_plan(loaded, progress=Progress(quiet=True))
    assert "2 of 2 checkpoints are not measured (checkpoint-10, checkpoint-20)" in plan.text()
    assert "of base alone" in plan.text() and plan.to_json()["notes"] == plan.notes()


def test_each_subject_is_sampled_by_the_engine_that_takes_it(place, monkeypatch):
    """vLLM takes the base and one adapter, not the other: that one goes to transformers, which the plan knew, and back."""
    from types import SimpleNamespace

    from curate.models.checkpoints import Checkpoint
    from curate.passes.sampling import engines
    from curate.workflow.runners.sample import SampleRunner

    base, one, other = (str(place / p) for p in ("base", "runs/dpo/checkpoint-10", "runs/dpo/checkpoint-20"))
    log = []

    def choose(which, path, **_):
        return ("transformers" if path == other else "vllm"), "why"

    def opened(name, path, *, adapters, **_):
        log.append((name, path, adapters))
        return SimpleNamespace(name=name, use=lambda path, base: log.append(path), close=lambda: log.append("closed"))

    monkeypatch.setattr(engines, "choose_sampler", choose)
    monkeypatch.setattr("curate.passes.sampling.open.open_sampler", opened)
    runner = SampleRunner(load_recipe(recipe(place, "sampled", [], models={"reference": "base"})), Progress(quiet=True))
    runner.probe = SimpleNamespace(
        started=lambda *_: log.append("noise"), swapped=lambda *_: log.append("compared"), notes=[]
    )
    runner.checkpoints = [Checkpoint(base, "0"), Checkpoint(one, "1", base=base), Checkpoint(other, "2", base=base)]
    for at in (0, 1, 2, 0):
        task = SimpleNamespace(measured=SimpleNamespace(params={"tokenizer": "t"}, engine=""))
        of = {"tasks": (task,), "reads": "sample", "blocks": (), "missing": 1, "rows": 1}
        runner.use(SimpleNamespace(checkpoint=runner.checkpoints[at], **of))
        runner._start()  # as the first answer that has to be drawn does
    assert log == [
        ("vllm", base, [one]), "noise", one, "compared", "closed", ("transformers", other, [other]), "closed", ("vllm", base, [one]), "noise"
    ]  # fmt: skip


def test_rounds_of_adapters_collect_by_the_states_of_the_last_one(place):
    """The base is only where models.base says, and a half-written checkpoint lies beside the others."""
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "answer": str(i + 1)} for i in range(12)]
    for name, some in (("own", rows[:4]), ("pool", rows[4:])):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))

    def train(data, out, number):
        shutil.copytree(place / "runs" / "dpo", out)
        for file in out.glob("*/adapter_config.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "gone"}))

    path = recipe(
        place, "grown", [{"premem_accuracy": {"threshold": 1e-9}}, {"fluent": {"threshold": 1e-9}}], kind="sft", source="own.jsonl",
        models={"base": "base", "on_broken_checkpoint": "skip"}, select={}, engine={"sampler": "transformers"},
        sampling={"samples": 1, "max_new_tokens": 2},
    )  # fmt: skip
    lines = rounds.grow(
        path,
        out=place / "grown",
        rounds=1,
        take=3,
        train=train,
        asked={},
        collect=from_pool(str(place / "pool.jsonl"), "states"),
    )
    assert [(line["rows"], line["hard"]) for line in lines] == [(4, 4), (7, 7)]


@pytest.mark.parametrize("left", ["nothing", "config"])
def test_scores_of_a_moved_store_touch_no_adapter_s_base(place, tmp_path, left):
    """The adapters came along, their base did not, or only its configuration."""
    from curate.workflow.run import run_steps

    models = {"reference": "base", "checkpoints": "runs/dpo", "on_broken_checkpoint": "skip"}
    path = recipe(place, "moved", ["never_flipped"], models=models)
    before = curate.run(path).store.sql("SELECT row_id, never_flipped FROM scored ORDER BY 1").rows()
    shutil.copytree(place / "stores" / "moved", tmp_path / "stores" / "moved")
    shutil.copytree(place / "runs", tmp_path / "runs")
    for config in (tmp_path / "runs").rglob("adapter_config.json"):
        told = json.loads(config.read_text())
        config.write_text(json.dumps(told | {"base_model_name_or_path": "base"}))
    shutil.copy(path, tmp_path)
    if left == "config":
        (tmp_path / "base").mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(place / "base" / name, tmp_path / "base")
    found = run_steps(load_recipe(tmp_path / "moved.yaml"), ["score"], progress=Progress(quiet=True), command="score")
    assert found.store.sql("SELECT row_id, never_flipped FROM scored ORDER BY 1").rows() == before
