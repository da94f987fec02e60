"""N×M inner products against float64 autograd gradients of every row, on several architectures; any batch, any block, any form."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.errors import ModelError
from curate.measurements import MEASUREMENTS
from curate.passes.gradients import backward, influence
from curate.passes.gradients.backward import checked_rules
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair
from tests.passes.forward_models import adapted, detach_below, double, make, random_pairs
from tests.passes.test_backward import gradient


def gradients(module64, rows, of="margin", names=""):
    """(rows, P) float64 by autograd."""
    module64.requires_grad_(False)
    wanted = [p.requires_grad_() for name, p in module64.named_parameters() if names in name]
    found = []
    for row in rows:
        if isinstance(row, EncodedPair):
            g = 0
            for side, sign in ((row.chosen, 1), (row.rejected, -1)):
                if of == "margin" or (of == "chosen") == (sign == 1):
                    g = g + (sign if of == "margin" else 1) * gradient(module64, side, wanted)
        else:
            g = gradient(module64, row, wanted)
        found.append(g)
    return torch.stack(found).numpy()


def worst(found: influence.CrossProducts, mine: np.ndarray, theirs: np.ndarray) -> float:
    """Largest error over |g||g'|, of products and squared norms."""
    norms = [np.linalg.norm(x, axis=1) for x in (mine, theirs)]
    errors = np.abs(found.products - mine @ theirs.T) / np.outer(*norms)
    own = [np.abs(n**2 - f**2) / n**2 for n, f in zip(norms, (found.train_norms, found.target_norms))]
    return max(errors.max(), *(e.max() for e in own))


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma2", "gemma3", "gpt_neox", "gpt2", "llama_tied", "phi", "bloom"]
)
def test_every_product_is_autograds(family):
    module, rows = make(family), random_pairs(11)
    train, targets = rows[:7], [*rows[7:10], rows[10].chosen]
    mine, theirs = (gradients(double(module), x) for x in (train, targets))
    assert worst(influence.cross_products(Model(module), train, targets), mine, theirs) < 1e-6


def test_any_batch_order_layout_and_block_of_targets(monkeypatch):
    module, rows = make("llama_tied"), random_pairs(13)
    train, targets = rows[:8], rows[8:]
    mine, theirs = (gradients(double(module), x) for x in (train, targets))
    model = Model(module)
    for budget in (1, 150, 100_000):
        assert worst(influence.cross_products(model, train, targets, token_budget=budget), mine, theirs) < 1e-6
    assert (
        worst(influence.cross_products(Model(module, layout="padded"), train, targets, token_budget=200), mine, theirs)
        < 1e-6
    )
    order = np.random.default_rng(1).permutation(len(train))
    shuffled = influence.cross_products(model, [train[i] for i in order], targets)
    assert worst(shuffled, mine[order], theirs) < 1e-6
    monkeypatch.setattr(influence._Passes, "fit", lambda self, targets: min(2, len(targets)))
    found = influence.cross_products(model, train, targets)
    assert found.passes == 3
    assert worst(found, mine, theirs) < 1e-6


def test_a_block_of_targets_is_let_go_before_the_next_is_made(monkeypatch):
    """What is free for the next block is what this one had."""
    alive: list[weakref.ref] = []
    plain = influence.Targets

    def made(*args):
        assert not [ref for ref in alive if ref() is not None]
        targets = plain(*args)
        alive.append(weakref.ref(targets))
        return targets

    monkeypatch.setattr(influence, "Targets", made)
    monkeypatch.setattr(influence._Passes, "fit", lambda self, targets: min(2, len(targets)))
    rows = random_pairs(5)
    gc.disable()
    try:
        assert influence.cross_products(Model(make("llama")), rows, rows).passes == 3
    finally:
        gc.enable()


def test_both_forms_and_every_block(monkeypatch):
    module, rows = make("gpt_neox"), random_pairs(9)
    head = module.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(len(head.weight)))
    train, targets = rows[:5], rows[5:]
    mine, theirs = (gradients(double(module), x) for x in (train, targets))
    monkeypatch.setattr("curate.passes.gradients.targets.BLOCK", 300)
    monkeypatch.setattr("curate.passes.gradients.targets.MEETINGS", 300)
    monkeypatch.setattr("curate.passes.head.COLUMNS", 16)
    monkeypatch.setattr("curate.passes.gradients.head.KEEP", 0)
    monkeypatch.setattr("curate.passes.gradients.graph_memory.SMALL", 0)
    monkeypatch.setattr("curate.passes.gradients.rows.APART", 0)
    linears = [
        name
        for name in influence._Passes(Model(module), *checked_rules(Model(module), "all"), 9).shapes
        if name[0] == "weight"
    ]
    for by_tokens in ([], linears, linears[::2]):
        monkeypatch.setattr(influence._Passes, "by_tokens", lambda self, targets, some=by_tokens: frozenset(some))
        assert worst(influence.cross_products(Model(module), train, targets, token_budget=150), mine, theirs) < 1e-6
    assert (
        worst(influence.cross_products(Model(module), train, targets, factored=1000, token_budget=150), mine, theirs)
        < 1e-6
    )


