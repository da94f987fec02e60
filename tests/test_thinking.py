"""Thinking models: reasoning and answer apart, an answer that was cut in its thinking is never right, and graders see the answer alone."""

from __future__ import annotations

import json

import pytest
import yaml

import curate
from curate.console import Progress
from curate.errors import UsageError
from curate.measurements import MEASUREMENTS
from curate.passes.chat import template_of
from curate.passes.sampling.reasoned import Thinking
from curate.passes.thinking import has_tags, opens, split, tags_of, without_special
from curate.plan.identity import params_of
from curate.plan.rendering import Rendering
from curate.recipe.load import load_recipe
from curate.report.answers import answers_of, answers_text
from curate.report.summary import summarise
from tests.served import Served
from tests.tiny_models import make_llama, make_tokenizer

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


def test_of_answers_that_an_earlier_curate_graded_no_share_of_unfinished_ones_is_said(tmp_path):
    """Their outcome was not kept: those that were cut are wrong, or unfinished."""
    import duckdb

    with Served() as server:
        server.says = lambda prompt, k: ANSWERS[k]
        store = curate.run(recipe(tmp_path, server)).store
    with duckdb.connect(str(store.folder / "curate.duckdb")) as con:
        con.execute("UPDATE data.samples SET outcome = NULL")
    found = summarise(curate.Store(store.folder))
    assert [(line["cut"], line["unfinished"], line["share"]) for line in found.cut] == [(3, None, None)]
    assert "- of answers that an earlier curate graded" in found.text()
    known = store.sql("SELECT outcome FROM samples WHERE finished ORDER BY sample")
    assert known["outcome"].to_list() == ["right", "wrong"]


