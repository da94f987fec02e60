"""Exports: what every reader gets back, names that a trainer would take, weights, the card, and a kill at any moment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from curate.data import Card, ExportRow, distribution, export, load, read
from curate.data import export as export_function
from curate.data.card import card_text
from curate.data.replace import exchange, recover
from curate.errors import UsageError, ValidationError
from curate.rows import Example, Pair


def turn(role, content):
    return {"role": role, "content": content}


CHAT = Pair((turn("user", "u"),), (turn("assistant", "a"),), (turn("assistant", "b"),))


def pair(i, **columns):
    row = Pair(f"p{i}", f" a{i}", f" b{i}")
    return ExportRow(row, row.row_id, columns)


def exported(row, **columns):
    return ExportRow(row, row.row_id, columns)


def rows_of(folder, split="train"):
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    assert list(loaded) == [split]
    return loaded[split].to_list()


def test_every_reader_gets_the_same(tmp_path):
    import datasets
    import polars

    to = tmp_path / "out"
    kept = [pair(i, votes=i, names=["x", "y"], score=None if i else 0.5, note=None) for i in range(2500)]
    dropped = [
        ExportRow(pair(9000).row, "r1", {"votes": 1}, reason="drop_worst: ches"),
        ExportRow(None, "r2", reason="a bad row"),
    ]
    result = export(to, iter(kept), iter(dropped), split="test", card=Card(scores={"score": distribution([0.5, None])}))
    assert (result.n_rows, result.n_dropped, result.layout, result.renamed) == (2500, 2, "trl preference, standard", {})
    wanted = [
        {"prompt": k.row.prompt, "chosen": k.row.chosen, "rejected": k.row.rejected, "row_id": k.row_id, **k.columns}
        for k in kept
    ]
    assert rows_of(to, "test") == wanted
    assert polars.read_parquet(to / "data" / "*.parquet").to_dicts() == wanted
    assert datasets.load_dataset(str(to), split="test", cache_dir=str(tmp_path / "cache")).to_list() == wanted
    assert load(to, split="test") == [record.row for record in kept]
    left = polars.read_parquet(to / "dropped" / "*.parquet").to_dicts()
    assert [(row["row_id"], row["prompt"], row["votes"], row["reason"]) for row in left] == [
        ("r1", "p9000", 1, "drop_worst: ches"),
        ("r2", None, None, "a bad row"),
    ]


SHAPES = [
    # (row, format, layout, the text columns)
    (CHAT, "trl", "trl preference, conversational",
     {"prompt": [turn("user", "u")], "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]}),
    (CHAT, "prompt_completion", "prompt/completion, conversational", {"prompt": [turn("user", "u")], "completion": [turn("assistant", "a")]}),
    (CHAT, "messages", "messages, conversational", {"messages": [turn("user", "u"), turn("assistant", "a")]}),
    (Pair("p", " a", " b"), "prompt_completion", "prompt/completion, standard", {"prompt": "p", "completion": " a"}),
    (Example("p", " c"), "trl", "prompt/completion, standard", {"prompt": "p", "completion": " c"}),
    (Example("p", " c", answer="5"), "trl", "prompt/completion, standard", {"prompt": "p", "completion": " c", "answer": "5"}),
    (Example("p", " c"), "messages", "messages, conversational", {"messages": [turn("user", "p"), turn("assistant", " c")]}),
    (Example("p", None, answer="5"), "trl", "trl prompts, standard", {"prompt": "p", "answer": "5"}),
    (Example("p", "c", label=False), "trl", "trl unpaired preference, standard", {"prompt": "p", "completion": "c", "label": False}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "format", "layout", "texts"), SHAPES)
def test_formats(tmp_path, row, format, layout, texts):
    result = export(tmp_path / "out", [exported(row)], format=format)
    assert result.layout == layout
    assert rows_of(tmp_path / "out") == [texts | {"row_id": row.row_id}]
    if "rejected" in texts or (row.kind == "sft" and format == "trl" and "completion" in texts):
        assert load(tmp_path / "out") == [row]  # an export can be read again as what it was


def test_both_responses_of_a_pair(tmp_path):
    """ "extend": two prompt/completion rows a pair, with its id, its columns and its weight."""
    result = export(tmp_path / "out", [pair(1, side="mine", votes=3)], format="extend")
    assert (result.n_rows, result.layout) == (2, "prompt/completion, standard")
    rows = rows_of(tmp_path / "out")
    of_pair = pair(1).row
    assert [(r["prompt"], r["completion"], r["side"]) for r in rows] == [
        (of_pair.prompt, of_pair.chosen, "chosen"),
        (of_pair.prompt, of_pair.rejected, "rejected"),
    ]
    assert all((r["source_side"], r["votes"], r["row_id"]) == ("mine", 3, pair(1).row_id) for r in rows)
    chat = export(tmp_path / "chat", [exported(CHAT)], format="extend")
    assert chat.layout == "prompt/completion, conversational"
    assert [r["completion"] for r in rows_of(tmp_path / "chat")] == [[turn("assistant", "a")], [turn("assistant", "b")]]


def test_names_that_a_trainer_takes(tmp_path):
    columns = {"ref_chosen_logps": -5.0, "label": 1, "messages": "m", "source_label": 2, "tools": None, "votes": 3}
    result = export(tmp_path / "out", [pair(1, **columns)], format="trl")
    assert result.renamed == {
        "ref_chosen_logps": "source_ref_chosen_logps",
        "label": "source_source_label",
        "messages": "source_messages",
        "tools": "source_tools",
    }
    [row] = rows_of(tmp_path / "out")
    assert {name: row[name] for name in row if name not in ("prompt", "chosen", "rejected", "row_id")} == {
        "source_ref_chosen_logps": -5.0,
        "source_source_label": 1,
        "source_messages": "m",
        "source_label": 2,
        "source_tools": None,
        "votes": 3,
    }
    assert "Column `label` is called `source_source_label` here" in (tmp_path / "out" / "README.md").read_text()


def test_a_renamed_column_never_falls_on_one_of_another_row(tmp_path):
    """Only the second row has a `source_text` of its own: the first one's `text` takes another name in both."""
    records = [pair(1, text="t1", side="s1"), pair(2, text="t2", source_text="own")]
    result = export(tmp_path / "out", records, [pair(3, reason="mine", source_reason="r"), pair(4, source_side="x")])
    assert result.renamed == {"text": "source_source_text", "reason": "source_source_reason"}
    rows = [(r["source_source_text"], r["source_text"], r["side"]) for r in rows_of(tmp_path / "out")]
    assert rows == [("t1", None, "s1"), ("t2", "own", None)]
    both = export(tmp_path / "both", [*records, pair(4, source_side="x")], format="extend")
    assert both.renamed == {"text": "source_source_text", "side": "source_source_side"}
    assert "`side` says which response the row has" in " ".join(both.notes)
    assert [r["source_side"] for r in rows_of(tmp_path / "both")] == [None] * 4 + ["x"] * 2


