"""The demo's training: tokens as the package has them, likelihoods against a plain loop, SFT that learns, DPO that moves the margin."""

from __future__ import annotations

import math
import random

import pytest
import torch

from curate.jobs.demo import model, task, training


@pytest.fixture(scope="module")
def rows():
    return [(row.prompt, row.completion) for row in task.splits(seed=7, train=64, test=0, pool=0)["train"]]


@pytest.fixture(scope="module")
def base():
    network, tokenizer = model.load_base()
    return network.eval(), tokenizer


@pytest.fixture(scope="module")
def tuned(rows, tmp_path_factory):
    torch.set_num_threads(1)
    losses = []
    out = tmp_path_factory.mktemp("runs") / "sft"
    checkpoints = training.train_sft(
        rows, out, steps=30, batch=16, fractions=(0.5, 1.0), seed=1, progress=lambda *seen: losses.append(seen)
    )
    return checkpoints, losses


def test_tokens_are_those_that_the_package_measures(rows, base):
    from curate.passes.tokens import Limits, encode
    from curate.rows import Example

    for prompt, completion in rows[:8]:
        ids, start = training.encode(prompt, completion, base[1])
        theirs = encode(Example(prompt, completion), base[1], Limits(256, "keep_start"))
        assert (ids, start) == (theirs.ids.tolist(), theirs.start)
        assert ids[0] == base[1].bos_token_id and ids[-1] == base[1].eos_token_id


def test_likelihoods_equal_a_loop_over_single_rows_in_float64(rows, base):
    network, tokenizer = base
    encoded = [training.encode(*row, tokenizer) for row in rows[:6]]
    found = training.sequence_logps(network, encoded, batch=4)
    exact = network.double()
    try:
        for (ids, start), value in zip(encoded, found, strict=True):
            with torch.no_grad():
                logp = torch.log_softmax(exact(torch.tensor([ids])).logits[0], -1)
            expected = sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))
            assert value.item() == pytest.approx(expected, rel=1e-5)
    finally:
        network.float()


def test_an_epoch_of_buckets_holds_every_row_once():
    lengths = random.Random(0).choices(range(5, 60), k=100)
    batches = training.buckets(lengths, batch=8, rng=random.Random(1))
    assert sorted(i for part in batches for i in part) == list(range(100))
    assert max(map(len, batches)) == 8
    assert batches != training.buckets(lengths, batch=8, rng=random.Random(2))


def test_sft_lowers_the_loss_and_says_every_step(tuned):
    _, seen = tuned
    assert [(step, steps) for step, steps, _ in seen] == [(i, 30) for i in range(1, 31)]
    losses = [loss for *_, loss in seen]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_checkpoints_load_and_carry_their_tokenizer(tuned, rows, base):
    checkpoints, _ = tuned
    assert [path.name for path in checkpoints] == ["checkpoint-15", "checkpoint-30"]
    values = []
    for path in checkpoints:
        network, tokenizer = model.load_base(path)
        assert tokenizer.get_vocab() == base[1].get_vocab()
        encoded = [training.encode(*row, tokenizer) for row in rows]
        values.append(training.sequence_logps(network.eval(), encoded).mean().item())
    assert values[0] < values[1]


def test_the_same_seed_gives_the_same_weights(rows, tmp_path):
    runs = [
        training.train_sft(rows, tmp_path / name, steps=3, fractions=(1.0,), seed=seed)[0]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = ((path / "model.safetensors").read_bytes() for path in runs)
    assert a == b != c


def test_dpo_moves_the_margin_up(tuned, rows, tmp_path):
    reference = tuned[0][-1]
    pairs = [(prompt, right, wrong) for (prompt, right), (_, wrong) in zip(rows[:32], rows[32:], strict=True)]
    losses = []
    change = training.train_dpo(
        pairs, tmp_path / "dpo", reference=reference, steps=12, progress=lambda step, steps, loss: losses.append(loss)
    )
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the margin is 0 at the reference
    assert losses[-1] < losses[0]
    assert change.n_pairs == 32
    assert change.margin == pytest.approx(change.chosen - change.rejected)
    assert change.margin > 1.0

    before, tokenizer = model.load_base(reference)
    after, _ = model.load_base(tmp_path / "dpo")
    chosen = [training.encode(prompt, text, tokenizer) for prompt, text, _ in pairs]
    moved = training.sequence_logps(after.eval(), chosen) - training.sequence_logps(before.eval(), chosen)
    assert change.chosen == pytest.approx(moved.mean().item(), abs=1e-4)
    assert change.displaced == pytest.approx((moved < 0).float().mean().item())


def test_dpo_can_be_measured_on_other_pairs(tuned, rows, tmp_path):
    pairs = [(prompt, right, wrong) for (prompt, right), (_, wrong) in zip(rows[:8], rows[8:16], strict=True)]
    change = training.train_dpo(pairs[:4], tmp_path / "dpo", reference=tuned[0][-1], steps=1, measure=pairs)
    assert change.n_pairs == 8
