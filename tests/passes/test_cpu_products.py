"""Products on a CPU: oneDNN's are torch's own, forward and backward; a bfloat16 model is nearer to its float64 self with float32 between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.bundles import items_of
from curate.passes.gradients import backward
from curate.passes.kernels import cpu_products
from curate.passes.loading.engine import engine_identity
from curate.passes.loading.model import Model
from tests.passes.forward_models import BODY, double, make, oracle, random_pairs


@pytest.fixture
def one_dnn(monkeypatch):
    """Every product goes to oneDNN that could, however small; on a processor where torch's own are as fast, nothing does."""
    monkeypatch.setattr(cpu_products, "SMALL", 1)
    monkeypatch.setattr(cpu_products, "FEW", 1)


@pytest.mark.parametrize("lead", [(1,), (15,), (16,), (3, 40), (2, 3, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_torchs_own(lead, biased, one_dnn):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*lead, 48), torch.randn(33, 48), torch.randn(33) if biased else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for kind in (torch.float32, torch.float64):
        found = cpu_products.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
        assert found.dtype == kind
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    narrow = cpu_products.linear(x, weight.bfloat16())  # wide activations meet narrow weights
    assert narrow.dtype == torch.bfloat16
    striped = torch.randn(48, 33).T
    torch.testing.assert_close(cpu_products.linear(x, striped), x @ striped.T, rtol=1e-4, atol=1e-4)


def test_product_of_matrices_however_they_lie(one_dnn):
    torch.manual_seed(0)
    x = torch.randn(90, 120)
    views = {
        "as it is": x,
        "turned": torch.randn(120, 90).T,
        "columns of more": torch.randn(90, 300)[:, 100:220],
        "rows of a turned one": torch.randn(120, 200).T[20:110],
        "every other": torch.randn(90, 240)[:, ::2],
        "one line": torch.randn(1, 120).expand(90, 120),
        "one column": torch.randn(90, 1).expand(90, 120),
        "a single row": x[:1],
    }
    for name, a in views.items():
        for other, b in views.items():
            found = cpu_products.product(a, b.T)
            torch.testing.assert_close(
                found.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4, msg=name + other
            )
    single = x[:, :1]
    torch.testing.assert_close(cpu_products.product(single, single.T), single @ single.T)


@pytest.mark.parametrize("lead", [(20,), (3, 7)])
@pytest.mark.parametrize("followed", ["x", "weight", "bias", "x weight", "x weight bias"])
def test_gradients_are_torchs_own(lead, followed, one_dnn):
    torch.manual_seed(0)
    tensors = {"x": torch.randn(*lead, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)}
    out = torch.randn(*lead, 5)
    for name in followed.split():
        tensors[name].requires_grad_()
    found = cpu_products.linear(*tensors.values())
    (found * out).sum().backward()
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors.values()]
    (F.linear(*exact) * out).sum().backward()
    for mine, wanted in zip(tensors.values(), exact, strict=True):
        assert (mine.grad is None) == (wanted.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)


def test_a_product_that_is_followed_is_torchs(one_dnn):
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(5, 8)
    cpu_products.product(x, weight.T).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(20, 8))


def test_a_second_derivative_is_refused(one_dnn):
    if not cpu_products.one_dnn_is_faster():
        pytest.skip("this processor multiplies as torch does")
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(5, 8)
    (first,) = torch.autograd.grad((cpu_products.linear(x, weight) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 keeps its matrices the other way round
@pytest.mark.parametrize("way", ["plain", "checkpointed", "apart"])
def test_backward_is_torchs_own(family, way, one_dnn, monkeypatch):
    model, pairs = Model(make(family)), random_pairs(4)
    items = {i: items_of(i, pair, False, None) for i, pair in enumerate(pairs)}
    found, calls = [], []
    for faster in (cpu_products.one_dnn_is_faster(), False):
        monkeypatch.setattr(cpu_products, "one_dnn_is_faster", lambda faster=faster: calls.append(faster) or faster)
        rules, _ = backward.checked_rules(model, "all")
        batch = backward.run(model, rules, items, pairs, **{} if way == "plain" else {way: True})
        found.append(batch.products)
    assert len(calls) > 100 and not calls[-1]
    own, theirs = found
    scale = (theirs[:, 0] * theirs[:, 2]).sqrt()[:, None]
    torch.testing.assert_close(own / scale, theirs / scale, rtol=1e-5, atol=1e-5)


def test_identity_tells_float32_between_narrow_products():
    assert engine_identity(dtype="bfloat16", device="cpu").endswith(" cpu bfloat16 float32-between")
    assert engine_identity(dtype="float32", device="cpu").endswith(" cpu float32")
    assert Model(make("llama").bfloat16()).engine.endswith(" cpu bfloat16 float32-between packed")
    assert Model(make("bloom").bfloat16()).engine.endswith(" cpu bfloat16 padded")


def test_float32_between_bfloat16_products_keeps_digits(monkeypatch):
    """Eight layers as they are before training: a residual stream rounded at every layer has several times the error."""
    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(**BODY | {"num_hidden_layers": 8, "hidden_size": 64})).bfloat16().eval()
    pairs = random_pairs(10)
    wanted = oracle(double(module), pairs)
    errors = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(Model, "_keeps_float32", lambda self: False)
        model = Model(module)
        found = forward.measure(model, pairs, [MEASUREMENTS["likelihood"], MEASUREMENTS["hidden"]])
        errors.append([np.sqrt(np.mean((found[c] - wanted[c]) ** 2)) for c in ("chosen_logp", "hidden_cr")])
    kept, plain = np.asarray(errors)
    assert (kept < np.array([0.8, 0.4]) * plain).all(), errors


def test_a_model_that_cannot_mix_dtypes_runs_in_its_own():
    module = make("bloom").bfloat16()  # adds its residuals into narrow buffers
    pairs = random_pairs(6)
    wanted = oracle(double(module), pairs)
    model = Model(module)
    assert model.states(torch.tensor([[5, 6, 7]])).dtype == torch.bfloat16
    found = forward.measure(model, pairs, [MEASUREMENTS["likelihood"]])
    np.testing.assert_allclose(found["chosen_logp"], wanted["chosen_logp"], rtol=0.02, atol=0.2)