def test_columns_of_several_types(tmp_path):
    values = [1, 2.5, None] * 400
    mixed = [1, "a", None, [True]] * 300
    nested = [{"a": 1}, {"b": [None, "x"]}] * 600
    rows = [pair(i, number=values[i], mixed=mixed[i], nested=nested[i]) for i in range(1200)]
    result = export(tmp_path / "out", rows)
    found = rows_of(tmp_path / "out")
    assert [row["number"] for row in found] == values
    assert [row["mixed"] for row in found] == ["1", "a", None, "[true]"] * 300
    assert found[0]["nested"] == {"a": 1, "b": None}
    assert found[1]["nested"] == {"a": None, "b": [None, "x"]}
    assert result.notes == ("Column `mixed` holds values of several types and is kept as text.",)


def test_weights(tmp_path):
    weighted = [ExportRow(pair(i).row, str(i), weight=weight) for i, weight in enumerate([0.5, 0.0, 1.5, 1.0])]
    export(tmp_path / "out", weighted)
    assert [row["weight"] for row in rows_of(tmp_path / "out")] == [0.5, 0.0, 1.5, 1.0]
    result = export(tmp_path / "copies", weighted, resample=60, seed=3)
    ids = [row["row_id"] for row in rows_of(tmp_path / "copies")]
    assert (result.n_rows, [ids.count(str(i)) for i in range(4)]) == (60, [10, 0, 30, 20])  # 60 * weight / 3, exactly
    assert "do not weight them again" in result.notes[0]


@pytest.mark.parametrize("seed", range(5))
def test_resampling_gives_each_row_its_share_to_within_one(tmp_path, seed):
    weights = [0.31, 1.7, 0.02, 0.9, 2.2, 0.4]
    weighted = [ExportRow(pair(i).row, str(i), weight=weight) for i, weight in enumerate(weights)]
    again = [
        export(tmp_path / "out", weighted, resample=7, seed=seed)
        and [row["row_id"] for row in rows_of(tmp_path / "out")]
        for _ in "ab"
    ]
    assert again[0] == again[1]
    assert len(again[0]) == 7
    for i, weight in enumerate(weights):
        assert abs(again[0].count(str(i)) - 7 * weight / sum(weights)) < 1


