"""The block mask that CUDA runs, here on the CPU uncompiled, against the loop over branches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.kernels import attention, attention_loop, block_mask
from curate.passes.layout import Group, Item, Layout
from curate.passes.loading.model import Model
from tests.passes.forward_models import make, random_pairs

PAIRS = [MEASUREMENTS["likelihood"], MEASUREMENTS["hidden"]]


@pytest.fixture
def on_block_mask(monkeypatch):
    """This CPU takes the road of CUDA; flex_attention runs as it stands."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(block_mask, "serves", lambda device: True)
    monkeypatch.setattr(attention, "_refusals", {})


def random_layout(seed: int, n_groups: int, *, longest: int = 60) -> Layout:
    """Prompts of any length, none included, with one to four branches each."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(n_groups):
        prefix = rng.integers(0, 9, rng.integers(0, longest)).astype(np.int32)
        own = [rng.integers(0, 9, rng.integers(1, longest)).astype(np.int32) for _ in range(rng.integers(1, 5))]
        groups.append(Group(tuple(Item(0, "", np.concatenate([prefix, ids]), 1) for ids in own), len(prefix)))
    return Layout.of(groups)


def who_sees_whom(layout: Layout, window: int | None) -> np.ndarray:
    """(N, N) bool by definition: each sequence causal (and within its window) in its own positions."""
    seen = np.zeros((len(layout.ids), len(layout.ids)), bool)
    for where in layout.where:
        position = np.arange(len(where))
        behind = position[:, None] - position[None, :]
        seen[np.ix_(where, where)] |= (behind >= 0) & (behind < (window or len(where)))
    return seen


@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize(("seed", "n_groups"), [(0, 1), (1, 2), (2, 12)])
def test_the_mask_is_the_definition(seed, n_groups, window):
    layout = random_layout(seed, n_groups, longest=150)
    low = None if window is None else np.maximum(np.arange(layout.longest) - window + 1, 0)
    first, end, own = block_mask.key_ranges(layout, low)
    size, n_tokens = len(own), len(layout.ids)
    assert size % block_mask.BLOCK == 0
    assert size >= 2 * block_mask.BLOCK
    q, k = np.arange(size)[:, None], np.arange(size)[None, :]
    seen = ((k >= first[:, None]) & (k < end[:, None])) | ((k >= own[:, None]) & (k <= q))
    wanted = np.eye(size, dtype=bool)
    wanted[:n_tokens, :n_tokens] = who_sees_whom(layout, window)
    np.testing.assert_array_equal(seen, wanted)

    partial, full = block_mask.key_blocks(*(torch.from_numpy(numbers) for numbers in (first, end, own)))
    blocks = wanted.reshape(size // 128, 128, size // 128, 128)
    np.testing.assert_array_equal(full.numpy(), blocks.all((1, 3)))
    np.testing.assert_array_equal(partial.numpy(), blocks.any((1, 3)) & ~blocks.all((1, 3)))


def test_window_reads_sliding_and_chunked_patterns():
    def read(function):
        return block_mask.window(function, 10, "cpu", rows=3)

    assert read(lambda b, h, q, k: k <= q).tolist() == [0] * 10
    assert read(lambda b, h, q, k: (k <= q) & (k > q - 4)).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert read(lambda b, h, q, k: (k <= q) & (k // 4 == q // 4)).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert read(lambda b, h, q, k: (k <= q) & (k != 1)) is None  # with a hole
    assert read(lambda b, h, q, k: (k <= q) & (k != q)) is None  # not itself
    assert read(lambda b, h, q, k: k <= q + 1) is None  # not causal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("extra", ["none", "softcap", "sinks"])
@pytest.mark.parametrize("window", [None, 20])
def test_equals_the_loop(on_block_mask, dtype, kv_heads, extra, window):
    generator = torch.Generator().manual_seed(0)
    layout = random_layout(3, 6)
    q, k, v = (
        torch.randn(1, heads, len(layout.ids), d, generator=generator, dtype=dtype)
        for heads, d in ((4, 16), (kv_heads, 16), (kv_heads, 24))
    )
    softcap = 2.0 if extra == "softcap" else None
    sinks = torch.randn(4, generator=generator, dtype=dtype) if extra == "sinks" else None
    low = None if window is None else (torch.arange(layout.longest) - window + 1).clamp_min(0)
    pattern = None if low is None else attention._dense(low, {})
    with attention.packed(layout):
        extras = attention_loop.Extras(0.3, softcap, sinks, pattern, layout.masks)
        theirs = attention_loop.by_loop(q, k, v, extras)
        ours = attention._by_block_mask(q, k, v, low, extras)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "mistral_window", "gemma2", "gemma3", "gpt_neox", "gpt2"])
def test_families_give_the_loops_numbers(on_block_mask, monkeypatch, family):
    module, pairs = make(family), random_pairs(8)
    with monkeypatch.context() as patch:
        patch.setattr(block_mask, "serves", lambda device: False)
        wanted = forward.measure(Model(module), pairs, PAIRS)
    ran = []
    attend = block_mask.attend
    monkeypatch.setattr(block_mask, "attend", lambda *a, **k: ran.append(1) or attend(*a, **k))
    model = Model(module)
    assert (model.layout, model.layout_reason, ran != []) == ("packed", None, True)
    ran.clear()
    builds = []
    build = block_mask.build
    monkeypatch.setattr(block_mask, "build", lambda *a: builds.append(1) or build(*a))
    found = forward.measure(model, pairs, PAIRS)
    assert len(ran) == 2  # one batch, two layers
    assert len(builds) == (2 if family in ("gemma2", "qwen2_window") else 1)  # one a kind of layer
    for name, values in found.items():
        scale = np.abs(wanted[name]) if "logp" in name else wanted["hidden_cc"] + wanted["hidden_rr"]
        np.testing.assert_array_less(np.abs(values - wanted[name]) / scale, 1e-5, err_msg=name)


def failing(*args, **kwargs):
    raise RuntimeError("No valid triton configs\nout of resource")


def wrong(query, key, value, mask, **kwargs):
    return query * 0


@pytest.mark.parametrize(("kernel", "reason"), [(failing, "No valid triton configs"), (wrong, "differs from the loop")])
def test_a_kernel_that_fails_or_errs_leaves_the_loop_and_says_why(on_block_mask, monkeypatch, kernel, reason):
    module, pairs = make("gemma2"), random_pairs(4)
    with monkeypatch.context() as patch:
        patch.setattr(block_mask, "serves", lambda device: False)
        wanted = forward.measure(Model(module), pairs, PAIRS)
    calls = []
    monkeypatch.setattr(block_mask, "attend", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    model = Model(module)
    found = forward.measure(model, pairs, PAIRS)
    assert model.layout == "packed"
    assert reason in model.layout_reason
    assert len(calls) == 1  # tried once per kind of attention
    for name in found:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_out_of_memory_is_not_a_refusal(on_block_mask, monkeypatch):
    model = Model(make("llama"))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(block_mask, "attend", full)
    with pytest.raises(torch.OutOfMemoryError):
        model.packed_states(random_layout(0, 1))


def test_no_batch_is_a_new_program(monkeypatch):
    """Compiled as on CUDA, but for the code generator: one program for rows of any length and any mask."""
    compile_, programs = torch.compile, []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    torch._dynamo.reset()
    kernel = block_mask._kernel.__wrapped__(0.25, 2.0, True, True)
    for seed, n_groups in ((0, 1), (1, 4), (2, 9), (3, 20)):
        layout = random_layout(seed, n_groups)
        mask = block_mask.build(layout, None, torch.device("cpu"))
        q, k, v = (torch.randn(1, heads, len(mask[0]), 16) for heads in (4, 2, 2))
        with torch.inference_mode():
            out, _ = kernel(q, k, v, *mask)
            torch.testing.assert_close(out, block_mask.attend(q, k, v, mask, scaling=0.25, softcap=2.0))
    assert len(programs) == 1
    torch._dynamo.reset()
