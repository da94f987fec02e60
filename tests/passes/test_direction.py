"""Directions against float64 autograd and TRL's loss; derivatives along them against exact products; the weights as they were."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.errors import ModelError
from curate.passes.gradients import derivatives as along
from curate.passes.gradients import mean
from curate.passes.gradients.adam import second_moments
from curate.passes.gradients.warmup import WarmUp, warm_up
from curate.passes.loading.model import Model
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import Encoded, encode
from curate.rows import Pair
from tests.passes.forward_models import FAMILIES, double, make, oracle, random_pairs

BETA = 0.3
SHORT = {"phi3_long", "llama_dynamic"}  # from 20 tokens on their angles depend on the row


def dpo_gradient(module64: torch.nn.Module, pairs: list, reference: np.ndarray) -> dict[str, torch.Tensor]:
    """Minus the gradient of the mean DPO loss, one sequence at a time, full logits."""
    module64.requires_grad_(True)
    module64.zero_grad()

    def logp(side: Encoded) -> torch.Tensor:
        ids = torch.from_numpy(side.ids.astype(np.int64))[None]
        found = module64(input_ids=ids, use_cache=False).logits[0, side.start - 1 : -1].log_softmax(-1)
        return found.gather(1, ids[0, side.start :, None]).sum()

    for pair, (chosen, rejected) in zip(pairs, reference):
        margin = logp(pair.chosen) - chosen - logp(pair.rejected) + rejected
        (torch.nn.functional.logsigmoid(BETA * margin) / len(pairs)).backward()
    return {name: p.grad.clone() for name, p in module64.named_parameters()}


def reference_of(module: torch.nn.Module, pairs: list) -> np.ndarray:
    found = oracle(double(module), pairs)
    return np.stack([found["chosen_logp"], found["rejected_logp"]], 1)


def error(found: dict, wanted: dict) -> float:
    assert found.keys() == wanted.keys()
    size = sum(w.double().square().sum() for w in wanted.values()) ** 0.5
    return float(sum((found[n].double() - wanted[n]).square().sum() for n in wanted).detach() ** 0.5 / size.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_dpos_gradient(family):
    """Of every architecture, also those without packed attention or a rule of the backward pass; at the reference and away from it."""
    module = make(family)
    pairs = random_pairs(5, longest=7 if family in SHORT else 20)
    own = reference_of(module, pairs)
    found = mean.accumulate(Model(module), pairs, mean.dpo_weights(BETA, len(pairs)))
    assert error(found, dpo_gradient(double(module), pairs, own)) < 3e-6
    if family in ("llama_tied", "mamba"):
        other = own + np.random.default_rng(0).normal(scale=3, size=own.shape)
        found = mean.accumulate(Model(module), pairs, mean.dpo_weights(BETA, len(pairs), other))
        assert error(found, dpo_gradient(double(module), pairs, other)) < 3e-6


def test_the_step_is_trls(shared, tmp_path):
    """TRL's own DPO loss on real pairs, its collation and its reference, backward through its model."""
    pytest.importorskip("trl")
    import pyarrow.parquet as parquet

    from tests.passes.test_forward_trl import trl_trainer

    folder = str(shared / "models" / "stories260K")
    table = parquet.read_table(shared / "data" / "hh_rlhf_harmless" / "pairs.parquet").slice(0, 12).to_pylist()
    table = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in table]
    tokenizer = load_tokenizer(folder)
    trainer = trl_trainer(folder, table, tokenizer, tmp_path, "keep_start")
    trainer.model.eval()
    features = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(features))).backward()
    wanted = {name: -p.grad for name, p in trainer.model.named_parameters()}
    from transformers import AutoModelForCausalLM

    from curate.passes.tokens import Limits

    pairs = [encode(Pair(**row), tokenizer, Limits(256)) for row in table]
    pairs = [pair for pair in pairs if pair.problem is None]
    assert len(pairs) == len(features)
    model = Model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    found = mean.accumulate(model, pairs, mean.dpo_weights(0.1, len(pairs)))
    assert error(found, wanted) < 1e-5


def test_any_batch_and_layout():
    module, pairs = make("llama_tied"), random_pairs(16)
    weigh = mean.dpo_weights(BETA, 16)
    wanted = mean.accumulate(Model(double(module)), pairs, weigh)
    for layout in ("auto", "padded"):
        for budget in (1, 150, 16384):
            found = mean.accumulate(Model(module, layout=layout), pairs, weigh, token_budget=budget)
            assert error(found, wanted) < 1e-6


