"""Norms and rotary angles in one sweep: which models' are taken, that they give the model's own numbers, that nothing stays behind."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from curate.passes import cpu_kernels
from curate.passes.cpu_sweeps import ROTARY, Sweeps
from curate.passes.model import Model
from tests.passes.forward_models import make

kernels = cpu_kernels.kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason=f"no kernels here: {cpu_kernels.refusal()}")

# two layers: norms taken, how many of them run, how many tensors are turned
TAKEN = {
    "llama": (5, 5, 4),
    "qwen3": (9, 9, 4),  # of queries and keys too
    "gemma2": (9, 9, 4),  # 1 + weight, before and after
    "gemma3": (13, 9, 4),  # those of queries and keys get numbers that do not lie side by side
    "olmo2": (9, 9, 4),
    "phi": (0, 0, 4),  # LayerNorm; a part of each head is turned
    "gpt_neox": (0, 0, 0),  # its function takes whole heads and turns a part
    "cohere": (0, 0, 0),  # a LayerNorm of its own; neighbours are turned, not halves
    "gpt2": (0, 0, 0),
}


@pytest.mark.parametrize("family", TAKEN)
def test_states_are_the_models_own(monkeypatch, family):
    module = make(family)
    sweeps = Sweeps(module, kernels)
    ran = []
    for name in ("rms_norm", "rotate"):
        own = getattr(cpu_kernels.Kernels, name)
        monkeypatch.setattr(
            cpu_kernels.Kernels, name, lambda self, *a, own=own, name=name: ran.append(name) or own(self, *a)
        )
    ids = torch.randint(0, 50, (1, 90))
    with torch.inference_mode():
        wanted = module.base_model(ids).last_hidden_state
        assert not ran
        with sweeps.installed():
            found = module.base_model(ids).last_hidden_state
        assert torch.equal(module.base_model(ids).last_hidden_state, wanted)
    assert (len(sweeps.norms), ran.count("rms_norm"), ran.count("rotate")) == TAKEN[family]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_stays_behind_an_error():
    module = make("llama")
    home = sys.modules[type(module).__module__]
    before = getattr(home, ROTARY)
    with pytest.raises(KeyboardInterrupt), Sweeps(module, kernels).installed():
        assert getattr(home, ROTARY) is not before
        raise KeyboardInterrupt
    assert getattr(home, ROTARY) is before
    assert not [part for part in module.modules() if "forward" in part.__dict__]


def test_gradients_and_batches_take_the_models_own_way():
    module = make("llama")
    ids = torch.randint(0, 50, (2, 30))
    wanted = module.base_model(ids).last_hidden_state
    with Sweeps(module, kernels).installed():
        found = module.base_model(ids).last_hidden_state  # weights ask for gradients
        found.sum().backward()
        with torch.inference_mode():
            batch = module.base_model(ids).last_hidden_state
    assert torch.equal(found, wanted)
    assert module.model.layers[0].input_layernorm.weight.grad is not None
    torch.testing.assert_close(batch, wanted, rtol=1e-5, atol=1e-5)


class Doubled(nn.Module):
    """Looks like an RMS norm, and is none."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return 2 * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Wrapped(Doubled):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(("kind", "taken"), [(Doubled, 0), (Wrapped, 1)])
def test_a_norm_is_what_its_numbers_say(kind, taken):
    part = kind()
    assert len(Sweeps(part, kernels).norms) == taken
    part.forward = lambda x: x  # as tools that move weights between devices do
    assert not Sweeps(part, kernels).norms


def test_bf16_with_float32_between_runs_in_sweeps():
    model = Model(make("llama").bfloat16())
    assert "float32-between" in model.engine
    assert len(model._sweeps().norms) == 5
    ids = torch.randint(0, 50, (1, 90))
    with torch.inference_mode():
        found = model.states(ids)
        model.known["sweeps"] = None
        wanted = model.states(ids)
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < 0.01
