"""The state a prompt leaves the model in: transformers' own, whatever stands beside it in the batch; on the demo's base it knows kinds apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.jobs.collect.pick import nearest
from curate.jobs.demo import task
from curate.jobs.demo.model import BASE
from curate.passes.loading.model import load_model
from curate.passes.states import prompt_states
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import Limits
from curate.rows import Example, Pair


@pytest.fixture(scope="module")
def model():
    with load_model(BASE, device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def rows():
    return [Example(row.prompt, row.completion, row.answer) for row in task.splits(seed=3, train=40)["train"]]


def test_it_is_the_state_of_the_last_prompt_token(model, rows):
    found = prompt_states(model, rows[:9])
    tokenizer = load_tokenizer(BASE)
    for row, state in zip(rows, found, strict=False):
        ids = torch.tensor([tokenizer(row.prompt)["input_ids"]])
        with torch.no_grad():
            wanted = model.module.model(input_ids=ids).last_hidden_state[0, -1]
        assert np.allclose(state, wanted.numpy(), atol=1e-4)
    assert found.dtype == np.float32 and found.shape == (9, 128)


def test_neither_the_batch_nor_the_response_changes_it(model, rows):
    together = prompt_states(model, rows)
    assert np.allclose(prompt_states(model, rows, token_budget=64), together, atol=1e-4)
    assert np.allclose(prompt_states(model, [Example(row.prompt) for row in rows]), together, atol=1e-4)
    pairs = [Pair(row.prompt, " yes", " no") for row in rows]
    assert np.allclose(prompt_states(model, pairs), together, atol=1e-4)


def test_a_prompt_that_is_cut_has_none(model, rows):
    short = min(range(40), key=lambda at: len(rows[at].prompt))
    length = len(load_tokenizer(BASE)(rows[short].prompt)["input_ids"])
    found = prompt_states(model, rows, limits=Limits(max_length=length, truncation="keep_start"))
    assert np.isfinite(found[short]).all()
    assert np.isnan(found).all(1).sum() > 10


def test_neighbours_are_of_the_same_kind(model):
    """Eight kinds: by lot one in eight would be."""
    made = task.splits(seed=5, train=80, pool=400)
    hard, pool = ([Example(row.prompt) for row in made[name]] for name in ("train", "pool"))
    a, b = prompt_states(model, hard), prompt_states(model, pool)
    hits = [
        made["pool"][nearest(a[at : at + 1], b, 1, seed=0)[0]].cell == row.cell for at, row in enumerate(made["train"])
    ]
    assert np.mean(hits) > 0.7


def test_an_adapters_tokenizer_is_its_bases(tmp_path, model, rows):
    """PEFT saves none; its factors of 0 change nothing."""
    pytest.importorskip("peft", reason="PEFT is not installed (extra: prove)")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with load_model(tmp_path / "adapter", base=BASE, device="cpu") as on_it:
        assert np.allclose(prompt_states(on_it, rows[:3]), prompt_states(model, rows[:3]), atol=1e-4)
