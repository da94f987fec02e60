"""Sampling with transformers: against `generate` and a plain loop, alone or in company, and what ends a sample."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from curate.errors import EngineError, UsageError
from curate.passes.forward import load_model, response_logps
from curate.passes.sampling import hf
from curate.passes.sampling.engines import sampler_identity
from curate.passes.sampling.hf import HfSampler
from curate.passes.sampling.open import open_sampler
from curate.passes.sampling.reasoned import Thinking, sample_reasoned
from curate.passes.sampling.swap_probe import SwapProbe
from curate.passes.sampling.types import Prompt, Sampling, engine_seed, room
from curate.passes.tokenizer import load_tokenizer
from tests.passes.sampled import sampled_rows
from tests.tiny_models import make_llama

CONTEXT = 80


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [make_llama(folder / name, seed=seed, context=CONTEXT) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture(scope="module")
def prompts(models):
    tokenizer = load_tokenizer(models[0])
    return [Prompt(tokenizer("so " * (i % 5) + f"what is {i}?")["input_ids"], "", None, seed=i) for i in range(9)]


def words(samples):
    return [[(s.text, s.n_tokens, s.finished) for s in row] for row in samples]


@pytest.mark.parametrize("penalty", [None, 1.4])
def test_greedy_equals_generate_row_by_row(models, prompts, penalty):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]).eval(), load_tokenizer(models[0])
    with HfSampler(models[0]) as sampler:
        settings = Sampling(n=2, temperature=0, max_new_tokens=12, repetition_penalty=penalty)
        ours = sampler.sample(prompts, settings)
    for prompt, row in zip(prompts, ours, strict=True):
        arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "repetition_penalty": penalty}
        out = model.generate(torch.tensor([prompt.ids]), **arguments)[0, len(prompt.ids) :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        assert [s.text for s in row] == [text, text] and row[0].n_tokens == len(out)


def plain_loop(model, prompt, settings, sample):
    """One sample by a batch-1 loop without a cache: (ids, summed untempered log-prob)."""
    uniforms = np.random.Generator(np.random.PCG64([engine_seed(prompt.seed), sample])).random(settings.max_new_tokens)
    ids, logp = [], 0.0
    for uniform in uniforms:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.ids + ids])).logits[0, -1].double()
        shares = (logits / settings.temperature).softmax(-1)
        order = shares.argsort(descending=True)
        before = shares[order].cumsum(-1) - shares[order]
        nucleus = torch.zeros_like(shares)
        nucleus[order[before < settings.top_p]] = 1  # the smallest set whose mass reaches top_p
        cumulative = (shares * nucleus / (shares * nucleus).sum()).cumsum(-1)
        ids.append(int((cumulative > uniform).nonzero()[0]))
        logp += float(logits.log_softmax(-1)[ids[-1]])
        if ids[-1] == 2:
            break
    return ids, logp


def test_samples_equal_a_plain_loop_over_the_same_uniforms(models, prompts):
    settings = Sampling(n=3, temperature=0.7, top_p=0.8, max_new_tokens=10)
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32).eval()
    with HfSampler(models[0]) as sampler:
        drawn = sampler.sample(prompts, settings)
    for prompt, row in zip(prompts, drawn, strict=True):
        for k, sample in enumerate(row):
            ids, logp = plain_loop(model, prompt, settings, k)
            assert sample.n_tokens == len(ids) and sample.finished == (ids[-1] == 2)
            assert sample.logp == pytest.approx(logp, abs=1e-4)


def test_company_order_and_batches_change_no_sample(models, prompts):
    settings = Sampling(n=3, temperature=1.0, top_p=0.95, max_new_tokens=14, stop=("a",))
    with HfSampler(models[0]) as sampler, HfSampler(models[0], token_budget=100) as small:
        together = sampler.sample(prompts, settings)
        assert words(small.sample(prompts, settings)) == words(together)
        assert words(sampler.sample(prompts[::-1], settings))[::-1] == words(together)
        alone = [sampler.sample([prompt], settings)[0] for prompt in prompts]
    assert words(alone) == words(together)
    np.testing.assert_allclose(
        [s.logp for r in alone for s in r], [s.logp for r in together for s in r], rtol=0, atol=1e-4
    )
    assert len({s.text for row in together for s in row}) > 20


def test_fewer_new_tokens_are_the_beginning_of_more(models, prompts):
    with HfSampler(models[0]) as sampler:
        short, long = (sampler.sample(prompts, Sampling(n=2, max_new_tokens=m)) for m in (4, 12))
    assert all(
        b.text.startswith(a.text)
        for one, other in zip(short, long, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_eos_and_stop_strings_end_a_sample_and_are_not_in_its_text(models):
    prompt = Prompt([1, 5, 6], "", None, 0)
    with HfSampler(models[0]) as sampler:
        free = sampler.sample([prompt], Sampling(n=300, max_new_tokens=12))[0]
        ended = [s for s in free if s.finished]
        assert ended and all(s.n_tokens <= 12 for s in ended) and all(s.n_tokens == 12 for s in free if not s.finished)
        stopped = sampler.sample([prompt], Sampling(n=300, max_new_tokens=12, stop=("ab", "7")))[0]
    for before, after in zip(free, stopped, strict=True):
        cut = min((before.text.index(w) for w in ("ab", "7") if w in before.text), default=None)
        assert after.text == before.text[:cut]
        assert after.finished or cut is None


def test_a_prompt_without_room_gives_no_samples_and_a_tight_one_fewer_tokens(models):
    full, tight = Prompt([1] + [5] * (CONTEXT - 1), "", None, 1), Prompt([1] + [5] * (CONTEXT - 4), "", None, 1)
    with HfSampler(models[0]) as sampler:
        none, few = sampler.sample([full, tight], Sampling(n=2, max_new_tokens=40))
        assert none == [] and len(few) == 2 and all(s.n_tokens <= 3 for s in few)
        assert sampler.sample([], Sampling()) == []
    assert [room(10, 5, None), room(10, 5, 12), room(12, 5, 12), room(20, 5, 12)] == [5, 2, 0, -8]


def test_weights_are_swapped_in_place(models, prompts):
    settings, tokenizer = Sampling(n=2, max_new_tokens=8), load_tokenizer(models[0])
    with HfSampler(models[0]) as swapped, HfSampler(models[1]) as fresh:
        swapped.use(models[1])
        assert words(swapped.sample(prompts, settings)) == words(fresh.sample(prompts, settings))
        rows, found = sampled_rows(swapped, tokenizer, prompts, settings)
    assert len(rows) > 9
    with load_model(models[1]) as model:
        np.testing.assert_allclose(found, response_logps(model, rows)[:, 0], rtol=0, atol=1e-4)
        model.use(models[0])
        assert np.abs(found - response_logps(model, rows)[:, 0]).max() > 0.01


def test_a_swap_that_left_the_weights_before_is_an_error_with_both_numbers(models, monkeypatch):
    """Of weights that differ by a ten-thousandth too; what torch cannot load is said."""
    near = models[0].parent / "near"
    shutil.copytree(models[0], near)
    with HfSampler(models[0]) as sampler:
        probe = SwapProbe()
        probe.started(sampler, str(models[0]), None)
        probe.swapped(sampler, str(models[0]), None, "checkpoint-1")
        assert probe.noise < 1e-5
        weights = load_file(near / "model.safetensors")
        norm = next(name for name in weights if name.endswith("norm.weight") and "layers" not in name)
        save_file({**weights, norm: weights[norm] * 1.002}, near / "model.safetensors", {"format": "pt"})
        for other in (models[1], near):
            with pytest.raises(
                EngineError, match=r"checkpoint-2: .* log-probability -\d.* there, and -\d.* by the checkpoint itself"
            ):
                probe.swapped(sampler, str(other), None, "checkpoint-2")
        monkeypatch.setattr("curate.passes.sampling.swap_probe.free_memory", lambda: 10)
        probe.swapped(sampler, str(models[1]), None, "checkpoint-2")
        assert probe.notes == [
            "weights in the engine were not compared with torch's: 0.0 GB do not fit into memory beside it"
        ]


def test_short_memory_means_smaller_batches_and_is_said(models, prompts, monkeypatch):
    whole = HfSampler._decode

    def tight(self, rows, *arguments):
        if len(rows) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return whole(self, rows, *arguments)

    settings = Sampling(n=2, max_new_tokens=6)
    with HfSampler(models[0]) as sampler:
        wanted = words(sampler.sample(prompts, settings))
        monkeypatch.setattr(HfSampler, "_decode", tight)
        sampler._token_budget = 1000
        assert words(sampler.sample(prompts, settings)) == wanted
        assert "Memory was short" in sampler.notes[0]
        monkeypatch.setattr(HfSampler, "_decode", lambda *_: tight(None, [1, 2, 3]))
        with pytest.raises(EngineError, match="single prompt"):
            sampler.sample(prompts, settings)


def test_the_nucleus_of_a_hand_table():
    """Shares .5 .3 .15 .05 at top_p .8: the first two, as .625 and .375."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().repeat(4, 1)
    uniform = torch.tensor([0.0, 0.62, 0.63, 0.999], dtype=torch.float64)
    assert hf._draw(logits, Sampling(top_p=0.79), uniform).tolist() == [1, 1, 3, 3]
    assert hf._draw(logits, Sampling(temperature=0), uniform).tolist() == [1, 1, 1, 1]
    assert hf._draw(logits, Sampling(top_k=2), uniform).tolist() == [1, 1, 3, 3]
    assert hf._draw(logits, Sampling(min_p=0.55), uniform).tolist() == [1, 1, 3, 3]
    assert hf._draw(logits, Sampling(min_p=0.7, top_k=3), uniform).tolist() == [1, 1, 1, 1]


