"""The parent's side of the vLLM child: memory ladder, death, hang, interrupt. Against a fake child, so nothing heavy starts."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

pytest.importorskip("vllm", reason="the parent's side asks whether vLLM is installed")

from curate.errors import EngineError
from curate.passes.sampling.types import Prompt, Sampling
from curate.passes.sampling.vllm import VllmSampler
from curate.passes.sampling.vllm_memory import Memory, less_memory
from tests.conftest import REPOSITORY
from tests.tiny_models import make_llama

CPU = Memory(device="cpu", max_num_seqs=256, max_num_batched_tokens=4096, kv_cache_bytes=800, kv_cache_floor=300)
GPU = Memory(device="cuda")
OOM = "CUDA out of memory. Tried to allocate 20 GiB"


class FakeSampler(VllmSampler):
    module = "tests.passes.fake_engine"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return make_llama(folder / "a", seed=1), make_llama(folder / "b", seed=2)


def word(text):
    return [Prompt([ord(c) for c in text], text, None, seed=0)]


def ended(pid, patience=20.0):
    """Whether the process is gone, waiting for it without sleeping."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    gone, _, _ = select.select([handle], [], [], patience)
    os.close(handle)
    return bool(gone)


LADDER = [  # (memory, failure, what is different on the next rung; None: there is none)
    (CPU, OOM, {"kv_cache_bytes": 400, "max_num_seqs": 128, "max_num_batched_tokens": 2048}),
    (replace(CPU, kv_cache_bytes=400), OOM, {"kv_cache_bytes": 300, "max_num_seqs": 128, "max_num_batched_tokens": 2048}),
    (replace(CPU, kv_cache_bytes=300, max_num_seqs=8, max_num_batched_tokens=256), OOM, None),
    (GPU, OOM, {"utilization": 0.75, "eager": True, "max_num_seqs": 128, "max_num_batched_tokens": 2048}),
    (GPU, "Free memory on device cuda:0 (8.0/16.0 GiB) on startup is less than desired",
     {"utilization": 0.47, "eager": True, "max_num_seqs": 128, "max_num_batched_tokens": 2048}),
    (GPU, "4 GiB KV cache is needed, which is larger than the available KV cache memory (1 GiB)",
     {"utilization": 0.95, "eager": True, "max_num_seqs": 128, "max_num_batched_tokens": 2048}),
    (replace(GPU, utilization=0.15), OOM, None),
]  # fmt: skip


@pytest.mark.parametrize(("memory", "failure", "changes"), LADDER)
def test_next_rung_of_the_memory_ladder(memory, failure, changes):
    step = less_memory(memory, failure)
    assert step is None if changes is None else step[0] == replace(memory, **changes)


@pytest.mark.parametrize(
    "failure", [OOM, "Free memory on device cuda:0 (8.0/16.0 GiB)", "No available memory for the cache blocks"]
)
@pytest.mark.parametrize("start", [CPU, GPU])
def test_the_ladder_ends(start, failure):
    memory, steps = start, 0
    while (step := less_memory(memory, failure)) is not None:
        memory, steps = step[0], steps + 1
        assert steps < 20


def test_short_memory_starts_again_with_less_and_says_so(models):
    with FakeSampler(models[0]) as sampler:
        assert sampler._memory.max_num_seqs == 64
        assert len(sampler.notes) == 2 and "128 sequences" in sampler.notes[0] and "64 sequences" in sampler.notes[1]


def test_short_memory_in_a_call_keeps_the_swapped_weights(models):
    with FakeSampler(models[0], memory=Memory(device="cpu", max_num_seqs=8, max_num_batched_tokens=4096)) as sampler:
        sampler.use(models[1])
        (sample,) = sampler.sample(word("weights"), Sampling())[0]
        assert sample.text == str(models[1])
        assert sampler._memory.max_num_batched_tokens == 1024 and len(sampler.notes) == 2


def test_another_architecture_means_another_engine(models, tmp_path):
    deeper = make_llama(tmp_path / "deeper", seed=3, layers=3)
    with FakeSampler(models[0]) as sampler:
        first = sampler.pid
        sampler.use(models[1])
        assert sampler.pid == first
        sampler.use(deeper)
        assert sampler.pid != first and ended(first) and "deeper" in sampler.notes[-1]


