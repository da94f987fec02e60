"""Products on a CPU: oneDNN's are torch's own; a bfloat16 model with float32 between its products is nearer to its float64 self."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from curate.measurements import MEASUREMENTS
from curate.passes import cpu_products, forward
from curate.passes.model import Model
from tests.passes.forward_models import BODY, double, make, oracle, random_pairs


@pytest.mark.parametrize("lead", [(1,), (15,), (16,), (3, 40), (2, 3, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_torchs_own(lead, biased):
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
