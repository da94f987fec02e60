"""Each format's converter against rows written out by hand."""

from __future__ import annotations

import json

import pytest

from curate.data import FORMATS, read
from curate.errors import UsageError, ValidationError
from curate.rows import Example, Pair


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture
def records(tmp_path):
    def of(rows, **arguments):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reading = read(path, **arguments)
        return reading, list(reading)

    return of


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
CHAT = [user("hi"), assistant("hello"), user("and?")]

CASES = [
    # TRL standard, and the user's own columns beside it
    ("preference", {"prompt": "p", "chosen": " a", "rejected": " b", "votes": 3}, Pair("p", " a", " b"), {"votes": 3}),
    ("preference", {"question": "p", "chosen": "a", "rejected": "b"}, Pair("p", "a", "b"), {}),
    # TRL conversational
    (
        "preference",
        {"prompt": CHAT, "chosen": [assistant("x")], "rejected": [assistant("y")]},
        Pair(tuple(CHAT), (assistant("x"),), (assistant("y"),)),
        {},
    ),
    # a text prompt beside whole conversations (as UltraFeedback has it): what they share is the prompt
    (
        "preference",
        {"prompt": "hi", "chosen": [user("hi"), assistant("x")], "rejected": [user("hi"), assistant("y")]},
        Pair((user("hi"),), (assistant("x"),), (assistant("y"),)),
        {},
    ),
    # a text prompt beside single replies as messages
    (
        "preference",
        {"prompt": "hi", "chosen": [assistant("x")], "rejected": [assistant("y")]},
        Pair((user("hi"),), (assistant("x"),), (assistant("y"),)),
        {},
    ),
    # a system prompt beside whole conversations without it
    (
        "preference",
        {"prompt": [system("s")], "chosen": [user("hi"), assistant("x")], "rejected": [user("hi"), assistant("y")]},
        Pair((system("s"), user("hi")), (assistant("x"),), (assistant("y"),)),
        {},
    ),
    # implicit prompt: the longest common run of turns
    (
        "implicit",
        {"chosen": [*CHAT, assistant("x")], "rejected": [*CHAT, assistant("y")]},
        Pair(tuple(CHAT), (assistant("x"),), (assistant("y"),)),
        {},
    ),
    # one goes on after a turn that both have: the reply starts at the last assistant turn that both have there
    (
        "implicit",
        {
            "chosen": [user("hi"), assistant("x"), user("and?"), assistant("z")],
            "rejected": [user("hi"), assistant("x")],
        },
        Pair((user("hi"),), (assistant("x"), user("and?"), assistant("z")), (assistant("x"),)),
        {},
    ),
    # the user's turns differ after an equal reply: no prompt ends behind a reply
    (
        "implicit",
        {
            "chosen": [user("hi"), assistant("x"), user("a"), assistant("z")],
            "rejected": [user("hi"), assistant("x"), user("b"), assistant("z")],
        },
        Pair((user("hi"),), (assistant("x"), user("a"), assistant("z")), (assistant("x"), user("b"), assistant("z"))),
        {},
    ),
    # text dialogues: replies that begin alike are not part of the prompt
    ("hh", {"chosen": HH + " I will", "rejected": HH + " I won't"}, Pair(HH, " I will", " I won't"), {}),
    ("hh", {"chosen": HH + " yes", "rejected": HH + " yes, but"}, Pair(HH, " yes", " yes, but"), {}),
    (
        "hh",
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",
            "rejected": "\n\nHuman: hi\n\nAssistant: d",
        },
        Pair("\n\nHuman: hi\n\nAssistant:", " a\n\nHuman: b\n\nAssistant: c", " d"),
        {},
    ),
    (
        "hh",
        {"chosen": "Human: hi\n\nAssistant: a", "rejected": "Human: hi\n\nAssistant: b"},
        Pair("Human: hi\n\nAssistant:", " a", " b"),
        {},
    ),
    # Alpaca: input on a line of its own
    ("alpaca", {"instruction": "i", "input": "x", "output": "o", "id": 1}, Example("i\nx", "o"), {"id": 1}),
    ("alpaca", {"instruction": "i", "input": "", "response": "o"}, Example("i", "o"), {}),
    (
        "alpaca",
        {"instruction": "i", "output": "o", "system": "s", "history": [["q", "r"]]},
        Example((system("s"), user("q"), assistant("r"), user("i")), (assistant("o"),)),
        {},
    ),
    (
        "alpaca_preference",
        {"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"},
        Pair("i\nx", "a", "b"),
        {},
    ),
    # ShareGPT
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}], "system": "s"},
        Example((system("s"), user("hi")), (assistant("x"),)),
        {},
    ),
    (
        "sharegpt_preference",
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "x"},
            "rejected": {"from": "gpt", "value": "y"},
        },
        Pair((user("hi"),), (assistant("x"),), (assistant("y"),)),
        {},
    ),
    # messages: the last assistant turn is the completion; parts of text are joined; JSON text is read
    ("messages", {"messages": [*CHAT, assistant("x")]}, Example(tuple(CHAT), (assistant("x"),)), {}),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                assistant("x"),
            ]
        },
        Example((user("hi"),), (assistant("x"),)),
        {},
    ),
    ("messages", {"messages": json.dumps([user("hi"), assistant("x")])}, Example((user("hi"),), (assistant("x"),)), {}),
    # a class label beside messages is no KTO label
    (
        "messages",
        {"messages": [user("hi"), assistant("x")], "label": 3},
        Example((user("hi"),), (assistant("x"),)),
        {"label": 3},
    ),
    # prompt and completion, with and without an answer
    ("prompt_completion", {"prompt": "p", "completion": " c"}, Example("p", " c"), {}),
    ("prompt_completion", {"prompt": "p", "completion": "c", "answer": 7.0}, Example("p", "c", answer="7"), {}),
    (
        "prompt_completion",
        {"prompt": [user("p")], "completion": [assistant("c")]},
        Example((user("p"),), (assistant("c"),)),
        {},
    ),
    # unpaired
    (
        "kto",
        {"messages": [user("hi"), assistant("x")], "label": False},
        Example((user("hi"),), (assistant("x"),), label=False),
        {},
    ),
    ("kto", {"prompt": "p", "completion": "c", "label": True}, Example("p", "c", label=True), {}),
    # question and answer: commas and the mark are not part of the answer; final_answer stays a column
    (
        "question_answer",
        {"question": "q", "answer": "so\n#### 1,200"},
        Example("q", "so\n#### 1,200", answer="1200"),
        {},
    ),
    (
        "question_answer",
        {"question": "q", "answer": "long", "final_answer": "5"},
        Example("q", "long", answer="5"),
        {"final_answer": "5"},
    ),
    ("question_answer", {"question": "q", "answer": 51.0}, Example("q", "51", answer="51"), {}),
    ("question_answer", {"prompt": "q", "answer": " Paris"}, Example("q", " Paris", answer="Paris"), {}),
    # prompts of RL: nothing to train on, something to grade samples by
    ("prompts", {"prompt": "q", "final_answer": 5.0}, Example("q", answer="5"), {}),
    ("prompts", {"prompt": [user("q")], "final_answer": "x"}, Example((user("q"),), answer="x"), {}),
]
NAMED_PROMPTS = [  # with `format: prompts`, columns that are another format otherwise
    ({"question": "q", "answer": "so\n#### 1,200"}, Example("q", answer="1200"), {}),
    ({"prompt": [user("q")], "answer": "5", "completion": "c"}, Example((user("q"),), answer="5"), {"completion": "c"}),
    ({"prompt": "q", "answer": "long", "final_answer": "5"}, Example("q", answer="5"), {"final_answer": "5"}),
]


