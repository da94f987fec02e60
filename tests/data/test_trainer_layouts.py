"""Exports for trainers other than TRL, read as their documentation says that they are read; what they cannot carry is refused."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import yaml

from curate.data import ExportRow, export
from curate.data.export import Files
from curate.data.exported import is_plain_row
from curate.data.trainers import TRAINERS
from curate.data.trainers.verl import TRAINER as VERL
from curate.errors import ValidationError
from curate.rows import Example, Pair


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CHAT = (turn("system", "be brief"), turn("user", "hi"), turn("assistant", "hello"), turn("user", "2+2?"))
YES, NO = (turn("assistant", "4"),), (turn("assistant", "5"),)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = turn(
    "assistant",
    None,
    tool_calls=[{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
)
ROWS = {
    "pairs": [Pair(CHAT, YES, NO), Pair(CHAT[:2], YES, NO)],
    "texts of pairs": [Pair("2+2?", " 4", " 5"), Pair("{x}", "a", "b")],
    "sft": [Example(CHAT, YES), Example(CHAT[:2], YES)],
    "texts of sft": [Example("2+2?", " 4"), Example("1+1?", " 2")],
    "prompts": [Example(CHAT, answer="4"), Example(CHAT[:2], answer="x")],
    "texts of prompts": [Example("2+2?", answer="4"), Example("1+1?", answer="2")],
    "labelled": [Example(CHAT, YES, label=True), Example(CHAT, NO, label=False)],
}
TAKES = {
    "llama_factory": {"pairs", "texts of pairs", "sft", "texts of sft", "labelled"},
    "axolotl": {"pairs", "texts of pairs", "sft", "texts of sft"},
    "openrlhf": {"pairs", "texts of pairs", "sft", "texts of sft", "prompts", "texts of prompts"},
    "verl": {"sft", "texts of sft", "prompts", "texts of prompts"},
}


def written(folder, layout, rows, rows_per_file=1, **columns):
    records = [ExportRow(row, row.row_id, {"level": i, **columns}) for i, row in enumerate(rows)]
    beyond = not all(map(is_plain_row, rows))
    return export(folder / "out", records, files=Files(layout, rows_per_file, "maths"), as_json=beyond)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def messages(text, role):
    return [turn(role, text)] if isinstance(text, str) else list(text)


def llama_factory(folder, sort):
    """(prompt, first reply, second) as LLaMA-Factory's data/README.md defines the columns that dataset_info.json names."""
    info = json.loads((folder / "dataset_info.json").read_text())
    assert list(info) == ["train_00000", "train_00001"]  # each file an entry, so that their order is kept
    for entry in info.values():
        for row in lines(folder / entry["file_name"]):
            of = {what: row[column] for what, column in entry["columns"].items()}
            label = of.get("kto_tag")
            if entry["formatting"] == "alpaca":
                replies = [of["chosen"], of["rejected"]] if entry.get("ranking") else [of["response"]]
                yield of["prompt"], *replies
                continue
            tags = entry["tags"]
            names = {tags[f"{who}_tag"]: who for who in ("user", "assistant", "system")}
            read = lambda m: turn(names[m[tags["role_tag"]]], m[tags["content_tag"]])  # noqa: B023, E731
            turns = [read(m) for m in of["messages"]]
            spoken = turns[turns[0]["role"] == "system" :]
            assert [m["role"] for m in spoken] == (["user", "assistant"] * len(spoken))[: len(spoken)]
            if entry.get("ranking"):
                yield turns, [read(of["chosen"])], [read(of["rejected"])]
            else:
                yield (turns[:-1], turns[-1:], label) if sort == "labelled" else (turns[:-1], turns[-1:])


