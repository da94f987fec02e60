"""Pair eNTK against two float64 backwards and a dot product, on many architectures; against PEFT's own gradients; against a step really taken."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from curate.errors import ModelError
from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.gradients import backward
from curate.passes.gradients import head as head_gradient
from curate.passes.gradients import memory as backward_memory
from curate.passes.gradients.capture import Capture
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair
from tests.passes.forward_models import BODY, FAMILIES, adapted, detach_below, double, make, random_pairs

ENTK = [MEASUREMENTS["entk"]]
BOTH = [MEASUREMENTS["entk"], MEASUREMENTS["likelihood"], MEASUREMENTS["hidden"], MEASUREMENTS["entropy"]]
SHORT = {"phi3_long", "llama_dynamic"}  # from 20 tokens on their angles depend on the row


def gradient(module64: torch.nn.Module, side: Encoded, wanted: list[torch.nn.Parameter]) -> torch.Tensor:
    """∇ of the summed response log-probability by autograd, one vector."""
    ids = torch.from_numpy(side.ids.astype(np.int64))[None]
    logp = module64(input_ids=ids, use_cache=False).logits[0, side.start - 1 : -1].log_softmax(-1)
    total = logp.gather(1, ids[0, side.start :, None]).sum()
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(wanted, found)])


def products(module64: torch.nn.Module, pairs: list[EncodedPair], names: str = "") -> np.ndarray:
    """(rows, 3): K++, K+−, K−− over the parameters whose name contains `names`."""
    module64.requires_grad_(False)
    wanted = [p.requires_grad_() for name, p in module64.named_parameters() if names in name]
    rows = []
    for pair in pairs:
        c, r = (gradient(module64, side, wanted) for side in (pair.chosen, pair.rejected))
        rows.append([float(c @ c), float(c @ r), float(r @ r)])
    return np.asarray(rows)


def columns(found: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([found["entk_cc"], found["entk_cr"], found["entk_rr"]], 1)


def worst(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error over |g||g'|."""
    cc, rr = wanted[:, 0], wanted[:, 2]
    return float((np.abs(found - wanted) / np.stack([cc, np.sqrt(cc * rr), rr], 1)).max())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])
def test_every_family_equals_two_float64_backwards(family):
    module = make(family)
    pairs = random_pairs(6, longest=7 if family in SHORT else 30)
    wanted = products(double(module), pairs)
    error = worst(columns(backward.measure(Model(module), pairs, ENTK)), wanted)
    if error >= 1e-6:  # granite on some processors: then autograd's own float32 gradients are as far off there
        assert error < 2 * worst(products(copy.deepcopy(module), pairs), wanted)
    assert worst(columns(backward.measure(Model(double(module)), pairs, ENTK)), wanted) < 1e-6


def test_one_pass_gives_the_forward_measurements_too():
    for family in ("llama", "gemma2", "bloom"):
        model, pairs = Model(make(family)), random_pairs(7)
        both, plain = backward.measure(model, pairs, BOTH), forward.measure(model, pairs, BOTH[1:])
        for name, values in plain.items():
            np.testing.assert_allclose(both[name], values, rtol=1e-4, err_msg=name)


def test_any_batch_and_order_and_layout():
    module = make("llama_tied")
    pairs = random_pairs(16)
    wanted = products(double(module), pairs)
    model = Model(module)
    for budget in (1, 100, 100_000):
        assert worst(columns(backward.measure(model, pairs, ENTK, token_budget=budget)), wanted) < 1e-6
    order = np.random.default_rng(1).permutation(len(pairs))
    shuffled = backward.measure(model, [pairs[i] for i in order], ENTK, token_budget=300)
    assert worst(columns(shuffled), wanted[order]) < 1e-6
    padded = backward.measure(Model(module, layout="padded"), pairs, ENTK, token_budget=300)
    assert worst(columns(padded), wanted) < 1e-6


def test_both_forms_and_every_block(monkeypatch):
    """Tiles and blocks of a few numbers, token products and matrices forced, logits kept and not."""
    module, pairs = make("gpt_neox"), random_pairs(6)
    head = module.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(len(head.weight)))
    wanted = products(double(module), pairs)
    monkeypatch.setattr("curate.passes.gradients.products.TILE", 5)
    monkeypatch.setattr("curate.passes.gradients.products.BLOCK", 100)
    monkeypatch.setattr("curate.passes.head.COLUMNS", 16)
    monkeypatch.setattr(head_gradient, "ROWS", 7)
    for tokens in (True, False):
        monkeypatch.setattr("curate.passes.gradients.products.prefers_tokens", lambda *a, tokens=tokens: tokens)
        for keep in (0, 1 << 20):
            monkeypatch.setattr(head_gradient, "KEEP", keep)
            assert worst(columns(backward.measure(Model(module), pairs, ENTK)), wanted) < 1e-6