def test_blocks_of_the_head(monkeypatch):
    module, pairs = make("phi"), random_pairs(9)
    weigh = mean.dpo_weights(BETA, 9, np.random.default_rng(1).normal(scale=9, size=(9, 2)))
    wanted = mean.accumulate(Model(double(module)), pairs, weigh)
    monkeypatch.setattr("curate.passes.head.COLUMNS", 16)
    monkeypatch.setattr("curate.passes.gradients.head.ROWS", 7)
    for keep in (0, 20 * 101 * 4, 1 << 20):  # one row at a time without its logits; a few rows; all
        monkeypatch.setattr("curate.passes.gradients.head.KEEP", keep)
        assert error(mean.accumulate(Model(module), pairs, weigh), wanted) < 1e-6


@pytest.mark.parametrize(
    "family, step", [("llama_tied", "sign"), ("gemma2", "sign"), ("gpt2", "sgd"), ("mamba", "sgd")]
)
def test_derivatives_are_the_exact_products(family, step):
    module, pairs = make(family), random_pairs(20)
    model, model64 = Model(module), Model(double(module))
    step_ = mean.accumulate(model, pairs, mean.dpo_weights(BETA, len(pairs)))
    v = mean.precondition(step_, step, step_)
    exact = along.exact_products(model64, pairs, v)
    with along.Line(model, v) as line:
        chosen = along.choose_epsilon(line, pairs)
        found = along.derivatives(line, pairs, chosen.value)
    assert chosen.rows == along.SAMPLE and chosen.error < 5e-3
    for a, b in ((found.derivative[:, 0], exact[:, 0]), (found.derivative @ [1, -1], exact @ [1, -1])):
        assert np.sqrt(np.mean((a - b) ** 2)) < 2e-3 * b.std()
        assert along.spearman(a, b) >= 0.9999 or family == "mamba"
    np.testing.assert_allclose(found.logp, reference_of(module, pairs), rtol=1e-3)


def test_mean_contribution_is_mean_forecast():
    """mean_j s_j⟨P·ḡ+, g+_j − g−_j⟩ = ⟨ḡ+, P·G⟩ = mean_i ⟨g+_i, P·G⟩ for any diagonal that is taken at G and then fixed."""
    pairs = random_pairs(10)
    model = Model(double(make("qwen3")))
    step = mean.accumulate(model, pairs, mean.dpo_weights(BETA, 10))
    chosen = mean.accumulate(model, pairs, mean.fixed_weights(0.1, 0))
    torch.manual_seed(0)
    adam = {name: torch.rand_like(value) ** 4 for name, value in step.items()}
    for kind in ("sgd", "sign", "adam"):
        means = []
        for x, take in ((step, [1, 0]), (chosen, [BETA / 2, -BETA / 2])):
            v = mean.precondition(x, kind, step, adam)
            means.append((along.exact_products(model, pairs, v) @ take).mean())
        np.testing.assert_allclose(means[0], means[1], rtol=1e-6)  # its norms are float32


@pytest.mark.parametrize("family", ["llama", "llama_tied", "phi", "gemma2"])
def test_the_heads_part(family):
    """Forward only: the head's own entries of the step, and each row's exact product with them."""
    module, pairs = make(family), random_pairs(7)
    model, weigh = Model(module), mean.dpo_weights(BETA, 7)
    head = mean.accumulate_head(model, pairs, weigh)
    untied = double(module)
    linear = untied.get_output_embeddings()
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
    names = {name: f"lm_head.{name}" for name in head}
    whole = mean.accumulate(Model(untied), pairs, weigh)
    assert error(head, {name: whole[names[name]] for name in head}) < 1e-6
    found = along.head_derivatives(model, pairs, head)
    zero = {name: torch.zeros_like(value) for name, value in whole.items()}
    exact = along.exact_products(Model(untied), pairs, zero | {names[name]: value for name, value in head.items()})
    np.testing.assert_allclose(found, exact, atol=1e-6 * np.abs(exact).max())


def test_the_weights_are_put_back():
    module = make("llama_tied")
    model, pairs = Model(module), random_pairs(3)
    before = {name: p.clone() for name, p in module.named_parameters()}
    v = mean.accumulate(model, pairs, mean.fixed_weights(1, -1))
    with pytest.raises(KeyboardInterrupt), along.Line(model, v) as line:
        line.to(1e-3)
        assert not torch.equal(next(iter(module.parameters())), next(iter(before.values())))
        raise KeyboardInterrupt
    with along.Line(model, v) as line:
        along.derivatives(line, pairs, 1e-5)
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad


