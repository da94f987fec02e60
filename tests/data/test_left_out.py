"""What rows hold and no pass reads: refused, put where it belongs, or counted and said. And one meaning under every column name."""

from __future__ import annotations

import csv
import json

import pytest

from curate.data import read, validate
from curate.errors import UsageError
from curate.rows import Example, Pair


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED, SAID, OTHER = turn("user", "Where is the boat?"), turn("assistant", "In the bay."), turn("assistant", "On land.")


@pytest.fixture
def source(tmp_path):
    def of(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return of


def said(source, rows, **arguments):
    return " | ".join(validate(source(rows), **arguments).notes)


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("column", ["messages", "chosen"])
def test_what_a_model_said_beside_its_content_is_kept(source, key, column):
    more = {key: [{"name": "find"}] if "call" in key else "It floats."}
    reply = turn("assistant", "In the bay.", **more)
    whole = (
        {"messages": [ASKED, reply]}
        if column == "messages"
        else {"prompt": [ASKED], "chosen": [reply], "rejected": [OTHER]}
    )
    (record,) = read(source([whole]))
    (kept,) = record.row.chosen if column == "chosen" else record.row.completion
    assert kept == reply and kept[key] == more[key]


def test_other_keys_of_messages_are_kept_and_those_without_a_value_are_not(source):
    rows = [
        {"messages": [ASKED | {"name": "Ann"}, SAID | {"weight": 0}]},
        {"messages": [ASKED, OTHER | {"weight": 1, "name": None}]},
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": [{"type": "text", "text": "Bay.", "cache_control": {"a": 1}}]},
            ]
        },
    ]
    first, second, third = (record.row for record in read(source(rows)))
    assert first.prompt == (ASKED | {"name": "Ann"},) and first.completion == (SAID | {"weight": 0},)
    assert second.completion == (OTHER | {"weight": 1},) and third.completion == (turn("assistant", "Bay."),)
    assert "Text parts have keys that are neither measured nor exported: content.cache_control (in 1 rows)." in said(
        source, rows
    )


BESIDE = [
    # (row without its prompt's column, the row it is)
    ({"chosen": "In the bay.", "rejected": "On land."}, lambda prompt: Pair(prompt, (SAID,), (OTHER,))),
    ({"completion": "In the bay."}, lambda prompt: Example(prompt, (SAID,))),
    ({"answer": "In the bay."}, lambda prompt: Example(prompt, (SAID,), "In the bay.")),
    ({"completion": "In the bay.", "label": True}, lambda prompt: Example(prompt, (SAID,), label=True)),
]