@pytest.mark.parametrize("of", ["chosen", "rejected"])
def test_one_side_of_pairs_against_answers(of):
    """Training pairs by one response, targets by their margin and SFT rows by their completion."""
    module, rows = make("qwen2"), random_pairs(8)
    train, targets = rows[:5], [rows[5], rows[6].chosen]
    mine, theirs = gradients(double(module), train, of), gradients(double(module), targets)
    found = influence.cross_products(Model(module), train, targets, of=of, target_of="margin")
    assert worst(found, mine, theirs) < 1e-6
    np.testing.assert_allclose(
        found.cosines, (mine @ theirs.T) / np.outer(*(np.linalg.norm(x, axis=1) for x in (mine, theirs))), atol=1e-6
    )


def test_a_margin_is_what_the_pairs_own_products_say():
    """‖g+ − g−‖² = K++ − 2K+− + K−−, of two passes that share no prompt and one that does."""
    pairs, model = random_pairs(6), Model(make("gemma3"))
    entk = backward.measure(model, pairs, [MEASUREMENTS["entk"]])
    found = influence.cross_products(model, pairs, pairs[:2])
    np.testing.assert_allclose(found.train_norms**2, entk["entk_cc"] - 2 * entk["entk_cr"] + entk["entk_rr"], rtol=1e-4)
    np.testing.assert_allclose(np.diag(found.products[:2]), found.target_norms**2, rtol=1e-5)


def test_lora_and_the_last_layers():
    module, rows = adapted("qwen2"), random_pairs(7)
    mine = gradients(double(module), rows[:5], names="lora_")
    theirs = gradients(double(module), rows[5:], names="lora_")
    model = Model(module.get_base_model())
    assert worst(influence.cross_products(model, rows[:5], rows[5:], parameters="lora"), mine, theirs) < 1e-6
    sketched = influence.cross_products(model, rows[:5], rows[5:], parameters="lora", factored=8)
    assert 0 < sketched.error.rms < 1
    module64 = double(make("llama"))
    detach_below(module64.model.layers[1])
    mine, theirs = (gradients(module64, x) for x in (rows[:5], rows[5:]))
    assert worst(influence.cross_products(Model(make("llama")), rows[:5], rows[5:], parameters=1), mine, theirs) < 1e-6


def test_a_short_target_of_wide_factors_is_kept_as_tokens():
    """In every layer: there is no matrix of it and no vector."""
    peft = pytest.importorskip("peft")
    module = peft.get_peft_model(make("llama"), peft.LoraConfig(r=64, target_modules=["q_proj", "down_proj"]))
    rows = [pair.chosen for pair in random_pairs(5)]
    targets = [Encoded(rows[0].ids[:6], 2)]
    mine, theirs = (gradients(double(module), x, names="lora_") for x in (rows, targets))
    found = influence.cross_products(Model(module.get_base_model()), rows, targets, parameters="lora")
    assert worst(found, mine, theirs) < 1e-6


def test_what_cannot_be_known_is_nan_and_what_does_not_fit_is_refused(monkeypatch):
    rows = random_pairs(4)
    rows[1] = replace(rows[1], rejected=replace(rows[1].rejected, problem="cut off"))
    model = Model(make("llama"))
    found = influence.cross_products(model, rows, rows[:2])
    assert np.isnan(found.products).tolist() == [[False, True], [True, True], [False, True], [False, True]]
    assert np.isnan(found.train_norms).tolist() == [False, True, False, False]
    assert influence.cross_products(model, rows[1:2], rows).products.shape == (1, 4)
    monkeypatch.setattr(influence, "free_for", lambda model: 10_000)
    with pytest.raises(ModelError, match=r"(?s)one target's gradient needs .* factored=32"):
        influence.cross_products(model, rows, rows[:2])
    assert influence.cross_products(model, rows, rows[:1], factored=4).error is None


def test_estimates_are_unbiased_and_their_error_is_said():
    module, rows = make("llama_tied"), random_pairs(24)
    train, targets = rows[:16], rows[16:]
    mine, theirs = (gradients(double(module), x) for x in (train, targets))
    scale = np.outer(*(np.linalg.norm(x, axis=1) for x in (mine, theirs)))
    model, exact = Model(module), mine @ theirs.T / scale
    found = [influence.cross_products(model, train, targets, factored=8, seed=seed) for seed in range(24)]
    off = np.stack([f.products / scale - exact for f in found])
    rms = np.sqrt(np.mean(off**2))
    assert np.abs(off.mean(0)).max() < 5 * off.std(0).max() / np.sqrt(len(found))
    said = [f.error.rms for f in found]
    assert abs(np.sqrt(np.mean(np.square(said))) / rms - 1) < 0.2
    wide = influence.cross_products(model, train, targets, factored=1000)
    assert worst(wide, mine, theirs) < 1e-6 and wide.error.rms < 1e-6