def test_layers_run_again_give_the_same(monkeypatch):
    for family in ("qwen3", "gemma3", "llama_tied"):
        module, pairs = make(family), random_pairs(5)
        wanted = products(double(module), pairs)
        monkeypatch.setattr(backward_memory.Footprint, "checkpointed", lambda *a: True)
        assert worst(columns(backward.measure(Model(module), pairs, ENTK)), wanted) < 1e-6


def test_activations_kept_apart_give_the_same(monkeypatch):
    monkeypatch.setattr(backward, "APART", 0)
    monkeypatch.setattr("curate.passes.gradients.graph_memory.SMALL", 0)
    for family in ("qwen3", "gemma2", "phi", "gpt_neox"):
        module, pairs = make(family), random_pairs(8)
        found = backward.measure(Model(module), pairs, ENTK, token_budget=200)
        assert worst(columns(found), products(double(module), pairs)) < 1e-6


def test_activations_kept_apart_are_not_told_from_heads_by_their_number(monkeypatch):
    """A batch of as many tokens as there are heads: (1, heads, tokens, d) looks like (1, tokens, heads, d)."""
    monkeypatch.setattr(backward, "APART", 0)
    monkeypatch.setattr("curate.passes.gradients.graph_memory.SMALL", 0)
    for name, value in (("hidden_size", 128), ("num_attention_heads", 16), ("num_key_value_heads", 16)):
        monkeypatch.setitem(BODY, name, value)
    ids = np.random.default_rng(0).integers(3, 101, 12).astype(np.int32)
    pair = EncodedPair(Encoded(ids[:8], 4), Encoded(np.concatenate([ids[:4], ids[8:]]), 4), 4)
    for family in ("phi", "gpt_neox"):
        module = make(family)
        assert worst(columns(backward.measure(Model(module), [pair], ENTK)), products(double(module), [pair])) < 1e-6


def test_a_padding_token_among_the_probe_is_no_unknown_layer(monkeypatch):
    """torch gives the line of padding_idx no gradient; which token that is depends on the tokenizer."""
    monkeypatch.setitem(BODY, "pad_token_id", 47)  # the first token of the probe, were it not left out
    for family in ("llama", "llama_tied"):
        module, pairs = make(family), random_pairs(4)
        assert module.get_input_embeddings().padding_idx == 47
        plain = double(module)
        plain.get_input_embeddings().padding_idx = None  # the gradient of the function
        assert worst(columns(backward.measure(Model(module), pairs, ENTK)), products(plain, pairs)) < 1e-6


def test_the_last_layers():
    """Parameters of the last layers, the final norm and the head; what comes before gets none, nor does a tied matrix as an embedding."""
    for family in ("llama", "llama_tied", "gpt2"):
        module, pairs = make(family), random_pairs(5)
        module64 = double(module)
        layers = module64.model.layers if hasattr(module64, "model") else module64.transformer.h
        detach_below(layers[1])
        wanted = products(module64, pairs)
        assert worst(columns(backward.measure(Model(module), pairs, ENTK, parameters=1)), wanted) < 1e-6


def test_lora_equals_pefts_own_gradients():
    module, pairs = adapted("qwen2"), random_pairs(6)
    wanted = products(double(module), pairs, "lora_")
    found = backward.measure(Model(module.get_base_model()), pairs, ENTK, parameters="lora")
    assert worst(columns(found), wanted) < 1e-6


def test_a_step_really_taken_moves_what_was_forecast():
    """θ + s(g+ − g−): Δlogp+ ≈ s(K++ − K+−), Δlogp− ≈ s(K+− − K−−)."""
    module64, pair = double(make("gpt_neox")), random_pairs(3)[2]  # its norms stay in float64
    logps = [MEASUREMENTS["likelihood"]]
    model = Model(module64)
    found = backward.measure(model, [pair], [*ENTK, *logps])
    cc, cr, rr = columns(found)[0]
    stepped = copy.deepcopy(module64).requires_grad_(True)
    wanted = list(stepped.parameters())
    move = gradient(stepped, pair.chosen, wanted) - gradient(stepped, pair.rejected, wanted)
    s, at = 1e-9, 0
    with torch.no_grad():
        for p in wanted:
            p += s * move[at : at + p.numel()].view_as(p)
            at += p.numel()
    after = forward.measure(Model(stepped), [pair], logps)
    change = [float(after[name][0] - found[name][0]) for name in ("chosen_logp", "rejected_logp")]
    np.testing.assert_allclose(change, [s * (cc - cr), s * (cr - rr)], rtol=1e-3)


