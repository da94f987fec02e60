"""Norms, rotary angles and gated units in one sweep: which models' are taken, that they give the model's own numbers, that nothing stays behind."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn

from curate.passes.kernels import cpu_kernels
from curate.passes.kernels.cpu_sweeps import ROTARY, Sweeps
from curate.passes.loading.model import Model
from tests.passes.forward_models import make

kernels = cpu_kernels.kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason=f"no kernels here: {cpu_kernels.refusal()}")

# two layers: norms taken, how many of them run, how many tensors are turned, how many MLPs are gated by SiLU
TAKEN = {
    "llama": (5, 5, 4, 2),
    "qwen3": (9, 9, 4, 2),  # of queries and keys too
    "gemma2": (9, 9, 4, 0),  # 1 + weight, before and after; GELU
    "gemma3": (13, 9, 4, 0),  # those of queries and keys get numbers that do not lie side by side
    "olmo2": (9, 9, 4, 2),
    "phi": (0, 0, 4, 0),  # LayerNorm; a part of each head is turned
    "gpt_neox": (0, 0, 0, 0),  # its function takes whole heads and turns a part
    "cohere": (0, 0, 0, 2),  # a LayerNorm of its own; neighbours are turned, not halves
    "gpt2": (0, 0, 0, 0),
}


@pytest.mark.parametrize("family", TAKEN)
def test_states_are_the_models_own(monkeypatch, family):
    module = make(family)
    sweeps = Sweeps(module, kernels)
    ran = []
    for name in ("rms_norm", "rotate", "silu_times"):
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
    counts = (ran.count(name) for name in ("rms_norm", "rotate", "silu_times"))
    assert (len(sweeps.norms), *counts) == TAKEN[family]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class Clamped(nn.Module):
    """Named as a Llama's MLP, and none for large numbers."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=self.most)) * self.up_proj(x))


@pytest.mark.parametrize(("most", "taken"), [(7.0, 0), (float("inf"), 1)])
def test_a_gated_unit_is_what_its_numbers_say(most, taken):
    part = Clamped()
    part.most = most
    assert len(Sweeps(part, kernels).gates) == taken
    called = []
    hook = part.up_proj.register_forward_hook(lambda *a: called.append(1))
    assert not Sweeps(part, kernels).gates
    assert not called
    hook.remove()
    part.act_fn = nn.GELU()
    assert not Sweeps(part, kernels).gates


def test_layers_of_one_class_with_other_settings_are_tried_each():
    layers = nn.ModuleList([Clamped(), Clamped(), Clamped()])
    for layer, most in zip(layers, (float("inf"), 7.0, float("inf"))):
        layer.most = most
    assert [gate.module for gate in Sweeps(layers, kernels).gates] == [layers[0], layers[2]]


def test_what_a_later_hook_keeps_is_not_written_over():
    part, seen = Clamped(), []
    part.most = float("inf")
    sweeps, x = Sweeps(part, kernels), torch.randn(3, 8)
    part.gate_proj.register_forward_hook(lambda module, given, found: seen.append(found))
    with torch.inference_mode(), sweeps.installed():
        part(x)
        torch.testing.assert_close(seen[0], nn.functional.linear(x, part.gate_proj.weight, part.gate_proj.bias))


def test_silu_times():
    a = torch.cat([torch.randn(1003) * 5, torch.tensor([0.0, -0.0, 200, -200, torch.inf, -1e-40, torch.nan])])
    b = torch.randn(len(a))
    wanted = (a.double() / (1 + (-a.double()).exp()) * b.double()).float()
    found = kernels.silu_times(a.clone(), b)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-37, equal_nan=True)


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


def test_a_weight_alone_gets_its_gradient():
    norm = make("llama").model.norm
    with Sweeps(norm, kernels).installed():
        norm(torch.randn(3, 32)).sum().backward()
    assert norm.weight.grad.norm() > 0


def test_passes_that_overlap_leave_nothing_behind():
    """In two threads, say: neither ends inside the other."""
    one, other = make("llama"), make("llama")
    home = sys.modules[type(one).__module__]
    before = getattr(home, ROTARY)
    first, second = (Sweeps(module, kernels).installed() for module in (one, other))
    first.__enter__()
    second.__enter__()
    assert getattr(home, ROTARY) is not before
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert getattr(home, ROTARY) is before


def test_hooks_are_called_for_passes_alone():
    """Neither called for the trial nor copied: this one cannot be."""

    class Watch:
        def __init__(self):
            self.seen, self.lock = [], threading.Lock()

        def see(self, module, inputs, output):
            self.seen.append(inputs[0].shape)

    watch, module = Watch(), make("llama")
    module.model.norm.register_forward_hook(watch.see)
    sweeps = Sweeps(module, kernels)
    assert not watch.seen
    with torch.inference_mode(), sweeps.installed():
        module.model(torch.randint(0, 50, (1, 9)))
    assert watch.seen == [(1, 9, 32)]


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


class Channels(Doubled):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(("kind", "taken"), [(Doubled, 0), (Wrapped, 1), (Channels, 0)])
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
