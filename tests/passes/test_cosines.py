"""Cosines of rows' steps with vectors in weight space against float64 autograd gradients, with any diagonal P, in any block and batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.errors import ModelError
from curate.passes.gradients import cosines
from curate.passes.gradients.cosines import Cosines
from curate.passes.loading.model import Model
from tests.passes.forward_models import adapted, detach_below, double, make, random_pairs
from tests.passes.test_cross import gradients


def vectors_of(module, count, *, seed=0, names="") -> list[dict[str, torch.Tensor]]:
    """Random ones over the parameters whose name contains `names`; wide spread, so that no part of the model hides behind another."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in module.named_parameters() if names in name}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


def diagonal(module, *, names="") -> dict[str, torch.Tensor]:
    """P over five orders of magnitude, a fifth of it 0."""
    (found,) = vectors_of(module, 1, seed=9, names=names)
    return {name: torch.where(x.abs() < 0.25, 0, (2 * x).exp()) for name, x in found.items()}


def flat(vector) -> np.ndarray:
    return torch.cat([x.double().flatten() for x in vector.values()]).numpy()


def oracle(mine: np.ndarray, vectors, scale) -> np.ndarray:
    """(rows, M) from (rows, P) float64 gradients."""
    mine = mine if scale is None else mine * flat(scale)
    theirs = np.stack([flat(v) for v in vectors])
    return (mine @ theirs.T) / np.outer(np.linalg.norm(mine, axis=1), np.linalg.norm(theirs, axis=1))


def loaders(vectors):
    return [lambda v=v: v for v in vectors]


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox", "gpt2", "phi", "bloom"]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_every_family_equals_autograd(family, scaled):
    """Pairs by their margin and SFT rows by their completion."""
    module, rows = make(family), random_pairs(7)
    rows = [*rows[:5], rows[5].chosen, rows[6].rejected]
    vectors, scale = vectors_of(module, 3), diagonal(module) if scaled else None
    wanted = oracle(gradients(double(module), rows), vectors, scale)
    found = Cosines(Model(module), loaders(vectors), scale=scale).of(rows, token_budget=90)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert np.abs(wanted).max() > 1e-3


def test_blocks_of_vectors_and_of_everything_else(monkeypatch):
    module, rows = make("llama_tied"), random_pairs(6)
    vectors, scale = vectors_of(module, 5), diagonal(module)
    wanted = oracle(gradients(double(module), rows), vectors, scale)
    monkeypatch.setattr("curate.passes.gradients.targets.BLOCK", 300)
    monkeypatch.setattr("curate.passes.gradients.targets.MEETINGS", 300)
    monkeypatch.setattr("curate.passes.head.COLUMNS", 16)
    monkeypatch.setattr("curate.passes.gradients.head.KEEP", 0)
    monkeypatch.setattr("curate.passes.gradients.rows.APART", 0)
    monkeypatch.setattr("curate.passes.gradients.graph_memory.SMALL", 0)
    for layout, budget in (("packed", 1), ("packed", 10_000), ("padded", 200)):
        every = Cosines(Model(module, layout=layout), loaders(vectors), scale=scale)
        np.testing.assert_allclose(every.of(rows, token_budget=budget), wanted, atol=2e-6)
    read = []
    size = 4 * len(flat(scale))
    monkeypatch.setattr(cosines, "free_for", lambda model: 2.5 * size / (cosines.SHARE / 2))
    some = Cosines(Model(module), [lambda v=v: read.append(0) or v for v in vectors], scale=scale)
    np.testing.assert_allclose(some.of(rows), wanted, atol=2e-6)
    assert some.together == 2 and len(read) == 1 + 5


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_over_the_last_layer(family):
    """A matrix that is embedding and head counts as both, as it does in a direction's gradient; else only what the last layers have."""
    module, rows, tied = make(family), random_pairs(4), family == "llama_tied"
    names = [name for name, _ in module.named_parameters() if "layers.1." in name or name == "model.norm.weight"]
    names += ["model.embed_tokens.weight" if tied else "lm_head.weight"]
    vectors = [{name: v[name] for name in v if name in names} for v in vectors_of(module, 2)]
    scale = {name: x for name, x in diagonal(module).items() if name in names}
    module64 = double(module)
    if not tied:
        detach_below(module64.model.layers[1])
    mine = gradients(module64, rows)
    at = np.concatenate([np.full(p.numel(), name in names) for name, p in module.named_parameters()])
    found = Cosines(Model(module), loaders(vectors), scale=scale, parameters=1).of(rows)
    np.testing.assert_allclose(found, oracle(mine[:, at], vectors, scale), atol=2e-6)


def test_over_lora_parameters():
    module, rows = adapted("qwen2"), random_pairs(5)
    wanted = gradients(double(module), rows, names="lora_")
    model = Model(module.get_base_model())
    vectors, scale = vectors_of(model.module, 2, names="lora_"), diagonal(model.module, names="lora_")
    found = Cosines(model, loaders(vectors), scale=scale, parameters="lora").of(rows)
    np.testing.assert_allclose(found, oracle(wanted, vectors, scale), atol=2e-6)


def test_what_is_unknown_is_nan_and_what_does_not_fit_is_refused(monkeypatch):
    module, rows = make("llama"), random_pairs(4)
    rows[2] = replace(rows[2], rejected=replace(rows[2].rejected, problem="cut off"))
    vectors = vectors_of(module, 2)
    vectors[1] = {name: torch.zeros_like(x) for name, x in vectors[1].items()}
    every = Cosines(Model(module), loaders(vectors))
    assert np.isnan(every.of(rows)).tolist() == [[False, True], [False, True], [True, True], [False, True]]
    assert np.isnan(every.of(rows[2:3])).all()
    monkeypatch.setattr(cosines, "free_for", lambda model: 10_000)
    with pytest.raises(ModelError, match=r"(?s)one target's gradient needs .* gradients\.parameters=lora"):
        Cosines(Model(module), loaders(vectors))
    with pytest.raises(ModelError, match="no rule"):
        Cosines(Model(make("mamba")), loaders(vectors))
