"""How large, deep and packed an input may be: a hostile one is one sentence, soon, and in little memory."""

from __future__ import annotations

import gzip
import json
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.data.reading import load
from curate.errors import UsageError, ValidationError
from curate.passes.loading.header import read_header
from curate.recipe.bounds import DEPTH, json_value, read_object
from curate.recipe.load import load_recipe

BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300))
HOSTILE = {
    BILLION: r"line 6, column \d+: not valid YAML: 597,871 values, its aliases written out",
    MERGES: "values, its aliases written out",
    CHAIN: f"more than {DEPTH} deep, its aliases written out",
    "kind: &a [*a]\n": "line 1, column 7: not valid YAML: an alias stands inside of what it is an alias of",
    "kind: " + "[" * 5000 + "]" * 5000: f"lists and mappings stand more than {DEPTH} deep",
    "kind: " + "{a: " * 3000: f"lists and mappings stand more than {DEPTH} deep",
    "kind: !!python/object/apply:os.system [id]\n": "the tag !!python/object/apply:os.system is not taken here",
    "kind: !!timestamp 2001-99-99\n": "the tag !!timestamp is not taken here",
    "kind: !!int x\n": "'x' cannot be read as int",
    "kind: " + "9" * 5000: "line 1, column 7: not valid YAML: '9+' cannot be read as a number",
    "kind: sft\nengine: {seed: " + "9" * 400 + "}\n": "line 2: engine.seed: a whole number of 400 digits",
    "kind: sft\nforecast: {beta: .inf}\n": "line 2: forecast.beta: input should be a finite number",
    "kind: sft\nsource: " + "a" * 20_000: "line 2: source.path: wanted a path: at most 4,096 bytes",
    'kind: sft\nstore: "a\\0b"\n': "line 2: store: wanted a path: no line break, tab or NUL",
    'kind: sft\nmodels: {reference: "a\\nb"}\n': "line 2: models.reference: wanted a path",
    "\xff": "not UTF-8 text",
    "x" * (1 << 21): "larger than 1 MiB",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12].strip())
def test_a_hostile_recipe_is_refused_in_one_sentence(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=HOSTILE[text]) as error:
        load_recipe(file)
    assert len(str(error.value)) < 500


def test_aliases_are_still_a_way_to_write_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "kind: sft\nsource: &rows {path: a.jsonl, columns: {prompt: q}}\nheldout: {<<: *rows, path: b.jsonl}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert recipe.heldout.path == "b.jsonl" and recipe.heldout.columns == {"prompt": "q"}


def test_a_long_text_of_few_shots_is_no_path(tmp_path):
    from curate.plan.identity import few_shot_text

    text = "Question: " + "one and one is two. " * 30
    assert few_shot_text(load_recipe({"kind": "sft", "sampling": {"few_shot": text}})) == text


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def zeros(path, start: bytes, fill: bytes, end: bytes = b""):
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(160):
            file.write(fill * (1 << 20))
        file.write(end)
    return path


@pytest.mark.parametrize(
    "name, start, fill",
    [
        ("zeros.jsonl.gz", b"", b"\0"),
        ("string.jsonl.gz", b'{"prompt": "', b"a"),
        ("array.json.gz", b'[{"prompt": "', b"a"),
        ("object.json.gz", b'{"prompt": "', b"a"),
        ("cell.csv.gz", b"prompt,completion\n", b"a"),
        ("quoted.csv.gz", b'prompt,completion\n"', b"a"),
    ],
)
def test_a_packed_file_of_nothing_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name, start, fill):
    monkeypatch.setattr("curate.data.files.ROW", 1 << 20)
    monkeypatch.setattr("curate.data.unpacking.PACKED", 8 << 20)
    monkeypatch.setattr("curate.data.unpacking.RATIO", 100)  # compresslevel 1 packs less
    before = peak()
    with pytest.raises(ValidationError, match="unpacks to|longer than|larger than field limit") as error:
        load(zeros(tmp_path / name, start, fill))
    assert peak() - before < 64 and len(str(error.value)) < 600