def test_sft_rows_and_rows_with_a_problem():
    module = make("mistral_window")
    rows = [pair.chosen for pair in random_pairs(8)]
    rows[2] = replace(rows[2], problem="cut off")
    model64 = Model(double(module))
    v = mean.accumulate(model64, rows, mean.token_mean_weights(rows, 7))
    exact = along.exact_products(model64, rows, v)
    lengths = np.asarray([row.n_response for row in rows])
    known = np.arange(8) != 2
    np.testing.assert_allclose(
        (exact[known, 0] / lengths[known]).mean(), float(sum(x.square().sum() for x in v.values()))
    )
    with along.Line(Model(module), v) as line:
        found = along.derivatives(line, rows, along.choose_epsilon(line, rows).value).derivative
    assert np.isnan(found[:, 0]).tolist() == np.isnan(exact[:, 0]).tolist() == [i == 2 for i in range(8)]
    np.testing.assert_allclose(found[known], exact[known], atol=2e-3 * exact[known].std())


def test_what_gives_no_direction():
    model, pairs = Model(make("llama")), random_pairs(2)
    with pytest.raises(ModelError, match="not of both at once"):
        mean.accumulate(model, [pairs[0], pairs[1].chosen], mean.fixed_weights(1, 0))
    with pytest.raises(ModelError, match="no row can be measured"):
        mean.accumulate(model, [replace(pairs[0].chosen, problem="empty")], mean.fixed_weights(1))
    with pytest.raises(ModelError, match="warm-up"):
        mean.precondition({}, "adam", {})
    moments = {"w": torch.tensor([4.0, 0.0])}  # no gradient has ever come to the second
    assert mean.precondition({"w": torch.tensor([6.0, 5.0])}, "adam", {}, moments)["w"].tolist() == [3.0, 0.0]
    whole = {"lm_head.weight": torch.ones(2)}
    with pytest.raises(ModelError, match=r"(?s)other parameters \(q\.lora_A.*gradients\.parameters=lora"):
        mean.precondition(whole, "adam", whole, {"q.lora_A.weight": torch.ones(2)})
    with pytest.raises(ModelError, match='bfloat16 cannot hold. Load the model with dtype="float32"'):
        mean.accumulate(Model(make("llama").bfloat16()), pairs, mean.fixed_weights(1, 0))
    with along.Line(model, {"lm_head.weight": torch.zeros(101, 32)}) as line:  # nothing moves
        assert along.derivatives(line, pairs, along.choose_epsilon(line, pairs).value).derivative.tolist() == [
            [0, 0],
            [0, 0],
        ]


def test_no_step_length_is_made_up():
    """Where no row can be measured, or what is measured is not finite: "nothing moves" is another thing."""
    model, pairs = Model(make("llama")), random_pairs(3)
    v = mean.accumulate(model, pairs, mean.fixed_weights(1, 0))
    unmeasurable = [replace(pair, chosen=replace(pair.chosen, problem="cut off")) for pair in pairs]
    with along.Line(model, v) as line, pytest.raises(ModelError, match="none of 3 rows"):
        along.choose_epsilon(line, unmeasurable)
    with (
        along.Line(model, {name: value * float("nan") for name, value in v.items()}) as line,
        pytest.raises(ModelError, match="not finite"),
    ):
        along.choose_epsilon(line, pairs)


def test_an_error_that_one_response_hides_is_said(monkeypatch):
    """Where the rejected responses' differences are not finite, the step length is not as good as the chosen ones'."""
    model, pairs = Model(make("llama")), random_pairs(3)
    v = mean.accumulate(model, pairs, mean.fixed_weights(1, 0))
    plain = along.derivatives
    broken = lambda *a, **k: replace(plain(*a, **k), derivative=plain(*a, **k).derivative * [1, np.nan])  # noqa: E731
    monkeypatch.setattr(along, "derivatives", broken)
    with along.Line(model, v) as line:
        found = along.choose_epsilon(line, pairs)
    assert np.isnan(found.error) and np.isnan(found.rank)


def test_a_direction_of_some_parameters():
    """The last layer's alone: exact products and derivatives are over these."""
    model, pairs = Model(make("llama")), random_pairs(12)
    v = mean.accumulate(model, pairs, mean.dpo_weights(BETA, 12), parameters=1)
    assert "model.layers.0.mlp.up_proj.weight" not in v and "model.layers.1.mlp.up_proj.weight" in v
    exact = along.exact_products(model, pairs, v)
    zero = {name: torch.zeros_like(p) for name, p in model.module.named_parameters()}
    np.testing.assert_allclose(exact, along.exact_products(model, pairs, zero | v), rtol=1e-5)
    with along.Line(model, v) as line:
        assert along.choose_epsilon(line, pairs).error < 5e-3