def axolotl(folder, sort):
    """As docs/rlhf.qmd and docs/dataset-formats say of the types that axolotl.yaml names."""
    config = yaml.safe_load((folder / "axolotl.yaml").read_text())
    assert config.get("rl") == ("dpo" if "pairs" in sort else None)
    for entry in config["datasets"]:
        for row in lines(folder / entry["path"]):
            if entry["type"] == "input_output":
                assert [s["label"] for s in row["segments"]] == [False, True]
                yield tuple(s["text"] for s in row["segments"])
            elif entry["type"] == "chat_template":
                assert (entry["roles_to_train"], entry["message_field_training"]) == ([], "train")
                said = [turn(m["role"], m["content"]) for m in row[entry["field_messages"]]]
                trained = [m["train"] for m in row[entry["field_messages"]]]
                at = trained.index(True)
                assert all(trained[at:])
                yield said[:at], said[at:]
            elif entry["type"] == "chat_template.default":
                yield row[entry["field_messages"]], [row["chosen"]], [row["rejected"]]
            else:
                yield tuple(row[entry["type"][f"field_{name}"]] for name in ("prompt", "chosen", "rejected"))


def openrlhf(folder, sort):
    """As its datasets take the keys of the command line."""
    args = json.loads((folder / "trainer_args.json").read_text())
    assert args.get("apply_chat_template", False) == ("texts" not in sort)
    keys = ("prompt_key", "chosen_key", "rejected_key", "input_key", "output_key", "label_key")
    for file in sorted((folder / args.get("dataset", args.get("prompt_data"))).iterdir()):
        for row in lines(file):
            yield tuple(row[args[key]] for key in keys if key in args)


def verl(folder, sort):
    """As docs/preparation/prepare_data.rst has the five columns; MultiTurnSFTDataset reads messages."""
    args = json.loads((folder / "trainer_args.json").read_text())
    for number, file in enumerate(args["data.train_files"]):
        for row in pq.read_table(folder / file).to_pylist():
            if "prompts" in sort:
                assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
                assert row["data_source"] == "maths" and row["reward_model"]["style"] == "rule"
                extra = row["extra_info"]
                assert (extra["index"], extra["split"], extra["level"]) == (number, "train", number)
                yield row["prompt"], row["reward_model"]["ground_truth"]
            else:
                said = row[args["data.multiturn.messages_key"]]
                yield said[:-1], said[-1:]


def wanted(row, sort, layout):
    """What a trainer should get of a row: prompt, then replies, answer or label."""
    if isinstance(row, Pair):
        parts = [row.prompt, row.chosen, row.rejected]
    else:
        parts = [row.prompt, *(part for part in (row.completion, row.answer, row.label) if part is not None)]
    if layout == "verl" and "texts" in sort:
        parts = [messages(parts[0], "user"), parts[1] if "prompts" in sort else messages(parts[1], "assistant")]
    return tuple(list(part) if isinstance(part, tuple) else part for part in parts)


READERS = {"llama_factory": llama_factory, "axolotl": axolotl, "openrlhf": openrlhf, "verl": verl}


@pytest.mark.parametrize("layout", sorted(TRAINERS))
@pytest.mark.parametrize("sort", sorted(ROWS))
def test_what_a_trainer_reads_are_the_rows(tmp_path, layout, sort):
    if sort not in TAKES[layout]:
        with pytest.raises(ValidationError, match=f"layout {layout}: these rows are .* Layouts that take them: trl"):
            written(tmp_path, layout, ROWS[sort])
        assert not (tmp_path / "out").exists()
        return
    result = written(tmp_path, layout, ROWS[sort])
    assert TRAINERS[layout].title in result.layout and result.n_rows == 2
    assert list(READERS[layout](result.path, sort)) == [wanted(row, sort, layout) for row in ROWS[sort]]
    card = (result.path / "README.md").read_text()
    end = "parquet" if layout == "verl" else "jsonl"
    assert f"data/train-*.{end}" in card and layout in card and len(list((result.path / "data").iterdir())) == 2