def test_tags_are_shown_that_the_vocabulary_alone_marks_as_special():
    """Such tokens have no name (Magistral's [THINK], Llama 3's <|eot_id|>), and a decoded text leaves them out too."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in (*TAGS, "<|end|>")])
    shown = Thinking.of(TAGS, tokenizer).shown
    assert (
        shown == tuple(TAGS)
        and without_special("<think>a</think>b<|end|></s>", tokenizer, shown) == "<think>a</think>b"
    )
    tokenizer.chat_template = "{{ messages[0].content }}<think>"
    params = Rendering(False, False, True, template_of(tokenizer)).params(MEASUREMENTS["accuracy"])
    assert (
        params["thinking_shown"] and params["thinking_opened"]
    )  # answers that were kept without them are no such answers


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
            "3 of 5 answers of policy were cut at max_new_tokens 8 (n_unfinished); 2 of them before they gave an answer"
            in told
        )
        assert "unfinished, and wrong for accuracy (sampling.unfinished); the others are graded as they stand." in told
        asked = len(server.requests)
        left = curate.run(recipe(tmp_path, server, unfinished="leave_out"))
        assert left.measured == {"kept answers graded anew": 1} and len(server.sampled) <= asked
        assert left.store.sql(COUNTS).rows() == [(3, 2, 2 / 3, 3, 2 / 3)]
    found = summarise(left.store)
    assert [(line["answers"], line["cut"], line["unfinished"], line["share"]) for line in found.cut] == [(5, 3, 2, 0.4)]
    assert (
        "Answers cut at max_new_tokens" in found.text()
        and "40.0%" in found.text()
        and found.to_json()["cut"] == found.cut
    )
    shown = answers_text(answers_of(left.store, left.store.row_ids_of()[0], "recipe"), every=True)
    assert (
        "  unfinished  [thinks: 6 times 7 is 42, but] (cut)" in shown
        and "  right       [thinks: 41? No.] It is 42." in shown
    )


def test_thinking_in_a_servers_text_is_told_apart_by_tags_that_the_recipe_names(tmp_path, capsys):
    """Without them they are graded with it, as ever, and that is said; with them the kept answers are graded anew."""
    texts = [
        "<think>41</think> 42",
        "<think>42</think> 41",
        "<think>6 times 7 is 42",
        "So 42, but",
    ]  # the last opened by the server's template
    with Served() as server:
        server.says = lambda prompt, k: (texts[k], None, "length" if k > 1 else "stop")
        rows = [{"prompt": "6 times 7", "completion": " 42", "answer": "42"}]
        store = curate.run(recipe(tmp_path, server, rows, samples=4), progress=Progress()).store
        assert store.sql("SELECT outcome FROM samples ORDER BY sample")["outcome"].to_list() == [
            "right",
            "wrong",
            "right",
            "right",
        ]
        assert "3 of 4 answers of policy hold their thinking (</think>)" in " ".join(capsys.readouterr().err.split())
        again = curate.run(recipe(tmp_path, server, rows, samples=4, thinking_tags=TAGS))
        assert again.measured == {"kept answers graded anew": 1}
        seen = again.store.sql("SELECT text, reasoning, outcome FROM samples ORDER BY sample").rows()
        assert seen == [
            (" 42", "41", "right"),
            (" 41", "42", "wrong"),
            ("", "6 times 7 is 42", "unfinished"),
            ("", "So 42, but", "unfinished"),
        ]
        drawn = curate.run(
            recipe(tmp_path, server, rows, samples=4, thinking_tags=TAGS), store=tmp_path / "drawn"
        ).store
        assert drawn.sql("SELECT text, reasoning, outcome FROM samples ORDER BY sample").rows() == seen


def test_settings_of_sampling_reach_the_server_and_the_fingerprint(tmp_path):
    """Beside OpenAI's own arguments; a row's settings of the template count more than the recipe's. Unset they are nowhere."""
    rows = [QUESTION, {**QUESTION, "answer": "43", "chat_template_kwargs": {"enable_thinking": True}}]
    settings = {
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "chat_template_kwargs": {"enable_thinking": False, "a": 1},
    }
    with Served() as server:
        store = curate.run(
            recipe(tmp_path, server, rows, samples=1, extra_body={"thinking_token_budget": 9}, **settings)
        ).store
        first, second = sorted(server.sampled, key=lambda r: r["chat_template_kwargs"]["enable_thinking"])
        assert {key: first[key] for key in settings} == settings and first["thinking_token_budget"] == 9
        assert second["chat_template_kwargs"] == {"enable_thinking": True, "a": 1}
        params = store.measured(reads="sample")[-1].params
        assert params["extra_body"] == {"thinking_token_budget": 9} and settings.items() <= params.items()
        unset = params_of(load_recipe(recipe(tmp_path, server, rows)), MEASUREMENTS["accuracy"], "a tokenizer")
    assert not {*settings, "extra_body", "thinking", "unfinished", "thinking_tokens"} & unset.keys()


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"extra_body": {"top_k": 4}}, "'top_k' is sent already, as sampling.top_k"),
        ({"extra_body": {"n": 4}}, "'n' is sent already, as sampling.samples"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize' is not a setting of a chat template"),
        ({"thinking_tokens": 4}, "a server has a budget of its own"),
        ({"thinking_tokens": 512}, "has to be below max_new_tokens (8)"),
        ({"thinking_tags": ["a", "a"]}, "two texts that differ"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, sampling, words):
    with Served() as server, pytest.raises(UsageError) as error:
        curate.run(recipe(tmp_path, server, **sampling))
    assert words in str(error.value)


def test_a_local_model_thinks_within_its_budget(tmp_path):
    """What the prompt opens is told apart, through the line; what needs a server or a template is refused before a model runs."""
    folder = make_llama(tmp_path / "model", seed=1)
    tokenizer = make_tokenizer(template=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant:", "assistant: +")
    tokenizer.save_pretrained(folder)
    rows = [{**QUESTION, "prompt": [{"role": "user", "content": f"{i} times 7"}]} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "kind": "sft",
        "source": "rows.jsonl",
        "models": {"reference": "model"},
        "engine": {"sampler": "transformers", "device": "cpu"},
        "sampling": {"samples": 4, "temperature": 1.0, "max_new_tokens": 10, "grader": "number", "thinking_tokens": 4},
        "scores": ["accuracy"],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UsageError, match="what closes the thinking of model is not known"):
        curate.run(path)
    untold = curate.run(path, set=["sampling.thinking_tags=null", "sampling.thinking_tokens=null"])
    unlimited = curate.run(path, set=["sampling.thinking_tags=['+', '=']", "sampling.thinking_tokens=null"])
    assert (
        unlimited.measured["sample"] == untold.measured["sample"] == 3
    )  # a kept text does not say that the prompt opens its thinking
    assert unlimited.store.sql("SELECT count(reasoning) FROM samples").rows() == [(12,)]
    store = curate.run(path, set=["sampling.thinking_tags=['+', '=']"]).store
    samples = store.sql("SELECT reasoning, text, n_tokens, finished FROM samples")
    assert len(samples) == 12 and samples["reasoning"].null_count() == 0
    answered = samples.filter(samples["n_tokens"] > 4)
    assert len(answered) > 6 and answered["text"].str.starts_with("\n\n").sum() > 4
    assert max(map(len, answered["reasoning"])) <= 5 and samples["n_tokens"].max() <= 10
    with pytest.raises(UsageError, match="sampling.extra_body is for a server's requests"):
        curate.run(path, set=["sampling.extra_body={a: 1}"])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "6", "completion": "7", "answer": "7"}) + "\n")
    with pytest.raises(UsageError, match="these rows are asked as plain text"):
        curate.run(
            path, set=["sampling.chat_template_kwargs={a: 1}", "sampling.thinking_tokens=null"], store=tmp_path / "text"
        )
