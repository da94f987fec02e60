"""Losses along directions of the weights, against float64 autograd, and a run's path as segments with an orthonormal basis."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from curate.errors import ModelError
from curate.passes.gradients import projections
from curate.passes.gradients.segments import Segments
from curate.passes.loading.model import Model, load_model
from curate.passes.tokens import Encoded
from tests.tiny_models import make_llama

SHAPES = ((9, 4), (5, 1), (14, 13), (14, 3), (7, 6))  # tokens of a row, and where its completion starts


def rows_of(vocabulary: int, shapes=SHAPES) -> list[Encoded]:
    rng = np.random.default_rng(0)
    rows = [Encoded(rng.integers(0, vocabulary, n).astype(np.int32), start) for n, start in shapes]
    return [*rows, Encoded(np.zeros(0, np.int32), 0, problem="no completion")]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.15)
    config.bos_token_id = config.eos_token_id = 1
    return GPT2LMHeadModel(config)


def llama():
    """Untied, biases in the attention, and a vocabulary of more than one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, attention_bias=True, tie_word_embeddings=False, initializer_range=0.15,
        )
    )  # fmt: skip


def qwen3():
    """Tied, norms of queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, tie_word_embeddings=True, initializer_range=0.15,
        )
    )  # fmt: skip


def gemma2():
    """A window that some positions of a padded row see nothing but padding in."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, initializer_range=0.15, pad_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def ready(make) -> Model:
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:  # norms and biases that are not all the same
                p.add_(0.1 * torch.randn_like(p))
    return Model(module)


def unit_directions(model: Model, count: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    found = {name: torch.randn(count, *p.shape, dtype=p.dtype) for name, p in model.module.named_parameters()}
    length = sum(d.flatten(1).square().sum(1) for d in found.values()).sqrt()
    return {name: d / length.view(-1, *[1] * (d.ndim - 1)) for name, d in found.items()}


def by_autograd(model: Model, rows, along) -> np.ndarray:
    """(rows, r) by one backward a row; the weights' gradients in float64."""
    named = dict(model.module.named_parameters())
    out = []
    for row in rows:
        for p in named.values():
            p.requires_grad_(True)
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        logp = model.module(input_ids=ids).logits[0].log_softmax(-1)
        loss = -logp[row.start - 1 : -1].gather(1, ids[0, row.start :, None]).mean()
        gradients = torch.autograd.grad(loss, list(named.values()))
        count = len(next(iter(along.values())))
        found = [sum(float((along[n][k] * g).sum()) for n, g in zip(named, gradients)) for k in range(count)]
        for p in named.values():
            p.requires_grad_(False)
        out.append(found)
    return np.array(out)


@pytest.mark.parametrize("make", [gpt2, llama, qwen3, gemma2])
def test_both_ways_are_what_autograd_gives(make):
    model = ready(make)
    rows = rows_of(model.module.config.vocab_size)
    along = unit_directions(model, 3)
    wanted = by_autograd(model, rows[:-1], along)
    exact = projections.by_gradients(model, rows, along)
    # transformers' RMSNorm computes in float32 even here
    np.testing.assert_allclose(exact[:-1], wanted, atol=1e-7 if make is not gpt2 else 1e-13)
    assert np.isnan(exact[-1]).all()
    before = [p.clone() for p in model.module.parameters()]
    differences = projections.by_forwards(model, rows, along)
    np.testing.assert_allclose(differences[:-1], wanted, atol=2e-3 * np.abs(wanted).mean())
    assert all(torch.equal(a, b) for a, b in zip(before, model.module.parameters()))


def test_a_row_has_its_number_whatever_its_company(monkeypatch):
    """In other batches, in another order, alone, and with layers taken apart into small blocks."""
    model = ready(llama)
    rows = rows_of(model.module.config.vocab_size)[:-1]
    along = unit_directions(model, 2)
    together = projections.by_gradients(model, rows, along)
    np.testing.assert_allclose(projections.by_gradients(model, rows[::-1], along)[::-1], together, atol=1e-7)
    np.testing.assert_allclose(projections.by_gradients(model, rows, along, token_budget=1), together, atol=1e-7)
    monkeypatch.setattr(projections, "MATRIX", 700)
    np.testing.assert_allclose(projections.by_gradients(model, rows, along), together, atol=1e-7)


def test_directions_of_another_model_are_refused():
    model = ready(gpt2)
    along = unit_directions(model, 1)
    along.pop("transformer.wpe.weight")
    with pytest.raises(ModelError, match=r"transformer\.wpe\.weight"):
        projections.by_gradients(model, rows_of(40), along)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return [make_llama(folder / f"checkpoint-{k}", seed=k, scale=0.05) for k in range(4)]


def test_the_basis_is_orthonormal_and_holds_every_delta(run):
    model = load_model(run[0], dtype="float32", device="cpu")
    segments = Segments(model, [*run, run[-1]])  # the last segment has no length: one direction less than segments
    flat = torch.cat([b.flatten(1) for b in segments.basis.values()], 1).double()
    assert flat.shape[0] == 3
    np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=1e-5)
    weights = []
    for path in run:
        model.use(path)
        weights.append(torch.cat([p.flatten() for p in model.module.parameters()]).double())
    for t, (a, b) in enumerate(itertools.pairwise(weights)):
        np.testing.assert_allclose(segments.steps[:, t], flat @ (b - a), atol=1e-4)
        np.testing.assert_allclose(flat.T @ segments.steps[:, t], b - a, atol=1e-5)
    np.testing.assert_allclose(segments.steps[:, 3], 0, atol=1e-9)
    lengths = [float((b - a).square().sum()) for a, b in itertools.pairwise(weights)]
    assert segments.share.sum() == pytest.approx(1)
    assert np.trace(segments.gram) == pytest.approx(sum(lengths), rel=1e-6)


def test_interpolated_weights_lie_on_the_segment(run):
    model = load_model(run[0], dtype="float32", device="cpu")
    segments = Segments(model, run)
    name, p = next(iter(model.module.named_parameters()))
    ends = []
    for path in run[:3]:
        model.use(path)
        ends.append(p.clone())
    for t, u in ((0, 0.25), (1, 1.0), (0, 0.0)):
        segments.put(t, u)
        torch.testing.assert_close(p, (1 - u) * ends[t] + u * ends[t + 1])
    assert name in segments.basis


def test_a_path_needs_two_different_checkpoints(run):
    model = load_model(run[0], dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="two checkpoints or more, found 1"):
        Segments(model, run[:1])
    with pytest.raises(ModelError, match="same weights"):
        Segments(model, [run[0], run[0]])