@pytest.mark.parametrize(("rest", "row"), BESIDE)
@pytest.mark.parametrize("column", ["prompt", "question"])
def test_system_and_history_are_part_of_every_prompt(source, rest, row, column):
    """As they are beside `instruction`; a source where one row has them is messages throughout."""
    first = {column: ASKED["content"], "system": "Be brief.", "history": [["Hi", "Hello"]], **rest}
    second = {column: ASKED["content"], "system": None, "history": [], **rest}
    found = [record.row for record in read(source([first, second]))]
    before = (turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello"))
    assert found == [row((*before, ASKED)), row((ASKED,))]
    assert "the column `system` is the prompt's system turn" in said(source, [first, second])


def test_a_system_column_beside_whole_conversations(source):
    rows = [{"system": "Be brief.", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}]
    assert next(iter(read(source(rows)))).row == Pair((turn("system", "Be brief."), ASKED), (SAID,), (OTHER,))


def test_a_system_column_that_contradicts_the_system_turn_is_refused(source):
    rows = [
        {"system": system, "messages": [turn("system", "Be brief."), ASKED, SAID]}
        for system in ("Be brief. ", "Be long.")
    ]
    found = list(read(source(rows)))
    assert [record.row is None for record in found] == [False, True]
    assert "'system' is another text than the messages' own system turn" in str(found[1].defects[0])


def test_a_column_that_a_template_has_put_into_the_prompt_is_not_put_there_again(source):
    rows = [{"question": "Where?", "system": "Be brief.", "answer": "Bay."}]
    record = next(iter(read(source(rows), columns={"prompt": "{system}\n{question}"})))
    assert record.row.prompt == "Be brief.\nWhere?"
    rows = [{"instruction": "Where?", "input": "the boat", "output": "Bay."}]
    record = next(iter(read(source(rows), columns={"instruction": "{instruction} ({input})"})))
    assert record.row.prompt == "Where? (the boat)"


@pytest.mark.parametrize("column", ["context", "input", "tools", "images"])
def test_columns_that_look_like_a_part_of_the_prompt_are_said(source, column):
    row = {"question": "Where is the boat?", "answer": "In the bay."}
    note = said(source, [row | {column: "A map."}, row | {column: ""}, row])
    assert f"1 rows have something in `{column}`" in note or f"1 rows have `{column}`" in note
    assert column not in said(source, [row | {column: "the boat"}] if column in ("context", "input") else [row])


REPEATS = [
    ({"chosen": "Where? Bay.", "rejected": "Where? Land."}, "both replies begin"),
    ({"chosen": "Where? Bay.", "rejected": "Land."}, "the chosen reply alone begins"),
    ({"chosen": "Bay.", "rejected": " Where? Land."}, "the rejected reply alone begins"),
    ({"completion": "Where?\nBay."}, "the completion begins"),
]


@pytest.mark.parametrize(("replies", "words"), REPEATS)
@pytest.mark.parametrize("style", ["text", "messages"])
def test_replies_that_begin_with_the_prompt_are_counted(source, replies, words, style):
    row = {"prompt": "Where?", **replies}
    if style == "messages":
        row = {k: [turn("user" if k == "prompt" else "assistant", v)] for k, v in row.items()}
    assert f"In 1 rows {words} with the whole prompt" in said(source, [row])


MESSAGES = {
    "a list": lambda turns: turns,
    "JSON text": json.dumps,
    "Python's print": repr,
    "by columns": lambda turns: {"role": [t["role"] for t in turns], "content": [t["content"] for t in turns]},
    "from and value": lambda turns: [{"from": t["role"], "value": t["content"]} for t in turns],
    "from and value as JSON text": lambda turns: json.dumps(
        [{"from": t["role"], "value": t["content"]} for t in turns]
    ),
}


@pytest.mark.parametrize("stored", MESSAGES)
def test_messages_are_messages_under_every_name(source, stored):
    of = MESSAGES[stored]
    pair, example = Pair((ASKED,), (SAID,), (OTHER,)), Example((ASKED,), (SAID,))
    rows = {
        "prompt, chosen, rejected": ({"prompt": of([ASKED]), "chosen": of([SAID]), "rejected": of([OTHER])}, pair),
        "chosen, rejected": ({"chosen": of([ASKED, SAID]), "rejected": of([ASKED, OTHER])}, pair),
        "conversations, chosen, rejected": (
            {"conversations": of([ASKED]), "chosen": of([SAID]), "rejected": of([OTHER])},
            pair,
        ),
        "messages": ({"messages": of([ASKED, SAID])}, example),
        "conversations": ({"conversations": of([ASKED, SAID])}, example),
        "prompt, completion": ({"prompt": of([ASKED]), "completion": of([SAID])}, example),
    }
    for name, (raw, row) in rows.items():
        assert next(iter(read(source([raw])))).row == row, name


def test_text_that_happens_to_be_json_is_text(source):
    for text in ("[1, 2]", '{"a": "role"}', '[{"a": 1}]', "[role]", '["from", "role"]'):
        assert next(iter(read(source([{"prompt": text, "completion": "c"}])))).row.prompt == text


def test_a_mapping_that_nothing_reads_is_refused(source):
    """A key of ours that this kind of rows has not: it was renamed, and nothing came of it."""
    rows = source([{"q": "Where?", "good": "Bay.", "bad": "Land.", "ctx": "A map."}])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    for ours in ("context", "answer", "completion"):
        with pytest.raises(
            UsageError, match=rf"source\.columns\.{ours}: .* read as preference .* does not read {ours}.*\{{ctx\}}"
        ):
            read(rows, columns=columns | {ours: "ctx"})
    with pytest.raises(UsageError, match=r"heldout\.columns\.context"):
        read(rows, columns=columns | {"context": "ctx"}, setting="heldout")


def test_settings_of_other_sources_are_refused(source, tmp_path):
    import datasets

    rows = [{"prompt": "p", "completion": "c"}]
    path = source(rows)
    for split in ("test", "train[:2]"):
        for given in (path, [path], str(tmp_path / "*.jsonl"), rows):
            with pytest.raises(UsageError, match=r"source\.split: .* no splits, found"):
                read(given, split=split)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="no splits, found 'test'"):
        read(tmp_path / "saved", split="test")
    for given in (path, tmp_path / "saved", rows):
        with pytest.raises(UsageError, match=r"source\.revision: .* no revisions"):
            read(given, revision="v1")