def test_a_dead_child_is_an_error_with_its_last_lines(models):
    with FakeSampler(models[0]) as sampler:
        pid = sampler.pid
        with pytest.raises(EngineError, match=r"(?s)exit code 3 during `sample`.*the last words"):
            sampler.sample(word("die"), Sampling())
        assert ended(pid)
        with pytest.raises(EngineError, match="is closed"):
            sampler.sample(word("die"), Sampling())


def test_a_hang_is_ended_in_time(models):
    with FakeSampler(models[0], call_timeout=0.2) as sampler:
        pid = sampler.pid
        with pytest.raises(EngineError, match="did not answer `sample` within"):
            sampler.sample(word("hang"), Sampling(max_new_tokens=1))
        assert ended(pid)


def test_an_interrupt_in_the_parent_ends_the_child(models):
    with FakeSampler(models[0]) as sampler:
        pid = sampler.pid
        with pytest.raises(KeyboardInterrupt):
            sampler.sample(word("interrupt"), Sampling())
        assert ended(pid)


def test_what_is_no_want_of_memory_is_not_tried_again(models):
    with pytest.raises(EngineError, match=r"float64 is not for me.*engine.sampler=transformers"):
        FakeSampler(models[0], dtype="float64", memory=Memory(device="cpu", max_num_seqs=8))
    with FakeSampler(models[0]) as sampler, pytest.raises(EngineError, match="no such thing"):
        sampler.sample(word("refuse"), Sampling())


def test_the_child_ends_with_its_parent():
    script = (
        "import os; from curate.passes.sampling.process import EngineProcess\n"
        "child = EngineProcess('tests.passes.fake_engine', environment=dict(os.environ), label='fake')\n"
        "child.call('open', timeout=60); print(child.pid, flush=True)\n"
        "child.call('sample', timeout=600, ids=[[1]])"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ended(pid)
    parent.stdout.close()


def adapter(folder, rank, layer):
    """An adapter's folder with empty factors of one layer."""
    folder.mkdir()
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "a"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    names = [f"base_model.model.model.layers.0.self_attn.{layer}.lora_{x}.weight" for x in "AB"]
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def test_when_an_engine_is_kept_and_when_it_is_started_anew_for_adapters(models, tmp_path):
    base, other = map(str, models)
    one, two = adapter(tmp_path / "one", 4, "q_proj"), adapter(tmp_path / "two", 12, "v_proj")
    small = replace(CPU, max_num_seqs=8, max_num_batched_tokens=512)
    with FakeSampler(base, adapters=[one], memory=small) as sampler:
        seen, pids = [], []

        def use(path, on=None):
            sampler.use(path, base=on)
            settings, weights, adapter = sampler._call("told", tokens=0)
            seen.append((settings.get("max_lora_rank"), settings.get("lora_target_modules"), weights, adapter))
            pids.append(sampler.pid)

        for step in ((one, base), (base,), (two, base), (one, base), (other,), (base,), (one, base), (one, other)):
            use(*step)
    q, qv = ["q_proj"], ["q_proj", "v_proj"]
    assert seen == [
        (8, q, base, str(one)),  # the engine was opened for it
        (8, q, base, None),
        (16, qv, base, str(two)),  # anew: another rank and another layer
        (16, qv, base, str(one)),
        (None, None, other, None),  # anew: other whole weights
        (None, None, base, None),
        (8, q, base, str(one)),  # anew: an engine that was opened without adapters
        (8, q, other, str(one)),  # anew: another base
    ]
    assert [a == b for a, b in pairwise(pids)] == [True, False, True, False, True, False, False]
    assert len(sampler.notes) == 4 and "rank 12 on v_proj" in sampler.notes[0]


def test_an_engine_that_was_started_again_has_its_adapter_back(models, tmp_path):
    base, one = str(models[0]), adapter(tmp_path / "one", 4, "q_proj")
    with FakeSampler(one, base=base, memory=replace(CPU, max_num_seqs=8)) as sampler:
        sampler.sample(word("weights"), Sampling())  # halves the tokens at a time, twice
        settings, weights, on = sampler._call("told", tokens=0)
        assert settings["max_num_batched_tokens"] == 1024 and (weights, on) == (base, str(one))