def test_thinking_is_within_its_budget_and_its_end_is_written(models, prompts):
    """With `=` closing what the prompt's `+` opened: the first tokens are those without a budget, what is written counts for nothing, and the
    log-probability is the model's own of what it said.
    """
    tokenizer = load_tokenizer(models[0])
    thinking = Thinking.of(("+", "="), tokenizer, 5)
    opened = [Prompt(tokenizer(f"{i} is +")["input_ids"], f"{i} is +", None, seed=i) for i in range(6)]
    settings = Sampling(n=3, temperature=1.0, max_new_tokens=12)
    with HfSampler(models[0]) as sampler:
        plain = sampler.sample(opened, replace(settings, with_ids=True))
        within = sample_reasoned(sampler, opened, settings, thinking)
        again = sample_reasoned(sampler, opened, settings, thinking)
        greedy = sample_reasoned(sampler, opened[:1], replace(settings, temperature=0), thinking)[0]
        forced = checked = 0
        for prompt, one, other in zip(opened, within, plain, strict=True):
            for sample, free in zip(one, other, strict=True):
                early = tokenizer.decode(free.ids[:5], skip_special_tokens=True)
                if "=" in early or (len(free.ids) <= 5 and free.finished):
                    continue
                assert sample.reasoning == early + "\n" and sample.n_tokens <= 12
                said = [
                    *prompt.ids,
                    *free.ids[:5],
                    *thinking.closing,
                    *tokenizer(sample.text.removeprefix("\n\n"), add_special_tokens=False)["input_ids"],
                ]
                forced += 1
                if not sample.finished and len(said) == len(prompt.ids) + 12 + 4:
                    logps = sampler._model.module(torch.tensor([said])).logits[0].double().log_softmax(-1)
                    checked += 1
                    at = [i for i in range(len(prompt.ids), len(said)) if not 5 <= i - len(prompt.ids) < 9]
                    assert sample.logp == pytest.approx(
                        sum(float(logps[i - 1, said[i]].detach()) for i in at), abs=1e-3
                    )
    assert forced > 6 and checked > 3 and within == again and greedy[0] == greedy[1] == greedy[2]
    assert len({s.text for row in within for s in row}) > 6


