"""The forward pass against a slow float64 loop, on many architectures, in both layouts, under any batch and order."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from curate.errors import CurateError, ModelError
from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.contract import Measurement
from curate.passes.layout import Layout
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair
from tests.passes.forward_models import FAMILIES, VOCABULARY, double, make, oracle, oracle_side, random_pairs

PADDED = {"bloom", "mamba"}  # no attention interface
PAIRS = [MEASUREMENTS["likelihood"], MEASUREMENTS["hidden"]]
SFT = [MEASUREMENTS["target_likelihood"]]


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Within `tolerance` of log-probs, of |⟨h+,h−⟩| + ‖h+‖² (+ ‖h−‖²) for hidden products, of the norms for the last states."""
    terms = np.abs(wanted["hidden_cr"]) + wanted["hidden_cc"] + wanted["hidden_rr"]
    for name, values in found.items():
        scale = np.abs(wanted[name]) if "logp" in name else wanted["last_scale"] if name == "last_cr" else terms
        np.testing.assert_array_less(np.abs(values - wanted[name]) / scale, tolerance, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_float64_loop(family):
    module = make(family)
    model = Model(module)
    assert model.layout == ("padded" if family in PADDED else "packed"), model.layout_reason
    pairs = random_pairs(8)
    wanted = oracle(double(module), pairs)
    assert_equal(forward.measure(model, pairs, PAIRS), wanted)
    assert_equal(forward.measure(Model(module, layout="padded"), pairs, PAIRS), wanted)


def test_any_batch_and_order():
    module = make("llama")
    model = Model(module)
    pairs = random_pairs(24)
    wanted = oracle(double(module), pairs)
    for budget in (1, 50, 200, 10_000):
        assert_equal(forward.measure(model, pairs, PAIRS, token_budget=budget), wanted)
    order = np.random.default_rng(1).permutation(len(pairs))
    shuffled = forward.measure(model, [pairs[i] for i in order], PAIRS, token_budget=300)
    assert_equal(shuffled, {name: values[order] for name, values in wanted.items()})


def test_long_responses_cross_query_blocks(monkeypatch):
    """With 8 queries a block, every band of the causal mask is used, with and without a sliding window."""
    monkeypatch.setattr("curate.passes.kernels.attention_loop.QUERY_BLOCK", 8)
    for family in ("llama", "mistral_window", "gemma2"):
        module = make(family)
        pairs = random_pairs(6, longest=40)
        assert_equal(forward.measure(Model(module), pairs, PAIRS), oracle(double(module), pairs))


def test_kernels_for_cuda_give_the_same_attention():
    """What a GPU would run, run here: the last queries of a sequence, grouped key heads."""
    from curate.passes.kernels import attention, attention_loop

    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 30, 8, generator=generator) for _ in range(2))
    layout = Layout([], np.zeros(0), np.zeros(0), [], [], longest=30)
    extras = attention_loop.Extras(None, None, None, None, {})
    for n in (1, 9, 30):
        q = torch.randn(1, 4, n, 8, generator=generator)
        with attention.packed(layout):
            ours = torch.cat(list(attention_loop._tail(q, k, v, extras)), 1)
        torch.testing.assert_close(attention_loop._tail_on_cuda(q, k, v, None).transpose(1, 2), ours)


