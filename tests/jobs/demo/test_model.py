"""The demo's tokenizer decodes exactly, and the base that ships is the one the script makes: a reader of stories who cannot do the task."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from curate.jobs.demo import model, pretrain, task, training


@pytest.fixture(scope="module")
def tokenizer():
    return model.build_tokenizer()


@pytest.fixture(scope="module")
def base():
    return model.load_base()


def test_every_text_of_the_task_and_of_the_base_s_reading_survives_a_round_trip(tokenizer):
    rng = random.Random(0)
    texts = [pretrain.story(rng) for _ in range(400)]
    texts += [text for row in task.splits(seed=1)["train"] for text in (row.prompt, row.prompt + row.completion)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_decoding_joins_tokens_whatever_they_are(tokenizer):
    ids = list(range(len(model.vocabulary())))
    random.Random(1).shuffle(ids)
    assert tokenizer.decode(ids) == "".join(model.vocabulary()[i] for i in ids)


def test_a_digit_is_one_token_wherever_it_stands(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Eva has 47 nuts.")["input_ids"])
    assert pieces == ["<s>", "Eva", " has ", "4", "7", " nuts", "."]
    equation = tokenizer.convert_ids_to_tokens(
        tokenizer(" it count: 47 + 5 = 52", add_special_tokens=False)["input_ids"]
    )
    assert equation == [" it", " count", ": ", "4", "7", " + ", "5", " = ", "5", "2"]


def test_a_prompt_s_tokens_begin_its_completed_tokens(tokenizer):
    for row in task.splits(seed=2)["test"]:
        prompt = tokenizer(row.prompt)["input_ids"]
        assert tokenizer(row.prompt + row.completion)["input_ids"][: len(prompt)] == prompt


def test_the_shipped_base_is_the_script_s(tmp_path, base):
    made = pretrain.make_base(tmp_path / "base", steps=1, say=lambda _: None)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_text() == (model.BASE / name).read_text(), name
    again, _ = model.load_base(made)
    shapes = {name: tuple(p.shape) for name, p in again.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in base[0].named_parameters()}
    assert sum(p.numel() for p in base[0].parameters()) == 352_896


def test_the_shipped_base_is_small_and_loads_in_float32(base):
    assert (model.BASE / "model.safetensors").stat().st_size < 800_000
    assert {p.dtype for p in base[0].parameters()} == {torch.float32}
    assert base[0].config.head_dim == 32  # vLLM's CPU attention takes 32, 64, 128


def next_tokens(base, texts):
    """The most likely next token of every text."""
    network, tokenizer = base
    with torch.no_grad():
        return [
            tokenizer.decode(network(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].argmax())
            for text in texts
        ]


def test_the_base_knows_small_sums_and_no_times_table(base):
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10 - a)]
    guessed = next_tokens(base, [f"Facts: {a} + {b} = " for a, b in sums])
    assert np.mean([guess == str(a + b) for guess, (a, b) in zip(guessed, sums, strict=True)]) > 0.9
    tables = [(a, b) for a in range(2, 10) for b in range(2, 10) if a * b >= 10]
    first = next_tokens(base, [f"Facts: {a} * {b} = " for a, b in tables])
    second = next_tokens(base, [f"Facts: {a} * {b} = {a * b // 10}" for a, b in tables])
    right = [f + s == str(a * b) for f, s, (a, b) in zip(first, second, tables, strict=True)]
    assert np.mean(right) < 0.15  # chance is 0.01 to 0.1


def test_the_base_continues_stories_far_better_than_solutions(base):
    network, tokenizer = base
    rng = random.Random(5)
    stories = [pretrain._story_with_equations(rng) for _ in range(50)]
    rows = task.splits(seed=5, train=50, test=0, pool=0)["train"]

    def nll(pairs):
        encoded = [training.encode(*pair, tokenizer) for pair in pairs]
        counts = sum(len(ids) - start for ids, start in encoded)
        return -training.sequence_logps(network, encoded).sum().item() / counts

    assert nll([("", story) for story in stories]) < 1.5
    assert nll([(row.prompt, row.completion) for row in rows]) > 3.0
