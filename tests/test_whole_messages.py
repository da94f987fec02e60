"""Rows with tools, calls of tools, reasoning and settings of the template: whole from the source through the store to the export, and rendered as TRL
renders them.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import curate
from curate.data import export, read
from curate.data.exported import ExportRow
from curate.errors import ValidationError
from curate.measurements.perturbations import Perturbation
from curate.passes.sampling.openai_requests import _sent, _text
from curate.passes.tokens import Limits, encode
from curate.rows import Example, Pair
from tests.served import Served
from tests.tiny_models import make_bytes_tokenizer, make_llama, make_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
    },
}
OTHER = {"type": "function", "function": {"name": "clock", "parameters": {"zone": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
TEMPLATES = {
    # tools, calls with their arguments, reasoning kept in the last turn alone, a setting, a default system turn: as Qwen3 has them
    "tools": """{%- if tools %}{{ '<|system|>' + tools | map('tojson') | join(';') + '\\n' }}{% else %}{{ '<|system|>You help.\\n' }}{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- m.content or '' }}{% for c in m.tool_calls or [] %}{% set given = c.function.arguments %}
{{- '<call>' + c.function.name + (given if given is string else given | tojson) + '</call>' }}{% endfor %}
{%- if m.name is defined %}({{ m.name }}){% endif %}</s>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}""",
    # no tools at all, and every turn in the same way
    "plain": "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
}
ASKED = {"role": "user", "content": "Oslo?"}
ROWS = [
    {  # a call as the reply
        "prompt": [ASKED],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "rejected": [{"role": "assistant", "content": "I do not know."}],
        "tools": [TOOL],
    },
    {  # a call, its result, the reply; arguments as text
        "prompt": [
            ASKED,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}],
            },
            {"role": "tool", "name": "clock", "content": "12:00"},
        ],
        "chosen": [{"role": "assistant", "content": "Noon."}],
        "rejected": [{"role": "assistant", "content": "Night."}],
        "tools": json.dumps([TOOL, OTHER]),
    },
    {  # reasoning, beside a content of parts
        "prompt": [
            {"role": "user", "content": [{"type": "text", "text": "Two "}, {"type": "text", "text": "and two?"}]}
        ],
        "chosen": [{"role": "assistant", "reasoning_content": "2 + 2 = 4", "content": "4"}],
        "rejected": [{"role": "assistant", "reasoning_content": "hm", "content": "5"}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "prompt": [ASKED],
        "chosen": [{"role": "assistant", "content": "Rain."}],
        "rejected": [{"role": "assistant", "content": "?"}],
    },
]


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return make_bytes_tokenizer()


def loaded(path):
    return [record.row for record in read(path).good("error")]


def written(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(trainer, dataset, tokenizer):
    """What the trainer makes of a dataset, without a model."""
    me = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return trainer._prepare_dataset(me, dataset, tokenizer, args, "train")


@pytest.mark.parametrize("template", TEMPLATES)
def test_dpo_ids_are_trls_from_the_source_and_from_the_export(tmp_path, bytes_tokenizer, template):
    """Row by row: prompt, chosen and rejected as DPOTrainer makes them of the export, which is read as `datasets` reads it."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    bytes_tokenizer.chat_template = TEMPLATES[template]
    rows = loaded(written(tmp_path / "rows.jsonl"))
    export(tmp_path / "out", [ExportRow(row, row.row_id) for row in rows])
    out = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    of_trl = prepared(trl.DPOTrainer, out, bytes_tokenizer)
    for row, theirs in zip(rows, of_trl, strict=True):
        ours = encode(row, bytes_tokenizer, Limits())
        for side in ("chosen", "rejected"):
            encoded = getattr(ours, side)
            assert encoded.ids.tolist() == theirs["prompt_ids"] + theirs[f"{side}_ids"]
            assert encoded.start == len(theirs["prompt_ids"])
    text = bytes_tokenizer.decode(encode(rows[0], bytes_tokenizer).chosen.ids)
    if template == "tools":
        assert '<call>weather{"city": "Oslo", "days": 2}</call>' in text and '"default": null' in text
        assert "<think>2 + 2 = 4</think>4</s>" in bytes_tokenizer.decode(encode(rows[2], bytes_tokenizer).chosen.ids)


