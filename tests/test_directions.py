"""Scores along directions, from a recipe to the store: against exact products, resumed, side by side, over checkpoints, after a warm-up."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

import curate
from curate.console import Progress
from curate.errors import ModelError, UsageError
from curate.passes.gradients import derivatives as along
from curate.passes.gradients import mean as direction
from curate.passes.loading.model import load_model
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import Limits, encode
from curate.recipe.load import load_recipe
from curate.rows import Example, Pair
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?" + "!" * (i % 3)} for i in range(12)]
REFUSALS = [{"prompt": f"hurt {w}", "chosen": " no.", "rejected": " yes!"} for w in ("me", "you", "them")]
ANSWERS = [{"prompt": f"{i} + 2 =", "completion": f" {i + 2}"} for i in range(5)]


@pytest.fixture
def line(tmp_path):
    """run(kind, *scores, **rest of the recipe) -> the Result; run.misses(…) -> {measurement: rows it would measure}."""
    make_llama(tmp_path / "model", seed=0)
    for name, rows in (("pairs", PAIRS), ("refusals", REFUSALS), ("answers", ANSWERS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(kind, scores, rest):
        source = {"path": "pairs.jsonl" if kind == "preference" else "answers.jsonl"}
        recipe = {"kind": kind, "source": source, "models": {"reference": "model"}, "scores": list(scores)} | rest
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return tmp_path / "recipe.yaml"

    def run(kind, *scores, **rest):
        return curate.run(write(kind, scores, rest))

    def misses(kind, *scores, **rest):
        plan = make_plan(load_recipe(write(kind, scores, rest)), progress=Progress(quiet=True))
        blocks = [(task, rows) for step in plan.steps for _, rows, tasks in step.blocks for task in tasks]
        return {task.measurement.name: len(rows) for task, rows in blocks}

    run.misses = misses
    run.folder = tmp_path
    return run


def column(store, name: str, rows: list) -> np.ndarray:
    """A column of `scored` in the order of the rows."""
    found = store.sql(f"SELECT row_id, {name} FROM scored")
    by_id = dict(zip(found["row_id"], found[name]))
    return np.asarray([by_id[row.row_id] for row in rows], float)


def encoded_pairs(folder, rows=PAIRS):
    pairs = [Pair(**row) for row in rows]
    return pairs, [encode(pair, load_tokenizer(folder), Limits(1024)) for pair in pairs]


def close(found, wanted, share=2e-3):
    assert np.abs(found - wanted).max() < share * wanted.std(), (found, wanted)


def test_forecasts_contributions_and_influence(line):
    """Every score against exact products at the reference, two settings of one side by side; the second run has nothing to do."""
    scores = [
        {"batch_forecast": {"step": "sign"}}, {"batch_forecast": {"step": "sgd", "as": "bf_sgd"}}, {"margin_forecast": {"step": "sgd"}},
        {"displacement_contribution": {"step": "sign", "at": "reference"}}, {"influence": {"target": "refusals"}},
        {"influence": {"target": "answers", "step": "sign", "as": "on_answers"}}, "head_forecast",
    ]  # fmt: skip
    targets = {
        "refusals": {"path": "refusals.jsonl", "of": "chosen"},
        "answers": {"path": "answers.jsonl", "of": "completion"},
    }
    result = line("preference", *scores, targets=targets, forecast={"beta": 0.3})
    store, model = result.store, load_model(line.folder / "model")
    rows, pairs = encoded_pairs(line.folder / "model")
    step = direction.accumulate(model, pairs, direction.dpo_weights(0.3, 12))
    chosen = direction.accumulate(model, pairs, direction.fixed_weights(1 / 12, 0))
    refusals = encoded_pairs(line.folder / "model", REFUSALS)[1]
    target = direction.accumulate(model, refusals, direction.fixed_weights(1 / 3, 0))
    tokenizer = load_tokenizer(line.folder / "model")
    answers = [encode(Example(**row), tokenizer, Limits(1024)) for row in ANSWERS]
    on_answers = direction.accumulate(model, answers, direction.fixed_weights(1 / 5))
    sgd = along.exact_products(model, pairs, step)
    sign = along.exact_products(model, pairs, direction.precondition(step, "sign", step))
    close(column(store, "batch_forecast", rows), sign[:, 0])
    close(column(store, "bf_sgd", rows), sgd[:, 0])
    close(column(store, "margin_forecast", rows), sgd @ [1, -1])
    for name, x, kind in (
        ("displacement_contribution", chosen, "sign"),
        ("influence", target, "sgd"),
        ("on_answers", on_answers, "sign"),
    ):
        exact = along.exact_products(model, pairs, direction.precondition(x, kind, step))
        # differences of forwards, ε checked to 5e-4 (root mean square) on 8 of the rows: of the worst row of all, ten times that. Along another
        # gradient, coordinates where G is nearly 0, and rounding its sign, weigh most
        close(column(store, name, rows), 0.15 * exact @ [1, -1], 2e-2 if kind == "sign" else 5e-3)
    np.testing.assert_allclose(
        column(store, "displacement_contribution", rows).mean(), column(store, "batch_forecast", rows).mean(), rtol=1e-2
    )
    head = direction.accumulate_head(model, pairs, direction.dpo_weights(0.3, 12))
    np.testing.assert_allclose(
        column(store, "head_forecast", rows), along.head_derivatives(model, pairs, head)[:, 0], rtol=1e-4
    )
    assert result.measured["direction"] == 12
    assert not line.misses("preference", *scores, targets=targets, forecast={"beta": 0.3})
    of_beta = line.misses("preference", *scores, targets=targets)  # another β, another step and other weights
    assert len(of_beta) == 6 and set(of_beta.values()) == {12}
    (line.folder / "refusals.jsonl").write_text(json.dumps(REFUSALS[0]))
    assert line.misses("preference", *scores, targets=targets, forecast={"beta": 0.3}) == {"influence_refusals_sgd": 12}


def test_killed_between_shards_it_goes_on(line, monkeypatch):
    """What was made is not made again, and the values are those of an undisturbed run."""
    monkeypatch.setitem(curate.plan.missing.SHARD_ROWS, "direction", 4)
    whole = line("preference", "batch_forecast")
    rows, _ = encoded_pairs(line.folder / "model")
    wanted = column(whole.store, "batch_forecast", rows)
    shutil.rmtree(line.folder / "store")
    from curate.workflow.runners import directions as forecasting

    run, made = forecasting.DirectionRunner.run, []

    def killed(self, rows, *rest):
        if made:
            raise KeyboardInterrupt
        made.append(len(rows))
        return run(self, rows, *rest)

    monkeypatch.setattr(forecasting.DirectionRunner, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        line("preference", "batch_forecast")
    monkeypatch.setattr(forecasting.DirectionRunner, "run", run)
    monkeypatch.setattr(direction, "accumulate", lambda *a, **k: pytest.fail("the gradient was there"))
    again = line("preference", "batch_forecast")
    assert again.measured["direction"] == 8
    np.testing.assert_array_equal(column(again.store, "batch_forecast", rows), wanted)


def test_margins_belong_to_the_references_own_precision(line):
    """At the policy a row's weight is against the reference's log-probabilities: other ones, other values."""
    make_llama(line.folder / "policy", seed=1)
    scores = [{"batch_forecast": {"at": "policy", "step": "sgd"}}, {"influence": {"target": "refusals"}}]
    rest = {
        "models": {"reference": "model", "policy": "policy"},
        "targets": {"refusals": {"path": "refusals.jsonl", "of": "chosen"}},
    }
    line("preference", *scores, **rest)
    assert not line.misses("preference", *scores, **rest)
    other = line.misses("preference", *scores, **rest, engine={"dtype": "bfloat16"})
    assert other == {"likelihood": 12, "forecast_sgd": 12}  # the reference's own influence has no margins


def test_what_was_kept_may_be_deleted_and_what_a_killed_process_left_is(line):
    folder = line.folder / "store" / "directions"
    line("preference", "batch_forecast")
    (folder / ".warmup-x.1").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / f".{file.name}.1")
    result = line("preference", "batch_forecast", heldout={"path": "refusals.jsonl"})
    assert result.measured["direction"] == 3 and not list(folder.glob(".*"))


def test_what_no_recipe_uses_any_more_is_deleted(line):
    """Directions over rows that have changed; those of another recipe in the store stay."""
    kept = lambda: {path.name for path in (line.folder / "store" / "directions").iterdir()}  # noqa: E731
    targets = {"refusals": {"path": "refusals.jsonl", "of": "chosen"}}
    line("preference", {"influence": {"target": "refusals"}}, targets=targets)
    of_the_other = kept()
    (line.folder / "recipe.yaml").rename(line.folder / "other.yaml")
    curate.run(line.folder / "other.yaml")
    forecast = {"warmup_steps": 1, "warmup_rows": 2}
    scores = ["batch_forecast", {"batch_forecast": {"step": "adam", "at": "warmup", "as": "there"}}]
    line("preference", *scores, forecast=forecast)
    mine = kept() - of_the_other
    assert len(of_the_other) == 2 and len(mine) == 7  # two gradients, two P·G, two json, a warm-up
    (line.folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS[1:])))
    line("preference", *scores, forecast=forecast)
    assert not kept() & mine and of_the_other < kept() and len(kept()) == 9


def test_the_step_length_is_checked_on_rows_that_can_be_measured(line, monkeypatch):
    """Every other row is too long here; what remains is measured as if they were not there."""
    monkeypatch.setattr("curate.workflow.runners.directions.CHECKED", 6)
    long = [row | {"prompt": row["prompt"] + " " * 90 * (i % 2 == 0)} for i, row in enumerate(PAIRS)]
    (line.folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, long)))
    result = line(
        "preference", "batch_forecast", tokens={"max_length": 64, "truncation": "drop"}, select={"unknown": "keep"}
    )
    rows, pairs = encoded_pairs(line.folder / "model", long[1::2])
    model = load_model(line.folder / "model")
    step = direction.accumulate(model, pairs, direction.dpo_weights(0.1, 6))
    exact = along.exact_products(model, pairs, direction.precondition(step, "sign", step))
    close(column(result.store, "batch_forecast", rows), exact[:, 0])


def test_a_gradient_that_is_not_finite_is_no_direction(line):
    model = load_model(line.folder / "model")
    with torch.no_grad():
        model.module.model.norm.weight[0] = float("nan")
    model.module.save_pretrained(line.folder / "model")
    with pytest.raises(ModelError, match="gradient of the set's step at model is not finite"):
        line("preference", "batch_forecast")


def test_after_a_warm_up(line):
    """Contribution at the warmed-up model with Adam's state: margins are against the reference; its mean is the mean forecast there."""
    forecast = {"warmup_steps": 3, "warmup_rows": 4, "learning_rate": 1e-3}
    scores = ["displacement_contribution", {"batch_forecast": {"step": "adam", "at": "warmup"}}]
    result = line("preference", *scores, {"batch_forecast": {"step": "adam", "as": "now"}}, forecast=forecast)
    rows, pairs = encoded_pairs(line.folder / "model")
    contribution, there, now = (
        column(result.store, name, rows) for name in ("displacement_contribution", "batch_forecast", "now")
    )
    np.testing.assert_allclose(contribution.mean(), there.mean(), rtol=1e-2)
    assert not np.allclose(there, now)
    (folder,) = (line.folder / "store" / "directions").glob("warmup-*")
    reference, model = load_model(line.folder / "model"), load_model(folder)
    from curate.measurements import MEASUREMENTS
    from curate.passes import forward

    logps = [
        np.stack(list(forward.measure(m, pairs, [MEASUREMENTS["likelihood"]]).values()), 1) for m in (reference, model)
    ]
    s = 0.1 / (1 + np.exp(0.1 * (logps[1] - logps[0]) @ [1, -1]))
    assert s.std() > 1e-4
    v = direction.accumulate(model, pairs, direction.fixed_weights(1 / 12, 0))
    v = direction.precondition(v, "adam", v, direction.load_vector(folder / "second_moments.safetensors"))
    close(contribution, s * (along.exact_products(model, pairs, v) @ [1, -1]))
    assert not line.misses("preference", *scores, forecast=forecast)


