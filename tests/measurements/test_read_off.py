"""What measurements read off the forward pass, against their definitions on a float64 loop with full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded
from tests.passes.forward_models import double, make, oracle_side, random_pairs


def of_side(module64, side: Encoded) -> dict[str, float]:
    """Token means by definition for one response."""
    logp, _ = oracle_side(module64, side)  # (T, V)
    pi = logp.exp()
    y = torch.from_numpy(side.ids[side.start :].astype(np.int64))[:, None]
    own, own_pi = logp.gather(1, y)[:, 0], pi.gather(1, y)[:, 0]
    others = logp.scatter(1, y, float("-inf"))
    square, best = (pi**2).sum(1), others.amax(1).exp()
    onehot = torch.zeros_like(pi).scatter(1, y, 1.0)
    return {
        "entropy": float(-(pi * logp).sum(1).mean()),
        "top_logp": float(logp.amax(1).mean()),
        "valley": float((logp.amax(1) - own).mean()),
        "mass": float((best * (best + own_pi - square)).mean()),
        "vocabulary": float((pi < (square - own_pi)[:, None]).double().mean(1).mean()),
        "error": float((pi - onehot).norm(dim=1).mean()),
        "gap": float((own - others.amax(1)).mean()),
        "nll": float(-own.mean()),
    }


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_pairs(family):
    module = make(family)
    pairs = random_pairs(6)
    names = ("entropy", "valley_depth", "squeezed_mass", "squeezed_vocabulary")
    found = forward.measure(Model(module), pairs, [MEASUREMENTS[name] for name in names])
    module64 = double(module)
    chosen = [of_side(module64, pair.chosen) for pair in pairs]
    rejected = [of_side(module64, pair.rejected) for pair in pairs]
    for column, wanted in {
        "chosen_entropy": [c["entropy"] for c in chosen],
        "rejected_entropy": [r["entropy"] for r in rejected],
        "chosen_top_logp": [c["top_logp"] for c in chosen],
        "rejected_top_logp": [r["top_logp"] for r in rejected],
        "valley_depth": [r["valley"] for r in rejected],
        "squeezed_mass": [r["mass"] for r in rejected],
        "squeezed_vocabulary": [r["vocabulary"] for r in rejected],
    }.items():
        np.testing.assert_allclose(found[column], wanted, rtol=2e-5, atol=1e-6, err_msg=column)


def test_sft_rows():
    module = make("qwen3")
    rows = [side for pair in random_pairs(5) for side in (pair.chosen, pair.rejected)]
    names = ("target_likelihood", "target_entropy", "target_error", "alone")
    found = forward.measure(Model(module), rows, [MEASUREMENTS[name] for name in names], token_budget=100)
    module64 = double(module)
    wanted = [of_side(module64, row) for row in rows]
    for column, name in {
        "target_nll": "nll",
        "target_entropy": "entropy",
        "target_top_logp": "top_logp",
        "target_error": "error",
        "target_gap": "gap",
    }.items():
        np.testing.assert_allclose(found[column], [w[name] for w in wanted], rtol=2e-5, atol=1e-6, err_msg=column)
    bos = [Encoded(np.concatenate([[1], row.ids[row.start :]]).astype(np.int32), 1) for row in rows]
    np.testing.assert_allclose(found["alone_nll"], [of_side(module64, row)["nll"] for row in bos], rtol=2e-5)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_alone_without_bos(layout):
    """Rows that begin with no BOS: the first token of the completion alone is not predicted; a single token is NULL."""
    module = make("llama")
    rng = np.random.default_rng(0)
    rows = [Encoded(rng.integers(3, 100, n + 4).astype(np.int32), 4) for n in (5, 1, 9)]
    found = forward.measure(Model(module, layout=layout), rows, [MEASUREMENTS["alone"]])["alone_nll"]
    module64 = double(module)
    alone = [Encoded(row.ids[4:], 1) for row in rows]
    np.testing.assert_allclose(found[[0, 2]], [of_side(module64, a)["nll"] for a in (alone[0], alone[2])], rtol=2e-5)
    assert np.isnan(found[1])


def test_nothing_unasked_is_computed(monkeypatch):
    """Hidden sums need no head; one sweep serves all statistics that were asked for."""
    from curate.passes.head import Head

    asked = []
    statistics = Head.statistics
    monkeypatch.setattr(Head, "statistics", lambda self, *a, **k: asked.append(a[2]) or statistics(self, *a, **k))
    model, pairs = Model(make("llama")), random_pairs(3)
    forward.measure(model, pairs, [MEASUREMENTS["hidden"]])
    assert asked == []
    forward.measure(model, pairs, [MEASUREMENTS[m] for m in ("hidden", "likelihood", "entropy", "valley_depth")])
    assert asked == [{"logp", "entropy", "top_logp"}]


def test_angles():
    """Means over explicit two-dimensional slices of the cosine matrix; rows without a completion have them too."""
    module = make("llama")
    prompt = np.asarray([1, 7, 8, 9, 10, 11, 12, 3], np.int32)
    full = np.concatenate([prompt, [20, 21, 2]]).astype(np.int32)
    rows = [
        Encoded(full, 8, question=(3, 7)),
        Encoded(prompt, 8, problem="the row has no completion", question=(3, 7)),
        Encoded(full, 8),
        Encoded(prompt, 8, problem="the row has no completion", question=(0, 8)),
        Encoded(np.zeros(0, np.int32), 0, problem="the template refuses"),
    ]
    measurements = [MEASUREMENTS["angles"], MEASUREMENTS["target_likelihood"]]
    found = forward.measure(Model(module), rows, measurements)
    states = double(module)(torch.from_numpy(prompt.astype(np.int64))[None], output_hidden_states=True).hidden_states[
        -1
    ][0]
    unit = torch.nn.functional.normalize(states.detach(), dim=1)
    cosines = unit @ unit.T
    rest = [0, 1, 2, 7]
    intra, inter = float(cosines[3:7, 3:7].mean()), float(cosines[rest, 3:7].mean())
    np.testing.assert_allclose(found["angle_intra"], [intra, intra, np.nan, float(cosines.mean()), np.nan], rtol=1e-5)
    np.testing.assert_allclose(found["angle_inter"], [inter, inter, np.nan, np.nan, np.nan], rtol=1e-5)
    assert np.isnan(found["target_logp"]).tolist() == [False, True, False, True, True]