def test_sft_ids_are_trls(tmp_path, bytes_tokenizer):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    from trl.data_utils import _tokenize, common_prefix_length

    bytes_tokenizer.chat_template = TEMPLATES["tools"]
    given = [
        {"messages": [*row["prompt"], *row["chosen"]]}
        | {k: v for k, v in row.items() if k in ("tools", "chat_template_kwargs")}
        for row in ROWS
    ]
    rows = loaded(written(tmp_path / "rows.jsonl", given))
    assert all(isinstance(row, Example) for row in rows)
    export(tmp_path / "out", [ExportRow(row, row.row_id) for row in rows])
    out = datasets.load_dataset("parquet", data_files=str(tmp_path / "out/data/*.parquet"), split="train")
    for row, exported in zip(rows, out, strict=True):
        ours = encode(row, bytes_tokenizer)
        arguments = {"tools": exported["tools"], **exported["chat_template_kwargs"]}
        whole = _tokenize(bytes_tokenizer, exported["prompt"] + exported["completion"], **arguments)["input_ids"]
        prompt = _tokenize(bytes_tokenizer, exported["prompt"], add_generation_prompt=True, **arguments)["input_ids"]
        assert ours.ids.tolist() == whole and ours.start == common_prefix_length(prompt, whole)


def test_rows_are_the_same_in_every_kind_of_file(tmp_path):
    """As JSON lines; as parquet, where Arrow gives every message all keys; as an export of ours, which is read again. Only a default of null, that
    Arrow cannot tell from no default, is lost in plain parquet.
    """
    datasets = pytest.importorskip("datasets")
    no_default = json.loads(json.dumps(ROWS).replace(', "default": null', ""))
    as_struct = [
        {**row, "tools": row.get("tools") or None, "chat_template_kwargs": row.get("chat_template_kwargs")}
        for row in no_default
    ]
    for row in as_struct:  # Arrow has one type a key
        row["tools"] = json.dumps(row["tools"]) if isinstance(row["tools"], list) else row["tools"]
        for turn in [turn for name in ("prompt", "chosen", "rejected") for turn in row[name]]:
            turn["content"] = (
                "".join(part["text"] for part in turn["content"])
                if isinstance(turn["content"], list)
                else turn["content"]
            )
            for call in turn.get("tool_calls", ()):
                given = call["function"]["arguments"]
                call["function"]["arguments"] = json.loads(given) if isinstance(given, str) else given
    rows = loaded(written(tmp_path / "rows.jsonl", as_struct))
    datasets.Dataset.from_list(as_struct).to_parquet(tmp_path / "rows.parquet")
    assert loaded(tmp_path / "rows.parquet") == rows
    datasets.Dataset.from_list(as_struct).save_to_disk(tmp_path / "saved")
    assert loaded(tmp_path / "saved") == rows
    rows = loaded(written(tmp_path / "rows.jsonl"))
    export(tmp_path / "out", [ExportRow(row, row.row_id) for row in rows])
    assert loaded(tmp_path / "out") == loaded(tmp_path / "out" / "data" / "train-00000.parquet") == rows


def test_the_id_of_a_row_of_roles_and_texts_is_what_it_was():
    """Values that are stored under it stay its own. What is beyond the texts makes another row, the order of keys in it too."""
    plain = (
        ({"role": "user", "content": "a"},),
        ({"role": "assistant", "content": "b"},),
        ({"role": "assistant", "content": "c"},),
    )
    assert Pair(*plain).row_id == "5399dea31ac00cd47b03"
    with_tools = Pair(*plain, template_args='{"tools": [1]}')
    calls = [
        Pair(plain[0], ({**plain[1][0], "tool_calls": [call]},), plain[2])
        for call in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    ]
    assert len({Pair(*plain).row_id, with_tools.row_id, *(row.row_id for row in calls)}) == 4


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "part of type 'image_url' at turn 1, which no pass reads"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}, "part of type 'input_audio'"),
        ({"role": "user", "content": None}, "without text content at turn 1: null"),
    ],
)  # fmt: skip
def test_what_no_pass_reads_is_refused_by_name(tmp_path, message, said):
    path = written(tmp_path / "rows.jsonl", [{**ROWS[3], "prompt": [message]}])
    with pytest.raises(ValidationError, match="rows.jsonl, row 1") as error:
        loaded(path)
    assert said in str(error.value)


def test_settings_of_the_template_itself_are_no_rows(tmp_path):
    path = written(tmp_path / "rows.jsonl", [{**ROWS[3], "chat_template_kwargs": {"tokenize": True}}])
    with pytest.raises(ValidationError, match="'chat_template_kwargs' is with 'tokenize'"):
        loaded(path)


