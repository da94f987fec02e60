"""Products of rows' gradients with a vector, without a gradient, against float64 autograd of each response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.errors import ModelError
from curate.passes import forward
from curate.passes.gradients import derivatives as along
from curate.passes.gradients import mean
from curate.passes.gradients.along import vector_products
from curate.passes.loading.model import Model
from tests.passes.forward_models import FAMILIES, double, make, random_pairs


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mamba", "phi3_long", "llama_dynamic")])
def test_every_family_equals_autograd(family):
    """Along signs: every coordinate weighs the same, so no part of the model can be left out unnoticed."""
    module, pairs = make(family), random_pairs(5)
    step = mean.accumulate(Model(module), pairs, mean.fixed_weights(1, -1))
    v = mean.precondition(step, "sign", step)
    exact = along.exact_products(Model(double(module)), pairs, v)
    found = vector_products(Model(module), pairs, v, token_budget=60)
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())


def test_rows_with_a_problem_sft_rows_and_parts_of_a_vector():
    module, rows = make("gpt2"), [pair.chosen for pair in random_pairs(4)]  # its matrices lie the other way round
    rows[1] = replace(rows[1], problem="cut off")
    whole = mean.accumulate(Model(module), rows, mean.fixed_weights(1))
    for v in (whole, {name: x for name, x in whole.items() if "attn" in name}):
        exact = along.exact_products(Model(double(module)), rows, v)
        found = vector_products(Model(module), rows, v)
        assert np.isnan(found[:, 0]).tolist() == [False, True, False, False]
        np.testing.assert_allclose(found, exact, atol=1e-5 * np.nanmax(np.abs(exact)))


def test_no_rows_and_no_memory_for_the_vector(monkeypatch):
    model, pairs = Model(make("llama")), random_pairs(3)
    v = mean.accumulate(model, pairs, mean.fixed_weights(1, -1))
    assert vector_products(model, [], v).shape == along.exact_products(model, [], v).shape

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("curate.passes.gradients.rows.wide", full)
    with pytest.raises(ModelError, match=r"(?s)a direction in it do not fit .* gradients\.parameters=2"):
        vector_products(model, pairs, v)


def test_over_an_adapters_parameters(tmp_path):
    """A and B of an adapter's folder, which are among the model's parameters for `lora` alone."""
    pytest.importorskip("peft", reason="PEFT is not installed (extra: prove)")
    from tests.passes.test_adapter import QV, adapt, save

    adapt(save("qwen2", tmp_path / "base"), tmp_path / "adapter", QV)
    pairs = random_pairs(8)
    with forward.load_model(tmp_path / "adapter", device="cpu") as model:
        v = mean.accumulate(model, pairs, mean.fixed_weights(1, -1), parameters="lora")
        exact = along.exact_products(model, pairs, v)
        found = vector_products(model, pairs, v, parameters="lora")
        with along.Line(model, v) as line:
            assert along.choose_epsilon(line, pairs).error < 5e-3
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_allclose(
        (exact @ [1, -1]).sum(), float(sum(x.double().square().sum() for x in v.values())), rtol=1e-4
    )


def test_what_has_no_rule_is_refused_and_epsilon_found_all_the_same():
    module, pairs = make("mamba"), random_pairs(4)
    model = Model(module)
    v = mean.accumulate(model, pairs, mean.fixed_weights(1, -1))
    with pytest.raises(ModelError, match="no rule"):
        vector_products(model, pairs, v)
    with along.Line(model, v) as line:
        assert along.choose_epsilon(line, pairs).rows == 4