def test_a_dictionary_is_not_written_out_for_every_row_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("curate.data.unpacking.PACKED", 8 << 20)
    monkeypatch.setattr("curate.data.files.DECODED", 16 << 20)
    long = "a" * (4 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array([long]))
    pq.write_table(
        pa.table({"prompt": column, "completion": ["x"] * 5000}), tmp_path / "rows.parquet", compression="zstd"
    )
    before = peak()
    with pytest.raises(ValidationError, match=r"rows.parquet: it unpacks to \d+ times its size"):
        load(tmp_path / "rows.parquet")
    assert peak() - before < 300


def test_a_row_that_is_too_long_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("curate.data.files.ROW", 1000)
    rows = [{"prompt": "q" * n, "completion": "a"} for n in (1, 2000, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [len(row.prompt) for row in load(tmp_path / "rows.jsonl", on_bad_row="drop")] == [1, 3]
    with pytest.raises(ValidationError, match="row 2: line 2 is longer than"):
        load(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("value", ["[" * 500 + "]" * 500, '{"a":' * 200 + "1" + "}" * 200, "9" * 5000])
@pytest.mark.parametrize("form", ["rows.jsonl", "rows.json"])
def test_deep_rows_and_long_numbers_are_said(tmp_path, form, value):
    row = f'{{"prompt": "q", "completion": "a", "more": {value}}}'
    (tmp_path / form).write_text(f"[{row}]" if form.endswith("json") else f"{row}\n")
    with pytest.raises(ValidationError, match="deep in each other|digits"):
        load(tmp_path / form)


def test_json_is_read_as_the_standard_library_reads_it():
    text = json.dumps({"a": [1, 2.5, "[[{{" * 200, None, True], "b": {"c": []}})
    assert json_value(text) == json.loads(text) == json_value(text.encode())
    assert json_value("[" * DEPTH + "]" * DEPTH)
    for wrong in ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "[" * 100_000, "9" * 5000, "{", ""):
        with pytest.raises(ValueError):
            json_value(wrong)


@pytest.mark.parametrize(
    "held", [b"\xff", b"[]", b"null", b"3", b'{"a": ', b"[" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b""]
)
def test_what_is_no_object_is_a_value_error(tmp_path, held):
    (tmp_path / "x.json").write_bytes(held)
    with pytest.raises(ValueError):
        read_object(tmp_path / "x.json")


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [[], {"a": 1}, {"a": []}, {"a": {}}, {"a": {**ENTRY, "shape": "x"}}, {"a": {**ENTRY, "shape": [-1]}}, {"a": {**ENTRY, "shape": [True]}},
     {"a": {**ENTRY, "data_offsets": [4, 0]}}, {"a": {**ENTRY, "data_offsets": [0, 4.0]}}, {"a": {**ENTRY, "data_offsets": None}}],
)  # fmt: skip
def test_a_header_of_other_types_is_none(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ValueError):
        read_header(tmp_path / "m.safetensors")


def test_pickles_are_read_where_the_recipe_allows_it(tmp_path):
    import torch

    import curate
    from tests.tiny_models import make_llama

    folder = make_llama(tmp_path / "model", seed=1)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "kind": "sft",
        "source": str(tmp_path / "rows.jsonl"),
        "store": str(tmp_path / "store"),
        "scores": ["target_nll"],
    }
    raw |= {"models": {"reference": str(folder)}, "engine": {"device": "cpu"}}
    with pytest.raises(UsageError, match="its weights are pickles .pytorch_model.bin.*models.allow_pickle: true"):
        curate.run(raw)
    raw["models"]["allow_pickle"] = True
    assert curate.run(raw).measured