def test_the_line_keeps_rows_whole_and_says_what_a_template_leaves_out(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    tokenizer = make_tokenizer(template=True)
    tokenizer.chat_template = TEMPLATES["plain"]
    tokenizer.save_pretrained(make_llama(tmp_path / "model", seed=0, context=1024))
    written(tmp_path / "rows.jsonl")
    raw = {
        "kind": "preference",
        "source": "rows.jsonl",
        "models": {"reference": "model"},
        "engine": {"device": "cpu"},
        "scores": ["edit_distance"],
        "select": {},
        "export": {"to": "out"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    from curate.console import Progress

    result = curate.run(tmp_path / "recipe.yaml", progress=Progress())
    said = " ".join(capsys.readouterr().err.split())
    assert "leaves out `tool_calls` of the reply in 1 of 4 rows" in said
    assert "leaves out `reasoning_content` of the reply in 1 of 4 rows" in said
    rows = loaded(tmp_path / "rows.jsonl")
    store = result.store
    ids = store.row_ids_of(kind="preference")
    assert list(store.iter_rows(ids)) == rows
    out = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    assert out[0]["tools"] == [TOOL] and out[3]["tools"] is None and out[3]["chat_template_kwargs"] == {}
    assert out[0]["chosen"] == ROWS[0]["chosen"] and out[1]["prompt"] == ROWS[1]["prompt"]
    assert out[2]["chat_template_kwargs"] == {"enable_thinking": False}
    counts = store.sql("SELECT chosen_tokens FROM scored ORDER BY position")["chosen_tokens"]
    assert np.isfinite(counts.to_numpy()).all()


def test_a_server_is_given_the_tools_the_settings_and_calls_in_its_own_form(tmp_path):
    """Messages go to the server as they are, a call's arguments as JSON text there; calls that it answers with stand in the answer's text."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "answer": "4"}
        | {k: v for k, v in row.items() if k in ("tools", "chat_template_kwargs")}
        for row in ROWS[1:3]
    ]
    written(tmp_path / "rows.jsonl", rows)
    with Served() as server:
        raw = {
            "kind": "sft",
            "source": "rows.jsonl",
            "server": {"url": server.url},
            "engine": {"sampler": "openai"},
            "sampling": {"samples": 1, "temperature": 1.0, "max_new_tokens": 8, "grader": "number"},
            "scores": ["accuracy"],
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
        curate.run(tmp_path / "recipe.yaml")
        first, second = sorted(server.sampled, key=lambda request: "tools" not in request)
    assert first["tools"] == [TOOL, OTHER] and "chat_template_kwargs" not in first
    assert first["messages"][1]["tool_calls"][0]["function"] == {"name": "clock", "arguments": '{"zone": "UTC"}'}
    assert first["messages"][2] == {"role": "tool", "name": "clock", "content": "12:00", "tool_call_id": "call_0"}
    assert "tools" not in second and second["chat_template_kwargs"] == {"enable_thinking": False}
    assert (
        _sent([{"role": "assistant", "content": None, "tool_calls": [CALL]}])[0]["tool_calls"][0]["function"][
            "arguments"
        ]
        == '{"city": "Oslo", "days": 2}'
    )
    call = SimpleNamespace(function=SimpleNamespace(name="weather", arguments='{"city": "Oslo"}'))
    said = _text(SimpleNamespace(content="Let me see.", tool_calls=[call]))
    assert said.splitlines() == ["Let me see.", json.dumps({"name": "weather", "arguments": '{"city": "Oslo"}'})]


def test_both_responses_and_perturbed_rows_keep_what_the_template_is_given(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = loaded(written(tmp_path / "rows.jsonl"))
    export(tmp_path / "out", [ExportRow(row, row.row_id) for row in rows], format="extend")
    out = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    assert len(out) == 8 and out[0]["tools"] == out[1]["tools"] == [TOOL] and out[0]["completion"] == ROWS[0]["chosen"]
    row = Example(rows[0].prompt, rows[0].chosen, "4", template_args=rows[0].template_args)
    (changed,) = Perturbation("f", "1", lambda problem, answer: problem + " Now?", False).of(row)
    assert changed.template_args == row.template_args


def test_tools_that_come_late_and_turns_that_differ_in_what_is_noted_of_them(tmp_path):
    late = [ROWS[3]] * 201 + [ROWS[0], ROWS[2]]
    conversations = [
        {"messages": [*row["prompt"], *row["chosen"]]}
        | {k: row[k] for k in ("tools", "chat_template_kwargs") if k in row}
        for row in late
    ]
    rows = loaded(written(tmp_path / "rows.jsonl", conversations))
    assert [bool(row.template_args) for row in rows[-3:]] == [False, True, True]
    said = [{"role": "assistant", "content": text} for text in ("a", "b")]
    pair = {
        name: [ASKED | {"turn_id": i}, reply]
        for i, (name, reply) in enumerate(zip(("chosen", "rejected"), said, strict=True))
    }
    (row,) = loaded(written(tmp_path / "pairs.jsonl", [pair]))
    assert row.chosen == (said[0],) and row.rejected == (said[1],)