CELLS = {
    "id": (["007", "12"], ["007", "12"]),
    "big": (["12345678901234567890123", "1"], ["12345678901234567890123", "1"]),
    "whole": (["9007199254740993", "-4"], [9007199254740993, -4]),
    "exponent": (["1e5", "2e7"], ["1e5", "2e7"]),
    "written": (["1e-3", "2.5E+07"], [0.001, 2.5e7]),
    "price": (["1.50", "0.3"], [1.5, 0.3]),
    "digits": (["0.12345678901234567890", "1"], ["0.12345678901234567890", "1"]),
    "zeros": (["00.5", "1"], ["00.5", "1"]),
    "plus": (["+5", "1"], ["+5", "1"]),
    "day": (["2026-11-27", "2026-01-02"], ["2026-11-27", "2026-01-02"]),
    "none": (["NaN", "1"], ["NaN", "1"]),
}


def test_cells_of_a_csv_are_what_the_user_wrote(tmp_path):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "completion", *CELLS])
        for at in (0, 1):
            table.writerow([f"p{at}", f"c{at}", *(written[at] for written, _ in CELLS.values())])
    found = [record.columns for record in read(path)]
    assert found == [{name: wanted[at] for name, (_, wanted) in CELLS.items()} for at in (0, 1)]


@pytest.mark.parametrize(
    ("written", "answer"),
    [("1,200", "1200"), ("$1,234,567.50", "$1234567.50"), ("1,200 apples", "1200 apples"), ("(1,2)", "(1,2)"), ("3,5", "3,5"),
     ("Paris, France", "Paris, France"), ("x = 1,2,3", "x = 1,2,3"), ("(100,200)", "(100,200)"), ("1,2000", "1,2000")],
)  # fmt: skip
def test_only_a_numbers_commas_are_left_out_of_an_answer(source, written, answer):
    assert next(iter(read(source([{"question": "q", "answer": f"so\n#### {written}"}])))).row.answer == answer


def test_class_labels_are_their_names(tmp_path):
    """Under every way that `datasets` keeps them: in memory, saved, as parquet."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["bay", "land"]),
         "tags": datasets.List(datasets.ClassLabel(names=["x", "y"])), "topic": datasets.ClassLabel(names=["sea", "sky"])}
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"question": "q", "answer": 1, "tags": [0, 1], "topic": -1}], features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "folder").mkdir()
    rows.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    for given in (rows, tmp_path / "saved", tmp_path / "rows.parquet", tmp_path / "folder"):
        record = next(iter(read(given)))
        assert (record.row, record.columns) == (Example("q", "land", "land"), {"tags": ["x", "y"], "topic": None})


def test_bytes_that_are_not_kept_are_said(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "p", "completion": "c", "scan": {"bytes": b"\x89PNG", "path": "a.png"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert "Column `scan` holds bytes (images, audio) in 1 rows. They are not kept" in " ".join(
        validate(tmp_path / "rows.parquet").notes
    )


def test_rows_are_numbered_as_an_editor_does(tmp_path):
    """From 1, with the line where that is another number; the stored index stays from 0."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n\n\n{"prompt": "p", "completion": 3}\n{"prompt": "p"\n')
    found = validate(path).defects
    assert [str(defect).partition(": ")[0].rpartition("/")[2] for defect in found] == [
        "rows.jsonl, row 2, line 4",
        "rows.jsonl, row 3, line 5",
    ]
    assert [(defect.row, defect.index, defect.line) for defect in found] == [(2, 1, 4), (3, 2, 5)]
    table = tmp_path / "rows.csv"
    table.write_text('prompt,completion\n"p\nq",c\np,\n')
    assert "rows.csv, row 2, line 4: 'completion' is blank" in str(validate(table).defects[0])
