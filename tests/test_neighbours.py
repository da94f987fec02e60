"""Neighbours against plain BM25 by the book, and neighbour_excess against rows that were put together by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

import curate
from curate.passes.nearest import K1, B, Neighbours, pool_fingerprint, words
from curate.rows import Example
from tests.tiny_models import make_llama

THINGS = ["apples", "pears", "plums", "figs"]


def sums(n: int) -> list[dict]:
    return [
        {
            "prompt": f"ada has {i % 7} {THINGS[i % 4]} and buys {i % 3} more. ",
            "completion": f"{i % 7 + i % 3} {THINGS[i % 4]}",
        }
        for i in range(n)
    ]


def test_neighbours_against_a_slow_loop():
    examples = [Example(row["prompt"], row["completion"]) for row in {r["prompt"]: r for r in sums(40)}.values()]
    rows = {e.row_id: e for e in examples}
    found = Neighbours(list(rows), list(rows.values()))
    bags = {row_id: Counter(words(e.prompt)) for row_id, e in rows.items()}
    mean = sum(sum(bag.values()) for bag in bags.values()) / len(bags)

    def bm25(query, bag):
        total = 0.0
        for word, n in query.items():
            df = sum(word in other for other in bags.values())
            tf = bag[word] * (K1 + 1) / (bag[word] + K1 * (1 - B + B * sum(bag.values()) / mean))
            total += n * math.log(1 + (len(bags) - df + 0.5) / (df + 0.5)) * tf
        return total

    for row_id, example in rows.items():
        others = sorted((round(-bm25(bags[row_id], bag), 9), other) for other, bag in bags.items() if other != row_id)
        near = found.nearest(row_id, example, count=3)
        assert [round(-bm25(bags[row_id], bags[e.row_id]), 9) for e in near] == [score for score, _ in others[:3]]
        assert example not in near
    backwards = Neighbours(list(rows)[::-1], list(rows.values())[::-1])
    probe = Example("how many figs has ada", "2")
    assert found.nearest(probe.row_id, probe) == backwards.nearest(probe.row_id, probe)
    stranger = Example("zzz", "2")
    assert found.nearest(stranger.row_id, stranger) == []
    talk = Example(({"role": "system", "content": "figs figs"}, {"role": "user", "content": "plums"}), "1")
    assert words(talk.prompt) == ["plums"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "tiny", seed=0, context=256)


def test_neighbour_excess_is_the_difference_to_rows_put_together_by_hand(model, tmp_path):
    """The neighbours' texts before the prompt, the nearest last; fewer where they do not fit; NULL where none does."""
    rows = [r | {"number": i} for i, r in enumerate({r["prompt"]: r for r in sums(12)}.values())]
    rows.append({"prompt": "zzz ", "completion": "1", "number": len(rows)})  # no neighbour
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "kind": "sft",
        "source": str(tmp_path / "sums.jsonl"),
        "models": {"reference": str(model)},
        "scores": ["neighbour_excess"],
    }
    raw["tokens"] = {"max_length": 130}  # a row has about 50 tokens: one or two neighbours fit
    result = curate.run(raw, store=tmp_path / "store")
    found = {
        r["number"]: r
        for r in result.store.sql("SELECT number, neighbour_excess, target_nll, neighbour_nll FROM scored").to_dicts()
    }
    assert found[len(rows) - 1]["neighbour_excess"] is None and found[len(rows) - 1]["target_nll"] is not None

    examples = [Example(r["prompt"], r["completion"]) for r in rows]
    index = Neighbours([e.row_id for e in examples], examples)
    by_hand, fitted = [], Counter()
    for i, e in enumerate(examples[:-1]):
        near = index.nearest(e.row_id, e)
        texts = ["".join(f"{n.prompt}{n.completion}\n\n" for n in near[:k][::-1]) + e.prompt for k in range(4)]
        count = max(
            k for k in range(4) if len(texts[k] + e.completion) + 2 <= 130
        )  # one token a character, BOS and EOS
        fitted[count] += 1
        by_hand.append({"prompt": texts[count], "completion": e.completion, "number": i})
    assert fitted[0] == fitted[3] == 0 and sum(fitted.values()) == len(by_hand)
    (tmp_path / "by_hand.jsonl").write_text("".join(json.dumps(row) + "\n" for row in by_hand))
    other = {**raw, "source": str(tmp_path / "by_hand.jsonl"), "scores": ["target_nll"]}
    expected = curate.run(other, store=tmp_path / "other").store.sql("SELECT number, target_nll FROM scored").rows()
    for number, nll in expected:
        assert found[number]["neighbour_nll"] == pytest.approx(nll, rel=1e-5)
        assert found[number]["neighbour_excess"] == pytest.approx(found[number]["target_nll"] - nll, abs=1e-5)


def test_another_pool_is_another_measurement(model, tmp_path):
    """A new row may be somebody's nearest: neighbour_nll is measured anew then, and only it."""
    file = tmp_path / "sums.jsonl"
    raw = {"kind": "sft", "source": str(file), "models": {"reference": str(model)}, "scores": ["neighbour_excess"]}
    counts = []
    for n in (6, 6, 8):
        file.write_text("".join(json.dumps(row) + "\n" for row in sums(n)))
        counts.append(curate.run(raw, store=tmp_path / "store").measured)
    assert counts == [{"tokens": 6, "forward": 6, "neighbours": 6}, {}, {"tokens": 2, "forward": 2, "neighbours": 8}]
    assert pool_fingerprint(["a", "b"]) == pool_fingerprint(["b", "a"]) != pool_fingerprint(["a", "b", "c"])