@pytest.mark.parametrize(("name", "raw", "row", "columns"), CASES)
def test_a_row_of_each_format(records, name, raw, row, columns):
    reading, [record] = records([raw])
    assert (reading.format, record.row, record.columns, record.defects) == (name, row, columns, ())
    assert reading.kind == row.kind


@pytest.mark.parametrize(("name", "raw", "row", "columns"), CASES)
def test_a_named_format_reads_the_same(records, name, raw, row, columns):
    _, [record] = records([raw], format=name, kind=row.kind)
    assert (record.row, record.columns) == (row, columns)


@pytest.mark.parametrize(("raw", "row", "columns"), NAMED_PROMPTS)
def test_rows_with_a_reply_are_prompts_where_that_is_said(records, raw, row, columns):
    _, [record] = records([raw], format="prompts", kind="sft")
    assert (record.row, record.columns, record.defects) == (row, columns, ())


@pytest.mark.parametrize("answer", [None, " ", "so\n####", ["5"]])
def test_a_prompt_needs_an_answer(records, answer):
    _, [record] = records([{"prompt": "q", "answer": answer}], format="prompts")
    assert record.row is None and record.defects[0].column == "answer"


def test_every_format_has_a_case():
    assert {name for name, *_ in CASES} == set(FORMATS)