def test_a_warm_up_that_diverges_is_told_and_not_kept(line):
    """Weights that are not finite, and weights that are, at which no gradient is."""
    scores = [{"batch_forecast": {"step": "adam", "at": "warmup"}}]
    forecast = {"warmup_steps": 2, "warmup_rows": 4}
    with pytest.raises(ModelError, match=r"left the finite numbers\. Lower `forecast\.learning_rate` \(3e\+38\)"):
        line("preference", *scores, forecast=forecast | {"learning_rate": 3e38})
    assert not list((line.folder / "store" / "directions").glob("warmup-*"))
    with pytest.raises(ModelError, match="is not finite: .* Did the warm-up diverge"):
        line("preference", *scores, forecast={"warmup_steps": 1, "warmup_rows": 4, "learning_rate": 1e30})


def test_influence_over_the_checkpoints_of_a_run(line):
    """TracIn with the trainer's learning rates, LESS with its optimizers; a checkpoint without one is said."""
    model = load_model(line.folder / "model")
    rows = [Example(**row) for row in ANSWERS]
    encoded = [encode(row, load_tokenizer(line.folder / "model"), Limits(1024)) for row in rows]
    lengths = np.asarray([row.n_response for row in encoded])
    wanted = {"sgd": np.zeros(5), "adam": np.zeros(5)}
    optimizer = torch.optim.AdamW(model.module.requires_grad_(True).parameters(), lr=1e-2)
    log = []
    for at, rate in ((2, 0.5), (4, 0.25)):
        for p in model.module.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(at))
        optimizer.step()
        folder = line.folder / "run" / f"checkpoint-{at}"
        shutil.copytree(line.folder / "model", folder)
        model.module.save_pretrained(folder)
        names = [name for name, _ in model.module.named_parameters()]
        state = optimizer.state_dict()
        state["param_groups"][0]["param_names"] = names
        torch.save(state, folder / "optimizer.pt")
        log += [{"step": at - 1, "learning_rate": rate + 0.1}, {"step": at, "learning_rate": rate - 0.1}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": at, "log_history": log}))
        here = load_model(folder)
        target = direction.accumulate(here, encoded, direction.fixed_weights(1 / 5))
        moments = {
            n: optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** (at // 2)) for n, p in model.module.named_parameters()
        }
        for kind in wanted:
            v = direction.precondition(target, kind, target, moments)
            wanted[kind] += rate * along.exact_products(here, encoded, v)[:, 0] / lengths
    targets = {"answers": {"path": "answers.jsonl", "of": "completion"}}
    scores = [{"influence": {"target": "answers"}}, {"influence": {"target": "answers", "step": "adam", "as": "less"}}]
    result = line("sft", *scores, targets=targets, models={"checkpoints": "run"})
    close(column(result.store, "influence", rows), wanted["sgd"])
    close(column(result.store, "less", rows), wanted["adam"])
    (line.folder / "run" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(UsageError, match=r"no optimizer\.pt"):
        line("sft", *scores, targets=targets, models={"checkpoints": "run"})


def saved(optimizer, file) -> None:
    """The state after one step with random gradients."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    torch.save(optimizer.state_dict(), file)


def test_a_wrong_optimizer_is_said_before_anything_is_loaded(line, monkeypatch):
    """By the plan, and by a run that has measured nothing yet; where all is measured nobody asks."""
    make_llama(line.folder / "wide", seed=0, hidden=96)
    with load_model(line.folder / "model") as own, load_model(line.folder / "wide") as wide:
        parameters = {m: [p.requires_grad_(True) for p in m.module.parameters()] for m in (own, wide)}
        saved(torch.optim.AdamW(parameters[own]), line.folder / "own.pt")
        saved(torch.optim.AdamW(parameters[wide]), line.folder / "other.pt")
        saved(torch.optim.AdamW(parameters[own][:-1]), line.folder / "fewer.pt")
        saved(torch.optim.SGD(parameters[own], lr=0.1, momentum=0.9), line.folder / "sgd.pt")
    (line.folder / "text.pt").write_text("nothing")
    score = {"batch_forecast": {"step": "adam"}}
    assert line("preference", score, forecast={"optimizer": "own.pt"}).measured["direction"] == 12
    folder = line.folder / "store"
    shutil.rmtree(folder)
    monkeypatch.setattr("curate.passes.forward.load_model", lambda *a, **k: pytest.fail("a model is loaded"))
    for name, says in (
        (
            "other",
            r"exp_avg_sq of model.embed_tokens.weight; it has shape \(\d+, 96\), not \(\d+, 64\): the optimizer of another",
        ),
        ("fewer", "not those of this model"),
        ("sgd", "wanted Adam's state .* keeps momentum_buffer"),
        ("text", "wanted a trainer's saved optimizer"),
    ):
        for asked in (line.misses, line):
            with pytest.raises(ModelError, match=rf"(?s){name}\.pt: .*{says}"):
                asked("preference", score, forecast={"optimizer": f"{name}.pt"})
        assert curate.Store(folder).measured() == []


def test_what_a_user_can_get_wrong(line):
    with pytest.raises(UsageError, match="did you mean 'refusals'"):
        line(
            "preference",
            {"influence": {"target": "refusal"}},
            targets={"refusals": {"path": "refusals.jsonl", "of": "chosen"}},
        )
    with pytest.raises(UsageError, match="'target' has no default"):
        line("preference", "influence")
    with pytest.raises(UsageError, match="'sgd' or 'sign' or 'adam'"):
        line("preference", {"batch_forecast": {"step": "adamw"}})
    with pytest.raises(UsageError, match=r"forecast\.optimizer: nowhere\.pt is not a file"):
        line("preference", {"batch_forecast": {"step": "adam"}}, forecast={"optimizer": "nowhere.pt"})
    with pytest.raises(UsageError, match=r"line \d+: 'targets\.x\.of' is missing"):
        line("preference", "batch_forecast", targets={"x": "refusals.jsonl"})