def test_short_memory_halves_every_batch_and_the_sums_begin_anew():
    """Layers run, gradients are added, then memory is short: nothing of the failed batch stays in the sum."""
    model, pairs = Model(make("llama")), random_pairs(8)
    wanted, whole, counted = mean.accumulate(model, pairs, mean.fixed_weights(1, -1)), mean._backward, []

    def short(model, bundle, weigh):
        whole(model, bundle, weigh)
        if len(bundle.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as here:
        here.setattr(mean, "_backward", short)
        found = mean.accumulate(model, pairs, mean.fixed_weights(1, -1), count=counted.append)
    assert sum(counted) == 8
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_said(monkeypatch, tmp_path):
    model, pairs = Model(make("llama")), random_pairs(3)
    (tmp_path / "v.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"v\.safetensors: a direction cannot be kept there"):
        mean.save_vector({"x": torch.zeros(3)}, tmp_path / "v.safetensors")
    assert os.listdir(tmp_path) == ["v.safetensors"]

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    v = mean.accumulate(model, pairs, mean.fixed_weights(1, 0))
    with monkeypatch.context() as here, pytest.raises(ModelError, match="and a copy of them do not fit"):
        here.setattr(torch.Tensor, "clone", full)
        along.Line(model, v).__enter__()
    real = torch.zeros_like  # which passes take for other things than gradients
    of_a_parameter = lambda x, **how: full() if isinstance(x, torch.nn.Parameter) else real(x, **how)  # noqa: E731
    monkeypatch.setattr(torch, "zeros_like", of_a_parameter)
    with pytest.raises(ModelError, match="the weights and a gradient of them do not fit"):
        mean.accumulate(model, pairs, mean.fixed_weights(1, 0))
    with pytest.raises(ModelError, match="a warm-up takes four times the weights"):
        warm_up(model, pairs, WarmUp(steps=1, rows=2, learning_rate=1e-3, beta=BETA))
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())


def test_a_warm_up_is_torchs_adamw():
    """The same batches through torch's AdamW on the plain DPO loss: the same weights and second moments."""
    module, pairs = make("llama_tied"), random_pairs(6)
    reference = reference_of(module, pairs)
    theirs = double(module).requires_grad_(True)
    decay = [p for name, p in theirs.named_parameters() if "norm" not in name]
    rest = [p for name, p in theirs.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest}], lr=1e-3, weight_decay=0.0)
    settings = WarmUp(steps=3, rows=4, learning_rate=1e-3, beta=BETA, seed=5)
    from curate.passes.gradients.warmup import _batches

    batches = _batches(len(pairs), settings)
    assert sorted(i for batch in batches for i in batch) == sorted([*range(6), *range(6)])
    for batch in batches:
        step = dpo_gradient(theirs, [pairs[i] for i in batch], reference[batch])
        for name, p in theirs.named_parameters():
            p.grad = -step[name]
        optimizer.step()
    model = Model(double(module))
    found = warm_up(model, pairs, settings)
    wanted = {name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3) for name, p in theirs.named_parameters()}
    assert error(found, wanted) < 1e-5
    assert error(dict(model.module.named_parameters()), dict(theirs.named_parameters())) < 1e-6


def test_the_optimizer_of_a_trainer(tmp_path):
    module = make("gpt2")  # norms and biases, which have no weight decay
    trained = double(module).requires_grad_(True)
    from transformers import Trainer

    with_decay = Trainer.get_decay_parameter_names(None, trained)
    names = [name for name, _ in trained.named_parameters()]
    order = [name for name in names if name in with_decay] + [name for name in names if name not in with_decay]
    own = dict(trained.named_parameters())
    n = sum(name in with_decay for name in names)  # a tied head is among them under both names
    groups = [{"params": [own[name] for name in order[:n]]}, {"params": [own[name] for name in order[n:]]}]
    optimizer = torch.optim.AdamW(groups)
    torch.manual_seed(0)
    for _ in range(2):
        for p in own.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = second_moments(tmp_path / "optimizer.pt", module)
    wanted = {name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**2) for name, p in own.items()}
    assert error(found, wanted) < 1e-6
    with pytest.raises(ModelError, match="not those of this model"):
        second_moments(tmp_path / "optimizer.pt", make("llama"))
    for other, says in (
        (torch.optim.SGD(own.values(), lr=0.1), "keeps nothing, as plain SGD does"),
        (torch.optim.SGD(own.values(), lr=0.1, momentum=0.9), "keeps momentum_buffer"),
        (torch.optim.Adagrad(own.values()), "keeps step, sum"),
        (torch.optim.Adafactor(own.values()), "it keeps .*exp_avg_sq_row|this one keeps .*row_var"),
    ):
        other.step()
        torch.save(other.state_dict(), tmp_path / "other.pt")
        with pytest.raises(ModelError, match=rf"(?s)wanted Adam's .*({says}).*plain AdamW's state"):
            second_moments(tmp_path / "other.pt", module)
    torch.save(optimizer.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert error(second_moments(tmp_path / "old.pt", module), wanted) < 1e-6
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(ModelError, match="wanted a trainer's saved optimizer") as told:
        second_moments(tmp_path / "text.pt", module)
    assert "weights_only" not in str(told.value)