def test_left_padding_gives_the_same_numbers():
    """What a left-padded batch of the model itself gives: padding is not ours alone to choose."""
    module = make("qwen2")
    pairs = random_pairs(4)
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    longest = max(len(side.ids) for side in sides)
    ids, mask = torch.zeros(len(sides), longest, dtype=torch.long), torch.zeros(len(sides), longest, dtype=torch.long)
    for i, side in enumerate(sides):
        ids[i, longest - len(side.ids) :] = torch.from_numpy(side.ids)
        mask[i, longest - len(side.ids) :] = 1
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logp = module(input_ids=ids, attention_mask=mask, position_ids=positions).logits.double().log_softmax(-1)
    total = [
        float(logp[i, longest - side.n_response - 1 : -1].gather(1, ids[i, longest - side.n_response :, None]).sum())
        for i, side in enumerate(sides)
    ]
    found = forward.measure(Model(module), pairs, PAIRS)
    np.testing.assert_allclose(found["chosen_logp"], total[::2], rtol=1e-5)
    np.testing.assert_allclose(found["rejected_logp"], total[1::2], rtol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_sft_rows_sharing_a_prompt(layout):
    module = make("llama")
    rng = np.random.default_rng(3)
    prompt = np.concatenate([[1], rng.integers(3, VOCABULARY, 20)])
    rows = []
    for _ in range(9):
        own = prompt if len(rows) % 3 else rng.integers(3, VOCABULARY, 5)
        rows.append(
            Encoded(np.concatenate([own, rng.integers(3, VOCABULARY, rng.integers(1, 12))]).astype(np.int32), len(own))
        )
    module64 = double(module)
    wanted = [
        oracle_side(module64, row)[0].gather(1, torch.from_numpy(row.ids[row.start :, None].astype(int)))
        for row in rows
    ]
    for budget in (30, 10_000):
        found = forward.measure(
            Model(module, layout=layout if layout == "padded" else "auto"), rows, SFT, token_budget=budget
        )
        np.testing.assert_allclose(found["target_logp"], [float(w.sum()) for w in wanted], rtol=1e-5)
        np.testing.assert_allclose(found["target_nll"], [-float(w.mean()) for w in wanted], rtol=1e-5)
    assert forward.tokens_to_run(rows) < sum(len(row.ids) for row in rows) - 4 * 20


def test_a_prompt_is_run_once():
    pair = random_pairs(1, longest=30)[0]
    prefix = pair.shared
    assert forward.tokens_to_run([pair]) == len(pair.chosen.ids) + len(pair.rejected.ids) - prefix
    prompt = np.arange(20, dtype=np.int32)
    pairs = []
    for i in range(3):
        a, b = (np.concatenate([prompt, [30 + i, 40 + j]]).astype(np.int32) for j in range(2))
        pairs.append(EncodedPair(Encoded(a, 20), Encoded(b, 20), 21))
    assert forward.tokens_to_run(pairs) == 20 + 3 * 2 * 2


def test_rows_with_a_problem_are_unknown():
    pairs = random_pairs(3)
    pairs[1] = replace(pairs[1], rejected=replace(pairs[1].rejected, problem="cut off"))
    sft = Encoded(pairs[0].chosen.ids, pairs[0].chosen.start)
    found = forward.measure(Model(make("llama")), [*pairs, sft], [*PAIRS, *SFT])
    assert np.isnan(found["chosen_logp"]).tolist() == [False, True, False, True]
    assert np.isnan(found["target_logp"]).tolist() == [True, True, True, False]
    np.testing.assert_allclose(found["target_logp"][3], found["chosen_logp"][0], rtol=1e-6)


def test_no_rows():
    found = forward.measure(Model(make("llama")), [], PAIRS)
    assert {values.shape for values in found.values()} == {(0,)}


def test_memorised_targets_keep_their_digits():
    """Perplexities come as low as 1.0000026: a float32 softmax would round 1 − π away."""
    module = make("llama")
    row = Encoded(np.asarray([1, 5, 7], np.int32), 2)
    with torch.no_grad():
        out = module(input_ids=torch.tensor([[1, 5]]), output_hidden_states=True)
        state = out.hidden_states[-1][0, -1]
        module.lm_head.weight[7] = state * (out.logits[0, -1].max() + 16) / state.square().sum()
        logits = double(module)(input_ids=torch.tensor([[1, 5]])).logits[0, -1]
    others = torch.cat([logits[:7], logits[8:]])
    exact = -float(torch.nn.functional.softplus(torch.logsumexp(others, 0) - logits[7]))
    found = forward.measure(Model(module), [row], SFT)["target_logp"][0]
    assert -3e-6 < exact < 0
    assert abs(found - exact) < 1e-4 * abs(exact)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("problem", OUT_OF_MEMORY, ids=lambda problem: type(problem).__name__)
def test_out_of_memory_halves_the_batch(problem):
    module = make("llama")
    model = Model(module)
    pairs = random_pairs(8)
    whole = model.packed_states

    def short_of_memory(layout):
        if len(layout.items) > 4:
            raise problem
        return whole(layout)

    model.packed_states = short_of_memory
    assert_equal(forward.measure(model, pairs, PAIRS), oracle(double(module), pairs))

    def none_at_all(layout):
        raise problem

    model.packed_states = none_at_all
    with pytest.raises(ModelError, match="does not fit into the memory"):
        forward.measure(model, pairs, PAIRS)


def test_bf16_is_close_and_sums_wide():
    module = make("llama")
    pairs = random_pairs(16)
    wanted = oracle(double(module.bfloat16()), pairs)
    model = Model(module)
    assert "bfloat16" in model.engine
    found = forward.measure(model, pairs, PAIRS)
    np.testing.assert_allclose(found["chosen_logp"], wanted["chosen_logp"], rtol=0.02)
    np.testing.assert_allclose(found["hidden_cc"], wanted["hidden_cc"], rtol=0.05)


def test_rows_beyond_learned_positions():
    row = Encoded(np.full(300, 5, np.int32), 2)
    with pytest.raises(ModelError, match="max_length=256"):
        forward.measure(Model(make("gpt2")), [row], SFT)


def test_a_head_we_do_not_understand_is_refused_by_name():
    module = make("granite")
    module.config.logits_scaling = 1.0  # the module keeps its own scale: our reading of the config is wrong now
    module.logits_scaling = 4.0
    module.lm_head.register_forward_hook(lambda part, given, out: out / 7.0)
    with pytest.raises(ModelError, match="GraniteForCausalLM"):
        Model(module)


def test_attention_we_do_not_understand_runs_padded():
    module = make("llama")
    for layer in module.model.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, plain=plain, **k: plain(*a, **k, position_bias=torch.zeros(1))
    model = Model(module)
    assert model.layout == "padded"
    assert "position_bias" in model.layout_reason
    assert "LlamaForCausalLM" in model.layout_reason


def test_measurements_must_return_what_they_declare():
    model, pairs = Model(make("llama")), random_pairs(2)

    def one(function, head=()):
        return [Measurement("mine", "forward", "preference", {"mine": ""}, 1, function, head)]

    with pytest.raises(CurateError, match="one number per row"):
        forward.measure(model, pairs, one(lambda batch: {"mine": batch.chosen.logp}, ("logp",)))
    with pytest.raises(CurateError, match="declared the columns mine, returned other"):
        forward.measure(model, pairs, one(lambda batch: {"other": batch.chosen.lengths}))
    with pytest.raises(CurateError, match=r'head=\("entropy"'):
        forward.measure(model, pairs, one(lambda batch: {"mine": batch.chosen.mean(batch.chosen.entropy)}))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_freed_memory_is_reused():
    """A later use of 120 MB in fifteen tensors asks the system for no page, or for a tensor's 2,048 where the heap lies badly; without
    its bound on what is kept, for 14,336.
    """
    code = """
import resource, torch
from curate.passes.loading.facts import keep_freed_memory

def use():
    kept = [torch.ones(2 << 20) for _ in range(15)]

keep_freed_memory()
use()
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True)
    assert int(ran.stdout) < 4096