UNUSABLE = [
    ([1.0, None], "unknown in 1 (row 1)"),
    ([1.0, -2.0, -0.5, None], "below 0 in 2 (row 1, row 2); unknown in 1 (row 3)"),
    ([float("inf"), 1.0, float("nan")], "not finite in 2 (row 0, row 2)"),
    ([-1.0] * 5, "below 0 in 5 (row 0, row 1, row 2, …)"),
    ([0.0, 0.0], "every weight of the 2 rows is 0"),
]


@pytest.mark.parametrize("resample", [None, 4])
@pytest.mark.parametrize(("weights", "said"), UNUSABLE)
def test_weights_that_cannot_be_used(tmp_path, weights, said, resample):
    """Whether they stand in a column or rows are drawn by them: a trainer would take them as they are."""
    weighted = [ExportRow(pair(i).row, str(i), weight=weight) for i, weight in enumerate(weights)]
    with pytest.raises(ValidationError, match=re.escape(said)):
        export(tmp_path / "out", weighted, resample=resample)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_not_drawn_without_weights(tmp_path):
    with pytest.raises(ValidationError, match="unknown in 2"):
        export(tmp_path / "out", [pair(1), pair(2)], resample=4)


REFUSED = [
    ([], "nothing to export"),
    ([exported(Pair("p", "a", "b")), exported(CHAT)], "is conversational, the rows before it are standard"),
    ([exported(Example("p", "c")), exported(Example("p", None, answer="5"))], "has no completion"),
    ([pair(1), ExportRow(None, "r2")], "row r2: no text is known"),
    ([ExportRow(None, "r2")], "row r2: no text is known"),
]


@pytest.mark.parametrize(("rows", "said"), REFUSED)
def test_rows_that_cannot_be_exported_leave_the_old_export(tmp_path, rows, said):
    to = tmp_path / "out"
    export(to, [pair(7)])
    with pytest.raises(ValidationError, match=said):
        export(to, rows)
    assert rows_of(to)[0]["prompt"] == "p7"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_never_onto_a_source_or_a_foreign_folder(tmp_path):
    to = tmp_path / "out"
    export(to, [pair(1)])
    source = read(to).sources[0].path
    with pytest.raises(UsageError, match="which would be overwritten"):
        export(to, [pair(2)], sources=[None, source])
    with pytest.raises(UsageError, match="which would be overwritten"):
        export(to, [pair(2)], sources=[to / "data" / "train-00000.parquet"])
    with pytest.raises(UsageError, match="lies inside the source"):
        export(to / "deeper", [pair(2)], sources=[source])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="a folder that curate did not write"):
        export(tmp_path / "mine", [pair(2)])
    with pytest.raises(UsageError, match="is a file"):
        export(tmp_path / "mine" / "thesis.txt", [pair(2)])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_export_replaces_the_one_before(tmp_path):
    to = tmp_path / "out"
    export(to, [pair(1)], split="test")
    (to / "notes").mkdir()
    (to / "notes" / "mine.txt").write_text("kept")
    export(to, [pair(2)])
    assert [row["prompt"] for row in rows_of(to)] == ["p2"]
    assert sorted(entry.name for entry in to.iterdir()) == [
        ".curate-export", "README.md", "data", "dataset_dict.json", "dropped", "notes", "train",
    ]  # fmt: skip
    assert (to / "notes" / "mine.txt").read_text() == "kept"
    assert [entry.name for entry in to.parent.iterdir()] == ["out"]


DYING = """
import os, sys
from pathlib import Path
from curate.data import replace

count = 0
def dying(function):
    def wrapped(*arguments, **options):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os._exit(9)
        return function(*arguments, **options)
    return wrapped

exchange = replace.exchange if sys.argv[3] == "in one step" else lambda first, second: False
replace.exchange, Path.rename, replace.shutil.rmtree = dying(exchange), dying(Path.rename), dying(replace.shutil.rmtree)
folder = Path(sys.argv[1])
replace.replace_folder(folder / ".out.new", folder / "out")
"""