def test_sft_rows():
    module = make("mistral_window")
    rows = [pair.chosen for pair in random_pairs(8)]
    module64 = double(module).requires_grad_(True)
    norms = [float(gradient(module64, row, list(module64.parameters())).norm()) / row.n_response for row in rows]
    wanted = [MEASUREMENTS[name] for name in ("loss_gradient", "target_likelihood", "alone")]
    found = backward.measure(Model(module), rows, wanted)
    np.testing.assert_allclose(found["loss_gradient"], norms, rtol=1e-5)
    plain = forward.measure(Model(module), rows, wanted[1:])
    for name, values in plain.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4)


def test_rows_with_a_problem_are_unknown():
    pairs = random_pairs(3)
    pairs[1] = replace(pairs[1], rejected=replace(pairs[1].rejected, problem="cut off"))
    found = backward.measure(Model(make("llama")), [*pairs, pairs[0].chosen], ENTK)
    assert np.isnan(found["entk_cr"]).tolist() == [False, True, False, True]
    assert backward.measure(Model(make("llama")), [], ENTK)["entk_cc"].shape == (0,)


def test_equal_responses_have_equal_gradients():
    pair = random_pairs(1)[0]
    same = EncodedPair(pair.chosen, pair.chosen, len(pair.chosen.ids))
    cc, cr, rr = columns(backward.measure(Model(make("llama")), [same], ENTK))[0]
    np.testing.assert_allclose([cr, rr], [cc, cc], rtol=1e-6)


def test_the_model_is_left_as_it_was():
    module = make("llama")
    model, pairs = Model(module), random_pairs(2)
    before = {name: p.clone() for name, p in module.named_parameters()}
    backward.measure(model, pairs, ENTK)
    assert not any("forward" in part.__dict__ or part._forward_pre_hooks for part in module.modules())
    for name, p in module.named_parameters():
        assert p.grad is None and not p.requires_grad and torch.equal(p, before[name])


@pytest.mark.parametrize(
    "kind, extra, words",
    [
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "experts.gate_up_proj belongs to a MixtralExperts"),
        ("Mamba", {"state_size": 4}, "A_log belongs to a MambaMixer"),
    ],
)  # fmt: skip
def test_what_has_no_rule_is_refused_by_name(kind, extra, words):
    module = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**BODY, **extra)).eval()
    model = Model(module)
    gates = [p for name, p in module.named_parameters() if name.endswith("gate.weight")]
    assert gates or kind == "Mamba"
    with pytest.raises(ModelError, match=r"no rule") as error:
        backward.measure(model, random_pairs(1), ENTK)
    assert kind in str(error.value) and (words in str(error.value) or "mlp.gate.weight" in str(error.value))


def test_a_parameter_used_behind_its_modules_back_is_noticed():
    module = make("llama")
    layer = module.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + x @ layer.down_proj.weight @ layer.down_proj.weight.T  # not through the module
    with pytest.raises(ModelError, match="not what autograd gives"):
        backward.measure(Model(module), random_pairs(1), ENTK)


def test_too_long_a_row_is_refused_before_anything_runs(monkeypatch):
    model, pairs = Model(make("llama")), random_pairs(4)
    backward.measure(model, pairs, ENTK)
    monkeypatch.setattr(backward_memory, "free_memory", lambda: 100_000)
    ran = []
    monkeypatch.setattr(backward, "run", lambda *a, **k: ran.append(1))
    with pytest.raises(ModelError, match=r"max_length=.*token_budget"):
        backward.measure(model, pairs, ENTK)
    assert not ran
    with pytest.raises(ModelError, match="max_length=19"):
        backward.measure(Model(make("llama_dynamic")), random_pairs(4), ENTK)


def test_the_estimate_is_what_a_graph_keeps():
    """Bytes per token, read off two short sequences, foretell a longer one's within a tenth."""
    model = Model(make("llama"))
    rules, memory = backward.checked_rules(model, "all")
    found = backward_memory._saved(model, rules, 200)
    assert abs(memory.linear * 200 + memory.square * 200**2 - found) < 0.1 * found


def test_bf16_is_close():
    module = make("llama").bfloat16()
    pairs = random_pairs(6)
    assert worst(columns(backward.measure(Model(module), pairs, ENTK)), products(double(module), pairs)) < 0.1


def test_a_closed_model_leaves_nothing_behind(monkeypatch):
    """What was found out about its layers holds its weights, a graph that was never let go its activations: on a GPU both would stay there."""
    made, init = [], Capture.__post_init__
    monkeypatch.setattr(Capture, "__post_init__", lambda self: (init(self), made.append(weakref.ref(self)))[0])
    model = Model(make("llama"))
    rules = weakref.ref(backward.checked_rules(model, "all")[0])
    for again in (False, True):  # kept, and run again on the way back
        monkeypatch.setattr(backward_memory.Footprint, "checkpointed", lambda *_, again=again: again)
        backward.measure(model, random_pairs(4), ENTK)
    model.close()
    gc.collect()
    assert len(made) == 5 and [one() for one in made] == [None] * 5
    assert rules() is None
