"""A real vLLM engine on this machine, against transformers: log-probs, weight swap, seeds, distributions, a kill.

Two engines are started in all, each 5–15 s.
"""

from __future__ import annotations

import os
import select
import signal
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from transformers import AutoModelForCausalLM

from curate.errors import EngineError, ModelError
from curate.passes.forward import load_model, response_logps
from curate.passes.sampling.engines import sampler_identity
from curate.passes.sampling.hf import HfSampler
from curate.passes.sampling.reasoned import Thinking, sample_reasoned
from curate.passes.sampling.swap_probe import SwapProbe
from curate.passes.sampling.types import Prompt, Sampling
from curate.passes.sampling.vllm import VllmSampler
from curate.passes.tokenizer import load_tokenizer
from tests.passes.sampled import sampled_rows
from tests.tiny_models import make_llama

CONTEXT = 96
STORY = Sampling(n=4, temperature=0.8, top_p=0.9, max_new_tokens=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints of one architecture, with tied embeddings: whatever a swap forgets shows in the log-probs."""
    folder = tmp_path_factory.mktemp("models")
    return [make_llama(folder / name, seed=seed, context=CONTEXT) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture(scope="module")
def engine(models):
    with VllmSampler(models[0]) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    """A folder with adapters of the second checkpoint: `a` and `b`, of different ranks, and `broken`, which has no weights."""
    from tests.passes.test_adapter import adapt

    folder = tmp_path_factory.mktemp("adapters")
    targets = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    adapt(models[1], folder / "a", targets)
    adapt(models[1], folder / "b", {**targets, "r": 12, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}, seed=2)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text((folder / "a" / "adapter_config.json").read_text())
    return folder


@pytest.fixture(scope="module")
def second(models, adapters):
    """An engine that starts on the checkpoint to which the first is swapped, and takes adapters."""
    with VllmSampler(models[1], adapters=[adapters / "a", adapters / "b"], max_length=CONTEXT) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def prompts(models):
    tokenizer = load_tokenizer(models[0])
    texts = [f"question {i}: what is {i} + {i * i}? " + "well " * (i % 4) for i in range(24)]
    return [Prompt(tokenizer(text)["input_ids"], text, None, seed=1000 + i) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def lengths():
    """Prompts of many lengths, up to one that leaves room for a single token."""
    random = np.random.default_rng(0)
    sizes = (1, 2, 3, 20, 33, 40, 70, CONTEXT - 10, CONTEXT - 1)
    return [Prompt([1, *random.integers(3, 40, n - 1).tolist()], "", None, seed=n) for n in sizes]


def oracle_logps(path, ids):
    """(T, V) float64 log-probs of every next token, from transformers, one row at a time."""
    model = oracle_logps.models.setdefault(path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    with torch.no_grad():
        return model(torch.tensor([list(map(int, ids))])).logits[0].double().log_softmax(-1).numpy()


oracle_logps.models = {}


def oracle_logp(path, row):
    logps = oracle_logps(path, row.ids)
    return sum(logps[at - 1, row.ids[at]] for at in range(row.start, len(row.ids)))


def gone(pid):
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ready, _, _ = select.select([handle], [], [], 20)
    os.close(handle)
    return bool(ready)


def test_log_probs_equal_the_forward_pass_for_every_checkpoint_of_a_series(engine, models, prompts, lengths):
    """The engine's sums over what it drew, against those of the weights that it should have, and not of the other checkpoint's."""
    tokenizer = load_tokenizer(models[0])
    for path, other in ((models[0], models[1]), (models[1], models[0]), (models[0], models[1])):
        engine.use(path)
        rows, found = sampled_rows(engine, tokenizer, [*prompts, *lengths], STORY)
        assert len(rows) > 60 and max(len(row.ids) for row in rows) == CONTEXT
        with load_model(path, dtype="float32") as model:
            np.testing.assert_allclose(found, response_logps(model, rows)[:, 0], rtol=0, atol=1e-4)
        with load_model(other, dtype="float32") as model:
            assert np.abs(found - response_logps(model, rows)[:, 0]).max() > 0.5


def test_identity_is_known_before_the_start(engine, models):
    assert engine.engine == sampler_identity("vllm", models[0])[0]
    assert engine.notes == []


def test_same_seeds_same_samples_on_a_repeated_shard(engine, models, prompts):
    engine.use(models[0])
    first = engine.sample(prompts, STORY)
    assert engine.sample(prompts, STORY) == first
    other = engine.sample([Prompt(p.ids, p.text, None, p.seed + 1) for p in prompts], STORY)
    assert [[s.text for s in row] for row in other] != [[s.text for s in row] for row in first]
    assert all(len(row) == 4 and len({s.text for s in row}) > 1 for row in first)


def test_sample_logp_is_the_untempered_models_own(engine, models, prompts):
    """Against transformers itself, one row at a time."""
    engine.use(models[0])
    rows, found = sampled_rows(engine, load_tokenizer(models[0]), prompts, STORY)
    assert len(rows) > 20
    np.testing.assert_allclose(found, [oracle_logp(models[0], row) for row in rows], rtol=0, atol=1e-4)


def test_a_prompt_without_room_gives_no_samples_and_a_tight_one_fewer_tokens(engine, models):
    engine.use(models[0])
    full, tight = Prompt([1] + [5] * (CONTEXT - 1), "", None, 1), Prompt([1] + [5] * (CONTEXT - 4), "", None, 1)
    none, few, also = engine.sample([full, tight, Prompt([1, 5], "", None, 1)], Sampling(n=2, max_new_tokens=40))
    assert none == [] and len(few) == len(also) == 2
    assert all(s.n_tokens <= 3 for s in few)
    assert engine.sample([full], STORY) == [[]]


def test_stop_strings_are_not_in_the_text(engine, models, prompts):
    engine.use(models[0])
    stopped = engine.sample(prompts, Sampling(n=4, max_new_tokens=40, stop=("e", "a")))
    texts = [s for row in stopped for s in row if s.finished]
    assert len(texts) > 50 and not any(letter in s.text for s in texts for letter in "ea")


def test_greedy_equals_transformers(engine, models, prompts):
    engine.use(models[1])
    greedy = Sampling(n=2, temperature=0, max_new_tokens=12)
    penalised = replace(greedy, repetition_penalty=1.3, top_k=5, min_p=0.01)
    thinking = Thinking.of(
        ("+", "="), load_tokenizer(models[1]), 5
    )  # the budget's second part follows the ids of the first
    with HfSampler(models[1]) as fallback:
        ours, theirs = (
            [
                *sampler.sample(prompts, greedy),
                *sampler.sample(prompts, penalised),
                *sampler.sample(prompts, replace(greedy, shown=("<unk>",))),
                *sample_reasoned(sampler, [replace(p, text=p.text + "+") for p in prompts[:4]], greedy, thinking),
            ]
            for sampler in (engine, fallback)
        )
    assert any(sample.reasoning for row in ours for sample in row)
    for one, other in zip(ours, theirs, strict=True):
        assert one[0] == one[1]
        assert [(s.text, s.n_tokens, s.finished) for s in one] == [(s.text, s.n_tokens, s.finished) for s in other]
        assert one[0].logp == pytest.approx(other[0].logp, abs=1e-4)


def test_both_engines_sample_the_tempered_nucleus(engine, models, prompts):
    """First tokens of 3,000 samples against the exact distribution; the tolerance is three times the expected distance at this n."""
    engine.use(models[0])
    n, prompt = 3000, prompts[0]
    scores = oracle_logps(models[0], prompt.ids)[-1] / 0.8
    exact = np.exp(scores - scores.max())
    exact /= exact.sum()
    order = np.argsort(-exact)
    kept = order[: np.searchsorted(np.cumsum(exact[order]), 0.9) + 1]  # the smallest set that holds 0.9
    exact = np.where(np.isin(np.arange(len(exact)), kept), exact, 0)
    exact /= exact.sum()
    tokenizer = load_tokenizer(models[0])
    wanted: dict[str, float] = {}
    for token, share in enumerate(exact):
        text = tokenizer.decode([token], skip_special_tokens=True)
        wanted[text] = wanted.get(text, 0.0) + share
    expected = 0.5 * sum(np.sqrt(2 * p * (1 - p) / (np.pi * n)) for p in wanted.values())
    settings = Sampling(n=n, temperature=0.8, top_p=0.9, max_new_tokens=1)
    with HfSampler(models[0], token_budget=1 << 30) as fallback:
        drawn = {"vllm": engine.sample([prompt], settings)[0], "transformers": fallback.sample([prompt], settings)[0]}
    for name, samples in drawn.items():
        texts, counts = np.unique([s.text for s in samples], return_counts=True)
        shares = dict(zip(texts, counts / n, strict=True))
        assert set(shares) <= {text for text, share in wanted.items() if share > 0}, name
        distance = 0.5 * sum(abs(wanted[text] - shares.get(text, 0.0)) for text in wanted)
        assert distance < 3 * expected, name


def test_a_swapped_engine_equals_a_fresh_one(engine, second, models, prompts, lengths):
    engine.use(models[1])
    fresh, swapped = (sampler.sample([*prompts, *lengths], STORY) for sampler in (second, engine))
    assert [[s.text for s in row] for row in fresh] == [[s.text for s in row] for row in swapped]
    one, other = ([s.logp for row in rows for s in row] for rows in (fresh, swapped))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    probe = SwapProbe()
    probe.started(second, str(models[1]), None)
    probe.swapped(engine, str(models[1]), None, "right")
    assert probe.noise < 1e-4 and probe.notes == []
    with pytest.raises(EngineError, match="stale or damaged weights"):
        probe.swapped(engine, str(models[0]), None, "stale")


def test_adapters_as_adapters_on_one_engine(second, adapters, models, lengths, prompts):
    """The base, two adapters of different ranks and the base again: one process, our forward pass's log-probs and transformers' greedy samples."""
    greedy, tokenizer = Sampling(n=1, temperature=0, max_new_tokens=12), load_tokenizer(models[1])
    with load_model(models[1], dtype="float32") as model:
        theirs = HfSampler.of(model, tokenizer, max_length=CONTEXT)
        pid, found = second.pid, {}
        for name in ("a", "b", "a", "base"):
            for sampler in (second, theirs):
                if name == "base":
                    sampler.use(models[1])
                else:
                    sampler.use(adapters / name, base=models[1])
            rows, logps = sampled_rows(second, tokenizer, [*prompts, *lengths], STORY)
            found.setdefault(name, []).append((rows, logps))
            assert len(rows) > 60
            np.testing.assert_allclose(logps, response_logps(model, rows)[:, 0], rtol=0, atol=1e-4)
            if name != "a":  # what was drawn under the first adapter is of other weights than these
                drawn, under_a = found["a"][0]
                assert np.abs(response_logps(model, drawn)[:, 0] - under_a).max() > 0.5
            assert [r[0].text for r in second.sample(prompts, greedy)] == [
                r[0].text for r in theirs.sample(prompts, greedy)
            ]
        assert second.pid == pid and not second.notes
        np.testing.assert_array_equal(found["a"][0][1], found["a"][1][1])
        with pytest.raises(ModelError, match="adapter_model.safetensors cannot be read"):
            second.use(adapters / "broken", base=models[1])


def test_an_engine_killed_as_the_kernel_would_is_an_error(second, prompts):
    """The second engine's last test."""
    pid = second.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"killed by signal 9.*during `sample`"):
        second.sample(prompts, STORY)
    assert gone(pid) and second.pid is None


def test_closing_ends_the_process_and_its_memory_comes_back(engine, models):
    """Last in this file: the engine of the others is closed here."""
    pid = engine.pid
    engine.close()
    assert gone(pid)
    with pytest.raises(EngineError, match="closed"):
        engine.sample([Prompt([1, 5], "", None, 1)], STORY)