@pytest.mark.parametrize("way", ["in one step", "in two"])
def test_a_kill_leaves_the_old_export_or_the_new_one(tmp_path, way):
    """The process dies before each operation of the replacement in turn; what is there afterwards is whole, and replacing works."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for step in range(1, 9):
        for name, text in (("out", "old"), (".out.new", "new")):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            (tmp_path / name / "train").mkdir(parents=True)
            (tmp_path / name / "train" / "rows").write_text(text)
        command = [sys.executable, "-c", DYING, str(tmp_path), str(step), way]
        ended = subprocess.run(command, env=environment, check=False).returncode
        assert ended in (0, 9)
        recover(tmp_path / "out")
        assert (tmp_path / "out" / "train" / "rows").read_text() in (["new"] if ended == 0 else ["old", "new"])
        if ended == 0:
            break
    assert (ended, step) == (0, 3 if way == "in one step" else 6)


def test_what_a_kill_left_behind_is_cleared(tmp_path):
    (tmp_path / ".out.new" / "data").mkdir(parents=True)
    (tmp_path / ".out.new" / "data" / "half-written").touch()
    export(tmp_path / "out", [pair(1)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "data" / "half-written").exists()


def test_exchange_swaps_in_one_step_or_says_no(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was-{name}").touch()
    swapped = exchange(tmp_path / "a", tmp_path / "b")
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["was-b" if swapped else "was-a"]


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    to = tmp_path / "out"
    export(to, [pair(1)])

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[export_function.__module__], "write_parquet", full)
    with pytest.raises(ValidationError, match="No space left on device. What was there before is untouched"):
        export(to, [pair(2)])
    assert rows_of(to)[0]["prompt"] == "p1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_place_where_no_folder_can_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValidationError, match="export to .*file/out failed: Not a directory.*choose another"):
        export(tmp_path / "file" / "out", [pair(1)])


def card(folder):
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card(tmp_path):
    to = tmp_path / "out"
    said = Card(
        title="Half of HH",
        sources={"data/pairs.jsonl": "abc123"},
        models={"reference": "models/stories260K (f00)"},
        recipe="kind: preference\n",
        counts={"rows in": 1000, "kept": 1},
        scores={"ches": distribution([1.0, 2.0, 4.0, None])},
        license="mit",
    )
    export(to, [pair(1)], card=said)
    head, body = card(to)
    assert head == {
        "license": "mit",
        "tags": ["curate", "trl", "preference", "dpo"],
        "size_categories": ["n<1K"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    for line in (
        "# Half of HH",
        "| data/pairs.jsonl | abc123 |",
        "| reference | models/stories260K (f00) |",
        "| rows in | 1,000 |",
        "| ches | 4 | 1 | 1 | 1.1 | 1.5 | 2 | 3 | 3.8 | 4 |",
        "```yaml\nkind: preference\n```",
    ):
        assert line in body


def test_the_card_merges_with_what_a_person_wrote(tmp_path):
    to = tmp_path / "out"
    export(to, [pair(1)], card=Card(license="mit"))
    text = (to / "README.md").read_text()
    mine = text.replace("license: mit", "license: apache-2.0\npretty_name: Mine").replace(
        "- curate\n", "- curate\n- mine\n"
    )
    (to / "README.md").write_text(mine.replace("# Curated dataset", "# My words\n\nbefore") + "\nafter\n")
    export(to, [pair(1), pair(2)], [ExportRow(pair(3).row, "x", reason="low")], card=Card(license="mit"))
    head, body = card(to)
    assert (head["license"], head["pretty_name"]) == ("apache-2.0", "Mine")
    assert sorted(head["tags"]) == ["curate", "dpo", "mine", "preference", "trl"]
    assert body.index("# My words") < body.index("before") < body.index("2 rows (trl preference") < body.index("after")
    assert body.count("curate: begin") == 1
    assert "1 rows (" not in body
    assert "1 dropped rows" in body


def test_distribution():
    assert distribution([None, 3.0, 1.0, float("nan")]) == {
        "rows": 4, "unknown": 2, "min": 1.0, "5%": 1.1, "25%": 1.5, "median": 2.0, "75%": 2.5, "95%": 2.9, "max": 3.0,
    }  # fmt: skip
    assert distribution([None])["median"] is None


def test_push(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **options: calls.append((name, options))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: calls.append(options))
    export(tmp_path / "out", [pair(1)], push_to_hub="me/curated")
    assert calls[0] == ("me/curated", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert calls[1]["allow_patterns"] == [
        *("README.md", "axolotl.yaml", "dataset_info.json", "trainer_args.json", "trl_trainers.py"),
        *("data/*", "dropped/*"),
    ]

    def refused(self, *arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    with pytest.raises(
        ValidationError, match=r"the export is in .*, but pushing it to me/curated failed \(ConnectionError: no route\)"
    ):
        export(tmp_path / "out", [pair(1)], push_to_hub="me/curated")


def test_a_card_without_a_head_is_kept_and_nothing_is_said_of_it(capfd):
    """huggingface_hub's card class warns of a card without YAML; nobody asked, and --quiet would not stop it."""
    text = card_text(
        Card(), existing="# Mine\n\nkept\n", split="train", n_rows=1, n_dropped=0, kind="sft", layout="trl sft"
    )
    assert text.startswith("---\n") and "# Mine\n\nkept\n" in text
    assert capfd.readouterr().err == ""