MAPPED = [
    # (columns, row, wanted row, wanted columns): plain names are used up, columns of a template stay
    ({"prompt": "q", "completion": "a"}, {"q": "p", "a": "c", "n": 1}, Example("p", "c"), {"n": 1}),
    ({"question": "{Body} {Question}", "answer": "Answer"}, {"Body": "b.", "Question": "q?", "Answer": 5.0},
     Example("b. q?", "5", answer="5"), {"Body": "b.", "Question": "q?"}),
    ({"prompt": "Question: {question}\nAnswer:"}, {"question": "q", "answer": "a"},
     Example("Question: q\nAnswer:", "a", answer="a"), {"question": "q"}),
    ({"prompt": "{prompt}\n"}, {"prompt": "p", "completion": "c"}, Example("p\n", "c"), {"source_prompt": "p"}),
    ({"prompt": "{instruction}:"}, {"instruction": "i", "output": "o"}, Example("i:", "o"), {"instruction": "i"}),
    # what the user named goes before what was there
    ({"completion": "chosen"}, {"prompt": "p", "chosen": "c", "rejected": "r"}, Example("p", "c"), {"rejected": "r"}),
    ({"completion": "cot"}, {"prompt": "p", "answer": "(1) A", "cot": "think"}, Example("p", "think", answer="(1) A"), {}),
    # a column of theirs that has our name by chance
    ({"prompt": "text"}, {"text": "t", "prompt": "id-1", "completion": "c"}, Example("t", "c"), {"source_prompt": "id-1"}),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "raw", "row", "others"), MAPPED)
def test_mapped_columns(records, columns, raw, row, others):
    _, [record] = records([raw], columns=columns, kind="sft")
    assert (record.row, record.columns) == (row, others)


TEXT = "text or messages"
DEFECTS = [
    # (row, [(column, found, expected)])
    ({"prompt": "p", "chosen": True, "rejected": "b"}, [("chosen", "true (bool)", TEXT)]),
    ({"prompt": "p", "chosen": " \n", "rejected": 7}, [("chosen", "blank", TEXT), ("rejected", "7 (int)", TEXT)]),
    ({"prompt": "p", "chosen": "a", "rejected": None}, [("rejected", "null", TEXT)]),
    ({"prompt": "p", "chosen": "a"}, [("rejected", "missing", TEXT)]),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, [("prompt", "blank", TEXT)]),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, [("rejected", "the same as 'chosen'", "another reply")]),
    ({"prompt": "p", "chosen": "\ud800", "rejected": "a"}, [("chosen", "not valid Unicode (a lone surrogate)", TEXT)]),
    ({"prompt": "p", "chosen": [], "rejected": "a"}, [("chosen", "an empty list", "messages")]),
    (
        {"prompt": "p", "chosen": [{"content": "a"}], "rejected": "b"},
        [("chosen", "without a role at turn 1: missing", "messages with role and content")],
    ),
    (
        {"prompt": "p", "chosen": [{"role": "assistant", "content": None}], "rejected": "b"},
        [("chosen", "without text content at turn 1: null", "messages with role and content")],
    ),
    ({"prompt": "p", "chosen": [assistant(" ")], "rejected": [assistant("b")]}, [("chosen", "blank", "a reply")]),
    (
        {"prompt": "p", "chosen": [assistant("a"), user("u")], "rejected": [assistant("b")]},
        [("chosen", "messages whose last turn is by 'user'", "a last turn by the assistant")],
    ),
]


@pytest.mark.parametrize(("raw", "defects"), DEFECTS)
def test_defects_of_a_pair(records, raw, defects):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    _, found = records([good, raw, good])
    assert [record.row is None for record in found] == [False, True, False]
    assert [(d.column, d.found, d.expected) for d in found[1].defects] == defects
    assert {(d.file, d.row) for d in found[1].defects} == {(found[1].source, 2)}