def test_tags_that_are_special_tokens_are_text(tmp_path):
    folder = make_llama(tmp_path / "special", seed=1)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["?", "!"]})
    thinking = Thinking.of(("?", "!"), tokenizer)
    assert thinking.shown == ("?", "!") and Thinking.of(("+", "!"), tokenizer).shown == ("!",)
    with HfSampler(folder) as sampler:
        sampler._tokenizer = tokenizer
        ids = tokenizer("a?b!c</s>", add_special_tokens=False)["input_ids"]
        assert sampler._text([], ids) == "abc" and sampler._text([], ids, thinking.shown) == "a?b!c"


def test_a_real_model_is_sampled_and_keeps_the_space_between_prompt_and_answer(shared):
    path = shared / "models" / "stories260K"
    ids = load_tokenizer(path)("Once upon a time, there was")["input_ids"]
    with open_sampler("auto", path) as sampler:
        assert sampler.name == "transformers" and sampler.engine == sampler_identity("auto", path)[0]
        (row,) = sampler.sample([Prompt(ids, "", None, 3)], Sampling(n=3, temperature=0.5, max_new_tokens=20))
    assert all(s.text.startswith(" a ") and "<" not in s.text for s in row)


@pytest.mark.parametrize(("settings", "names"), [
    ({"n": 0}, "samples"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"stop": ("",)}, "stop"),
])  # fmt: skip
def test_impossible_settings_are_named(settings, names):
    with pytest.raises(UsageError, match=f"sampling.{names}"):
        Sampling(**settings)
