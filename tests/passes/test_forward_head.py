"""Head statistics and residual products by blocks, against plain float64 softmax over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.gradients.residuals import _one_pair
from curate.passes.head import STATISTICS, Head
from curate.passes.loading.model import Model
from tests.passes.forward_models import double, make, random_pairs


def make_head(kind: str, *, vocabulary: int = 101, d: int = 16, dtype=torch.float64) -> Head:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, d, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "plain": Head(weight),
        "bias": Head(weight, bias),
        "scale": Head(weight, scale=0.25),
        "cap": Head(weight, cap=3.0),
        "all": Head(weight, bias, 0.5, 4.0),
    }[kind]


def plain_logits(head: Head, states: torch.Tensor) -> torch.Tensor:
    z = states.double() @ head.weight.double().T
    z = (z + (0 if head.bias is None else head.bias.double())) * head.scale
    return z if head.cap is None else head.cap * torch.tanh(z / head.cap)


def plain_statistics(head: Head, states: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each statistic by its definition."""
    z = plain_logits(head, states)
    logp = z.log_softmax(-1)
    pi = logp.exp()
    own, y = z.gather(1, tokens[:, None])[:, 0], tokens[:, None]
    others = z.scatter(1, y, float("-inf"))
    onehot = torch.zeros_like(pi).scatter(1, y, 1.0)
    square, own_pi = (pi**2).sum(1), pi.gather(1, y)[:, 0]
    return {
        "logp": logp.gather(1, y)[:, 0],
        "top_logp": logp.amax(1),
        "top_token": logp.argmax(1),
        "entropy": -(pi * logp).sum(1),
        "square": square,
        "other_logp": others.amax(1) - z.logsumexp(1),
        "rank": (z > own[:, None]).sum(1).double(),
        "gap": own - others.amax(1),
        "error": (pi - onehot).norm(dim=1),
        "lse": z.logsumexp(1),
        "below_line": (pi < (square - own_pi)[:, None]).double().mean(1),
    }


def blockwise(head: Head, states: torch.Tensor, tokens: torch.Tensor, names) -> dict[str, torch.Tensor]:
    """The statistics as a pass takes them: one sweep, and the second for what needs it."""
    names = set(names)
    first = head.statistics(states, tokens, (names - {"below_line"}) | {"logp", "lse", "square"})
    if "below_line" in names:
        first["below_line"] = head.below_line(states, tokens, first)
    return {name: first[name] for name in names}


@pytest.fixture(params=[7, 64, 4096])
def columns(request, monkeypatch):
    monkeypatch.setattr("curate.passes.head.SUMMED", (5, request.param))


@pytest.mark.parametrize("kind", ["plain", "bias", "scale", "cap", "all"])
def test_statistics_in_float64(kind, columns):
    head = make_head(kind)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(33, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 101, (33,), generator=generator)
    tokens[:8] = plain_logits(head, states[:8]).argmax(1)  # the target is itself the largest
    wanted = plain_statistics(head, states, tokens)
    found = blockwise(head, states, tokens, STATISTICS)
    assert found.keys() == wanted.keys() == STATISTICS.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for name in STATISTICS:  # each alone gives what it gives among the others
        torch.testing.assert_close(blockwise(head, states, tokens, [name])[name], found[name], rtol=1e-12, atol=1e-12)


def test_statistics_in_float32(columns):
    head = make_head("plain", dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(33, 16, generator=generator)
    tokens = torch.randint(0, 101, (33,), generator=generator)
    wanted = plain_statistics(head, states, tokens)
    for name, values in blockwise(head, states, tokens, STATISTICS).items():
        torch.testing.assert_close(values, wanted[name], rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_one_column_block_holding_only_the_target(monkeypatch):
    monkeypatch.setattr("curate.passes.head.SUMMED", (1024, 1))
    head = make_head("plain")
    states = torch.randn(4, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = torch.tensor([0, 100, 50, 0])  # the first block, the last, one between
    wanted = plain_statistics(head, states, tokens)
    for name, values in blockwise(head, states, tokens, STATISTICS).items():
        torch.testing.assert_close(
            values, wanted[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", ["plain", "bias", "scale", "cap", "all"])
@pytest.mark.parametrize("n_chosen", [3, 20])  # fewer and more tokens than d = 16: both ways of multiplying
def test_residual_products_are_the_heads_gradients(kind, n_chosen, columns):
    """The definition: inner products of autograd's gradients of log π(y) with respect to the head's own parameters."""
    head = make_head(kind)
    generator = torch.Generator().manual_seed(4)
    n = n_chosen + 9
    states = torch.randn(n, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 101, (n,), generator=generator)
    gradients = []
    for part in (slice(0, n_chosen), slice(n_chosen, n)):
        parameters = [p.clone().requires_grad_() for p in (head.weight, head.bias) if p is not None]
        own = Head(parameters[0], parameters[1] if len(parameters) > 1 else None, head.scale, head.cap)
        logp = plain_logits(own, states[part]).log_softmax(-1).gather(1, tokens[part, None]).sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, parameters)]))
    g, h = gradients
    stats = head.statistics(states, tokens, ["logp", "lse"])
    found = _one_pair(head, states, tokens, stats["logp"], stats["lse"], n_chosen)
    torch.testing.assert_close(found, torch.stack([g @ g, g @ h]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "cohere"])
def test_head_products_of_a_model(family):
    """Through the whole pass, float32 against float64 autograd on the head of the model."""
    module = make(family)
    pairs = random_pairs(5)
    found = forward.measure(Model(module), pairs, [MEASUREMENTS["head_products"]])
    module64 = double(module)
    linear = module64.get_output_embeddings()
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())  # untied: the head's part alone
    for i, pair in enumerate(pairs):
        gradients = []
        for side in (pair.chosen, pair.rejected):
            module64.requires_grad_(False)
            linear.requires_grad_(True)
            logits = module64(input_ids=torch.from_numpy(side.ids.astype(np.int64))[None]).logits[0]
            targets = torch.from_numpy(side.ids[side.start :].astype(np.int64))
            logp = logits.log_softmax(-1)[side.start - 1 : -1].gather(1, targets[:, None]).sum()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, list(linear.parameters()))]))
        g, h = (x.detach().numpy() for x in gradients)
        scale = abs(g @ h) + g @ g
        assert abs(found["head_cc"][i] - g @ g) < 1e-5 * scale
        assert abs(found["head_cr"][i] - g @ h) < 1e-5 * scale
