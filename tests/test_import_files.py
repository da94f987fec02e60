"""What cells of imported files mean: nothing that cannot be read becomes unknown without a word."""

from __future__ import annotations

import gzip
import json

import pytest

import curate
from curate.errors import CurateError, UsageError, ValidationError
from curate.store import Store
from curate.store.importing.importing import import_file

MAP = {"row": "id", "step": "step", "accuracy": "acc"}
READ = "SELECT o.key, t.step, t.accuracy FROM trajectories t JOIN occurrences o USING (row_id) ORDER BY 1, 2"
WANTED = [("a", 9, 0.25), ("b", 10, None)]


def csv(*rows, mark=","):
    return "".join(mark.join(row) + "\n" for row in (("id", "step", "acc"), *rows))


JSON = [{"id": "a", "step": 9, "acc": 0.25}, {"id": "b", "step": 10, "acc": float("nan")}]
LINES = "".join(json.dumps(row) + "\n" for row in JSON)


@pytest.mark.parametrize("name, content", [
    ("x.csv", csv(("a", "9", "0.25"), ("b", "10", ""))),
    ("x.csv", "\ufeff" + csv(("a", "9.0", "0.25"), ("b", "10.0", "nan")).replace("\n", "\r\n")),
    ("x.csv", csv(('"a"', '"9"', '"0.25"'), ("b", "10", "-inf"))),
    ("x.csv", csv(("a", "checkpoint-9", "0.25"), ("b", "checkpoint-10", " "))),
    ("x.tsv", csv(("a", "9", "0.25"), ("b", "10", ""), mark="\t")),
    ("x.jsonl", "\ufeff" + LINES),
    ("x.jsonl", LINES.replace("\n", "\r\n\r\n")),
    ("x.jsonl", LINES.replace("0.25", '"0.25"').replace("NaN", "-Infinity")),
    ("x.json", "\ufeff" + json.dumps(JSON)),
    ("x.json", LINES),
    ("x.jsonl.gz", LINES),
    ("x.csv.gz", csv(("a", "9", "0.25"), ("b", "10", ""))),
])  # fmt: skip
def test_one_meaning_whatever_the_file(tmp_path, name, content):
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = import_file(tmp_path / "s", tmp_path / name, MAP)
    assert Store(tmp_path / "s").sql(READ).rows() == WANTED
    assert "accuracy in 1 of 2 lines" in str(found)


@pytest.mark.parametrize("name, content, says", [
    ("x.csv", csv(("a", '"1,000"', "1")), "x.csv, row 1, line 2: 'step' is 1,000, expected a step"),
    ("x.csv", csv(("a", "9", "1"), ("b", "-9", "1")), "x.csv, row 2, line 3: 'step' is -9, expected a step"),
    ("x.csv", csv(("a", "9.5", "1")), "'step' is 9.5, expected a step"),
    ("x.csv", csv(("a", "1.000", "1")), "'step' is 1.000, expected a step"),
    ("x.csv", csv(("a", "last", "1")), "'step' is last, expected a step"),
    ("x.csv", csv(("a", "", "1")), "'step' is empty"),
    ("x.csv", csv(("a", "9", '"1,000"')), "line 2: 'acc' is 1,000, expected a number as programs write it"),
    ("x.csv", csv(("a", "9", "85%")), "'acc' is 85%, expected a number"),
    ("x.csv", csv(("a", "9", "1"), ("a", "9", "1")), "row 1, line 2 and row 2, line 3 are about the same row, run and checkpoint"),
    ("x.csv", csv(("a", "9", "1"), ("a", "checkpoint-9", "1")), "'9' and 'checkpoint-9' of run 'x' are both of step 9"),
    ("x.csv", csv(("a", "9", "1")).replace("acc", "step"), "the header names 'step' twice"),
    ("x.csv", csv(("a", "9", "1", "2")), "line 2"),
    ("x.csv", csv(("a", "9", "1"), mark=";"), "Its cells are separated by ;"),
    ("x.csv", "id,step,acc\n", "no rows in this file"),
    ("x.jsonl", "\n" + LINES + "{", "line 4 is not JSON"),
    ("x.jsonl", LINES + '\n{"id": "c", "step": [1], "acc": 1}\n', r"line 4: 'step' is '\[1\]' \(str\), expected a step"),
    ("x.jsonl", LINES + '\n{"id": null, "step": 1, "acc": 1}\n', "line 4: 'id' is empty"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_line(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(CurateError, match=says):
        import_file(tmp_path / "s", tmp_path / name, MAP)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json"])
def test_utf_16_is_said(tmp_path, name):
    (tmp_path / name).write_text(LINES if "json" in name else csv(("a", "9", "1")), encoding="utf-16")
    with pytest.raises(ValidationError, match="not UTF-8"):
        import_file(tmp_path / "s", tmp_path / name, MAP)


@pytest.mark.parametrize("source", ["logs", "other", "third"])
@pytest.mark.parametrize("names", [("epoch-10", "epoch-9"), ("checkpoint-10", "checkpoint-9")])
def test_checkpoints_stand_in_their_order_whatever_the_source_is_called(tmp_path, source, names):
    """Row a learns from 9 to 10 and never forgets, row b forgets once."""
    later, earlier = names
    rows = [("a", later, "0.9"), ("a", earlier, "0.1"), ("b", later, "0.1"), ("b", earlier, "0.9")]
    (tmp_path / "names.csv").write_text(csv(*rows))
    mapping = {"row": "id", "checkpoint": "step", "accuracy": "acc"}
    found = import_file(tmp_path / "s", tmp_path / "names.csv", mapping, source=source)
    assert ("no step can be read from epoch-9, epoch-10: they are ordered by name" in str(found)) == (
        later == "epoch-10"
    )
    result = curate.run({"kind": "sft", "scores": ["forgetting_events"]}, store=tmp_path / "s")
    assert result.store.sql("SELECT forgetting_events FROM scored ORDER BY position").rows() == [(0.0,), (1.0,)]


def test_a_store_that_is_not_there_is_made_for_logs_alone(tmp_path):
    (tmp_path / "x.csv").write_text(csv(("a", "9", "1")))
    with pytest.raises(CurateError, match="no store there"):
        import_file(tmp_path / "s", tmp_path / "x.csv", {"acc": "acc"}, on="id")
    assert "There was no store" in str(import_file(tmp_path / "s", tmp_path / "x.csv", MAP))
    with pytest.raises(UsageError, match="perplexity= and nll= both give the column target_nll"):
        import_file(tmp_path / "s", tmp_path / "x.csv", {"row": "id", "perplexity": "acc", "nll": "acc"})