def test_an_error_of_a_key_says_the_file_and_the_line(tmp_path):
    import curate
    from tests.tiny_models import make_llama

    make_llama(tmp_path / "model", seed=1)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a", "topic": 1}\n')
    text = "kind: sft\nsource: rows.jsonl\nmodels: {reference: model}\nscores:\n- target_nll\n- target_nl\n"
    text += "select:\n  where: true\n  order_by: target_nl\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"recipe.yaml, line 6: scores: .*did you mean 'target_nll'"):
        curate.run(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(text.replace("- target_nl\n", ""))
    wanted = r"recipe.yaml, line 8: select.order_by: no column 'target_nl'; did you mean 'target_nll'"
    with pytest.raises(UsageError, match=wanted) as error:
        curate.run(tmp_path / "recipe.yaml")
    assert str(error.value).count("recipe.yaml") == 1
    with pytest.raises(UsageError, match=r"recipe.yaml: select.order_by: no column 'x'"):
        curate.run(tmp_path / "recipe.yaml", set={"select.order_by": "x"})


@pytest.mark.parametrize("name", ["n\0m", "\0", "\ud800", ""])
def test_a_column_whose_name_no_table_takes_is_said(tmp_path, name):
    row = {"prompt": "q", "completion": "a", "n": 1, name: 2, "unnamed": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        ValidationError, match="row 1: a column called .*, expected names that are not empty, without NUL"
    ):
        load(tmp_path / "rows.jsonl")


def test_odd_columns_reach_the_store_and_come_back(tmp_path):
    from curate.data.reading import read
    from curate.store import Store

    odd = {
        "big": 10**400,
        "deep": json.loads("[" * 90 + "1" + "]" * 90),
        "": 7,
        "k" * 5000: 1,
        "a\nb": 2,
        "nul": "a\0b",
        "inside": {"a\0": 1},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", **odd}) + "\n")
    store = Store(tmp_path / "store", create=True)
    reading = read(tmp_path / "rows.jsonl")
    store.add_source("a", "1", reading.good())
    assert "A column without a name is called `unnamed` here." in reading.notes()
    row = store.sql("SELECT * FROM scored").row(0, named=True)
    assert (
        row["big"] == "1" + "0" * 400
        and row["unnamed"] == 7
        and row["k" * 5000] == 1
        and row["a\nb"] == 2
        and row["nul"] == "a\0b"
    )


@pytest.mark.parametrize("said", [[{}], "Llama", 3, {"a": 1}])
def test_architectures_of_other_types_are_said(tmp_path, said):
    from curate.errors import BrokenCheckpoint
    from curate.models.layouts import check_config

    with pytest.raises(BrokenCheckpoint, match="architectures is .*, expected a list of names"):
        check_config(tmp_path, {"model_type": "llama", "architectures": said})


@pytest.mark.parametrize(
    "head",
    ["a: " + "[" * 2000, "a: " + "{a: " * 2000, "{a: &a [*a]}", "{{}: 1}", "{" + BILLION.replace("\n", ", ") + "}"],
)
def test_a_hostile_head_of_a_card_stands_below_as_text(head):
    from curate.data.card import Card, card_text

    shown = {"split": "train", "n_rows": 3, "n_dropped": 0, "kind": "sft", "layout": "x"}
    text = card_text(Card(), existing=f"---\n{head}\n---\nmine\n", **shown)
    assert "The head that README.md had is no YAML" in text and head in text and "mine" in text


@pytest.mark.parametrize("held, said", [(b"\xff\xfe", "not UTF-8 text"), (b"x" * (1 << 21), "larger than 1 MiB")])
def test_texts_of_a_person_are_short_and_utf8(tmp_path, held, said):
    from curate.data.export import old_card
    from curate.plan.identity import few_shot_text

    (tmp_path / "shots.txt").write_bytes(held)
    with pytest.raises(ValidationError, match=said):
        old_card(tmp_path / "shots.txt")
    with pytest.raises(UsageError, match=f"sampling.few_shot: .*{said}"):
        few_shot_text(load_recipe({"kind": "sft", "sampling": {"few_shot": str(tmp_path / "shots.txt")}}))


@pytest.mark.parametrize(
    "held, said",
    [(b"", "no rows at all.*Write or fetch it again"), (b"\xff\xfe", "cannot be read|can be read. Name another")],
)
def test_a_file_that_gives_no_row_says_what_next(tmp_path, held, said):
    (tmp_path / "rows.jsonl").write_bytes(held)
    with pytest.raises(ValidationError, match=said):
        load(tmp_path / "rows.jsonl")
    with pytest.raises(ValidationError, match="no such file or folder.*Name a file, a folder, a glob"):
        load(tmp_path / "nothing.parquet.xyz" / "x.csv")
    (tmp_path / "recipe.yaml").write_bytes(b"")
    with pytest.raises(UsageError, match="found nothing. Start one with `curate init"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_lone_model_as_checkpoints_is_told_where_it_belongs(tmp_path):
    from curate.errors import ModelError
    from curate.models.training_folder import checkpoint_folders

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match="models.checkpoints: model is one model, not a run's folder.*models.reference"
    ):
        checkpoint_folders("model", tmp_path)