def test_the_next_layout_replaces_the_files_of_the_one_before(tmp_path):
    for layout, file in (
        ("llama_factory", "dataset_info.json"),
        ("axolotl", "axolotl.yaml"),
        ("trl", "dataset_dict.json"),
    ):
        result = written(tmp_path, layout, ROWS["pairs"])
        assert (result.path / file).is_file()
    assert not {"dataset_info.json", "axolotl.yaml"} & {path.name for path in result.path.iterdir()}
    assert "jsonl" not in (result.path / "README.md").read_text()


def test_tools_and_their_calls_go_to_llama_factory(tmp_path):
    asked = Example(CHAT[1:2], (CALL,), template_args=json.dumps({"tools": [TOOL]}))
    result = written(tmp_path, "llama_factory", [asked, Example(CHAT[1:2], YES)], None)
    first, second = lines(result.path / "data" / "train-00000.jsonl")
    info = json.loads((result.path / "dataset_info.json").read_text())["train"]
    assert info["columns"]["tools"] == "tools" and info["tags"]["function_tag"] == "function_call"
    assert json.loads(first["tools"]) == [TOOL] and second["tools"] == ""
    assert first["messages"][-1]["role"] == "function_call"
    assert json.loads(first["messages"][-1]["content"]) == {"name": "add", "arguments": {"a": 2}}


UNFIT = [
    ("llama_factory", Example((CHAT[1], CHAT[1]), YES), "turns that do not alternate"),
    ("llama_factory", Pair(CHAT, (*YES, CHAT[1], *YES), NO), "responses of several turns"),
    ("llama_factory", Example(CHAT, (turn("assistant", "4", reasoning_content="hm"),)), "reasoning_content"),
    ("llama_factory", Example(CHAT, YES, template_args='{"chat_template_kwargs": {"a": 1}}'), "chat_template_kwargs"),
    ("axolotl", Example(CHAT, (CALL,)), "tool_calls"),
    ("openrlhf", Pair(CHAT, YES, NO, template_args=json.dumps({"tools": [TOOL]})), "have tools"),
    ("verl", Example(CHAT, answer="4", template_args=json.dumps({"tools": [TOOL]})), "have tools"),
    ("verl", Example(CHAT), "have no answer"),
]


@pytest.mark.parametrize(("layout", "row", "why"), UNFIT)
def test_what_a_layout_cannot_carry_is_refused_with_the_row(tmp_path, layout, row, why):
    fine = Pair(CHAT, YES, NO) if isinstance(row, Pair) else Example(CHAT, row.completion and YES, row.answer or "4")
    with pytest.raises(ValidationError, match=f"of 2 rows 1 .*{why}.*{row.row_id}"):
        written(tmp_path, layout, [fine, row])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["llama_factory", "axolotl", "openrlhf", "verl"])
def test_the_answer_of_a_row_to_train_on_stays_beside_it(tmp_path, layout):
    result = written(tmp_path, layout, [Example(CHAT[:2], YES, "4")])
    [file] = (result.path / "data").iterdir()
    [row] = pq.read_table(file).to_pylist() if layout == "verl" else lines(file)
    assert row.get("answer", row.get("source_answer")) == "4"


def test_columns_of_the_users_own(tmp_path):
    """verl's data_source may be a column; a column that a trainer would take for its own has another name."""
    rows = written(tmp_path, "verl", ROWS["prompts"], data_source="openai/gsm8k", ability="math", index=7)
    row = pq.read_table(rows.path / "data" / "train-00000.parquet").to_pylist()[0]
    assert (row["data_source"], row["ability"]) == ("openai/gsm8k", "math")
    assert (row["extra_info"]["index"], row["extra_info"]["source_index"]) == (0, 7)
    assert VERL.takes_own
    result = written(tmp_path, "axolotl", ROWS["pairs"], system="mine")
    assert json.loads((result.path / "data" / "train-00000.jsonl").read_text())["source_system"] == "mine"
    assert any("`system` is called `source_system`" in note for note in result.notes)
