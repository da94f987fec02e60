"""Thinking models: reasoning and answer apart, an answer that was cut in its thinking is never right, and graders see the answer alone."""

from __future__ import annotations

import json

import pytest
import yaml

import curate
from curate.console import Progress
from curate.passes.thinking import has_tags, opens, split, tags_of
from tests.served import Served
from tests.tiny_models import make_tokenizer

TAGS = ["<think>", "</think>"]
QUESTION = {"prompt": [{"role": "user", "content": "6 times 7"}], "completion": [{"role": "assistant", "content": "42"}], "answer": "42"}  # fmt: skip
ANSWERS = [  # content, reasoning, finish_reason
    ("It is 42.", "41? No.", "stop"),
    ("It is 41.", "42, surely.", "stop"),
    (None, "6 times 7 is 42, but", "length"),
    ("Well, let me", "42.", "length"),
    ("It is 42, since", "hm", "length"),
]


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("<think> a </think> b", False, " a ", " b"),
        ("\n<think>\na", False, "\na", ""),  # not closed
        ("a </think> b", False, "a ", " b"),  # opened by the prompt, or by a template that is not known
        ("a", True, "a", ""),
        ("a", False, None, "a"),
        ("<think></think>b </think>", False, "", "b </think>"),
        ("b <think> c", False, None, "b <think> c"),
    ],
)
def test_reasoning_and_answer(text, opened, reasoning, answer):
    assert split(text, TAGS, opened=opened) == (reasoning, answer)
    assert split(text, None, opened=opened) == (None, text)


def test_tags_are_those_of_the_template_or_the_vocabulary():
    tokenizer = make_tokenizer(template=True)
    assert tags_of(tokenizer) is None
    tokenizer.chat_template += "{% if false %}</think>{% endif %}"
    assert tags_of(tokenizer) == ("<think>", "</think>")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[THINK]", "[/THINK]"])
    assert tags_of(tokenizer) == ("[THINK]", "[/THINK]")
    assert opens("<|assistant|><think>\n", TAGS) and not opens("<think></think>\n\n", TAGS) and not opens("a", None)
    assert has_tags("a</think>b") and has_tags(" <think>") and not has_tags("a <think>")


def recipe(tmp_path, server, rows=(QUESTION,), **sampling):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "kind": "sft",
        "source": "rows.jsonl",
        "server": {"url": server.url},
        "engine": {"sampler": "openai"},
        "sampling": {"samples": 5, "temperature": 1.0, "max_new_tokens": 8, "grader": "number", **sampling},
        "scores": ["accuracy", "pass_rate"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "recipe.yaml"


COUNTS = "SELECT n_samples, n_correct, accuracy, n_unfinished, pass_rate FROM scored"


def test_an_answer_that_was_cut_before_it_is_unfinished(tmp_path, capsys):
    with Served() as server:
        server.says = lambda prompt, k: ANSWERS[k]
        store = curate.run(recipe(tmp_path, server), progress=Progress()).store
        seen = store.sql("SELECT text, reasoning, outcome, correct, finished FROM samples ORDER BY sample").rows()
        assert [line[:3] for line in seen] == [
            ("It is 42.", "41? No.", "right"),
            ("It is 41.", "42, surely.", "wrong"),
            ("", "6 times 7 is 42, but", "unfinished"),
            ("Well, let me", "42.", "unfinished"),
            ("It is 42, since", "hm", "right"),  # it gave its answer before it was cut
        ]
        assert [line[3:] for line in seen] == [
            (True, True),
            (False, True),
            (False, False),
            (False, False),
            (True, False),
        ]
        assert store.sql(COUNTS).rows() == [(5, 2, 0.4, 3, 0.4)]
        told = " ".join(capsys.readouterr().err.split())
        assert (
            "2 of 5 answers of policy were cut before they gave an answer: unfinished, and wrong for accuracy" in told
        )
        asked = len(server.requests)
        left = curate.run(recipe(tmp_path, server, unfinished="leave_out"))
        assert left.measured == {"kept answers graded anew": 1} and len(server.sampled) <= asked
        assert left.store.sql(COUNTS).rows() == [(3, 2, 2 / 3, 3, 2 / 3)]


def test_thinking_in_a_servers_text_is_told_apart_by_tags_that_the_recipe_names(tmp_path, capsys):
    """Without them they are graded with it, as ever, and that is said; with them the kept answers are graded anew."""
    texts = ["<think>41</think> 42", "<think>42</think> 41", "<think>6 times 7 is 42"]
    with Served() as server:
        server.says = lambda prompt, k: (texts[k], None, "length" if k == 2 else "stop")
        rows = [{"prompt": "6 times 7", "completion": " 42", "answer": "42"}]
        store = curate.run(recipe(tmp_path, server, rows, samples=3), progress=Progress()).store
        assert store.sql("SELECT outcome FROM samples ORDER BY sample")["outcome"].to_list() == [
            "right",
            "wrong",
            "right",
        ]
        assert "3 of 3 answers of policy hold their thinking (</think>)" in " ".join(capsys.readouterr().err.split())
        again = curate.run(recipe(tmp_path, server, rows, samples=3, thinking_tags=TAGS))
        assert again.measured == {"kept answers graded anew": 1}
        seen = again.store.sql("SELECT text, reasoning, outcome FROM samples ORDER BY sample").rows()
        assert seen == [(" 42", "41", "right"), (" 41", "42", "wrong"), ("", "6 times 7 is 42", "unfinished")]