def test_defects_of_whole_conversations(records):
    shared = {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}
    _, found = records(
        [
            shared,
            shared | {"rejected": [user("ho"), assistant("b")]},
            shared | {"rejected": [user("hi")]},
            shared | {"rejected": shared["chosen"]},
            {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        ]
    )
    assert [record.defects and record.defects[0].found for record in found] == [
        (),
        "sharing no prompt with 'chosen'",
        "messages whose last turn is by 'user'",
        "the same as 'chosen'",
        "sharing no prompt with 'chosen'",
    ]


def test_defects_of_dialogues(records):
    good = {"chosen": HH + " a", "rejected": HH + " b"}
    _, found = records(
        [good, good | {"chosen": HH}, good | {"rejected": HH + " b\n\nHuman: c"}, good | {"rejected": "no turns"}]
    )
    assert [record.defects and (record.defects[0].column, record.defects[0].found) for record in found] == [
        (),
        ("chosen", "blank"),
        ("rejected", "a dialogue whose last turn is by Human"),
        ("rejected", "a dialogue whose last turn is by nobody (no 'Human:' and 'Assistant:' turns)"),
    ]


def test_defects_of_examples(records):
    good = {"messages": [user("hi"), assistant("a")], "label": True}
    _, found = records(
        [
            good,
            good | {"label": "perhaps"},
            good | {"messages": [assistant("a")]},
            good | {"messages": [user("hi")]},
            good | {"messages": [user("hi"), assistant("")]},
        ]
    )
    assert [record.defects and record.defects[0].found for record in found] == [
        (),
        '"perhaps" (str)',
        "blank",
        "messages whose last turn is by 'user'",
        "blank",
    ]


def test_a_defect_names_the_files_own_column(records):
    _, [_, bad] = records(
        [{"q": "p", "a": "x", "b": "y"}, {"q": "p", "a": True, "b": "y"}],
        columns={"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    assert str(bad.defects[0]) == f"{bad.source}, row 2: 'a' is true (bool), expected text or messages."


WRONG = [
    # (row, arguments, error, what it has to say)
    ({"a": 1}, {}, ValidationError, ["no known format has the columns a", "question_answer"]),
    ({"prompt": "p", "chosen": "c"}, {}, ValidationError, ["--set source.columns.completion=chosen"]),
    ({"chosen": "a", "rejected": "b"}, {}, ValidationError, ["prompt has to be a column of its own"]),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"kind": "sft"}, ValidationError, ["preference pairs", "completion=chosen"]),
    ({"prompt": "p", "completion": "a"}, {"kind": "preference"}, ValidationError, ["SFT examples", "'chosen' and 'rejected'"]),
    (
        {"prompt": "p", "completion": "a", "label": True},
        {"kind": "preference"},
        ValidationError,
        ["unpaired preferences (KTO", "--set kind=sft", "target_logp"],
    ),
    ({"prompt": "p", "completion": "a"}, {"format": "alpaca"}, ValidationError, ["not in format 'alpaca'", "It looks like prompt_completion"]),
    ({"prompt": "p", "completion": "a"}, {"format": "alpacca"}, UsageError, ["Did you mean 'alpaca'?"]),
    ({"prompt": "p", "completion": "a"}, {"columns": {"promt": "p"}}, UsageError, ["Did you mean 'prompt'?"]),
    ({"prompt": "p", "completion": "a"}, {"columns": {"answer": "competion"}}, UsageError, ["Did you mean 'completion'?"]),
    ({"prompt": "p", "completion": "a"}, {"columns": {"prompt": "{prompt"}}, UsageError, ["not a template"]),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "arguments", "error", "said"), WRONG)
def test_what_cannot_be_read_is_said(records, raw, arguments, error, said):
    with pytest.raises(error) as caught:
        records([raw], **arguments)
    assert all(part in str(caught.value) for part in said)


def test_other_columns_are_json_able(records):
    raw = {
        "prompt": "p",
        "completion": "c",
        "x": float("nan"),
        "y": float("inf"),
        "z": [1, float("nan")],
        "w": "\ud800",
    }
    _, [record] = records([raw])
    assert record.columns == {"x": None, "y": None, "z": [1, None], "w": "?"}


def test_a_column_moved_out_of_the_way_overwrites_none(tmp_path):
    """`prompt` makes way for the one that `columns` names; `source_prompt` is a column of the user's already."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"source_prompt": "mine", "text": "t", "prompt": "id-1", "completion": "c"},
        {"text": "u", "prompt": "id-2", "completion": "d"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    reading = read(file, columns={"prompt": "text"})
    assert [r.columns for r in reading] == [
        {"source_prompt": "mine", "source_source_prompt": "id-1"},
        {"source_source_prompt": "id-2"},
    ]
    assert reading.notes() == [
        "Column `prompt` is called `source_source_prompt` here, since `columns` calls another one prompt."
    ]


@pytest.mark.parametrize("first", ["prompt", "source_prompt"])
def test_a_column_that_comes_late_is_not_taken_for_another(tmp_path, first):
    """The two of them meet after the rows that the format is told from."""
    file = tmp_path / "rows.jsonl"
    late = {"prompt": "source_prompt", "source_prompt": "prompt"}[first]
    rows = [{"text": "t", first: "a", "completion": "c"}] * 250 + [{"text": "t", late: "b", "completion": "c"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    reading = read(file, columns={"prompt": "text"})
    if first == "prompt":
        with pytest.raises(
            ValidationError,
            match=r"rows.jsonl, row 251 has a column 'source_prompt', which is what the column 'prompt' is called",
        ):
            list(reading)
    else:
        assert [r.columns for r in reading][-1] == {"source_source_prompt": "b"}
