"""Rows that are read many at once are those that are read one by one: ids, columns, their types, what is bad and what is said of them."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.data.blocks import Block
from curate.data.notes import Notes
from curate.data.reading import read
from curate.errors import ValidationError
from curate.rows import Example, Pair, content_id, text_ids
from curate.store import Store
from curate.workflow.read import _counted

ROWS = 8
ODD = [
    {"prompt": 'a\u2028\x7f\x01"\\/é😀', "chosen": " ü\n\t\r", "rejected": "b%s", "n": 2**70, "x": 1e22, "s": "\x1f%d"},
    {"prompt": "[{'role': 'user', 'content': 'hi'}]", "chosen": "a", "rejected": "b", "n": 1, "x": 0.1, "s": "x"},
    {"prompt": "p", "chosen": "same", "rejected": "same", "n": 1, "x": 0.1, "s": "x"},
    {"prompt": "  ", "chosen": "a", "rejected": "b", "n": 1, "x": 0.1, "s": "x"},
    {"prompt": "p", "chosen": [{"role": "assistant", "content": "m"}], "rejected": "b", "n": 1, "x": 0.1, "s": "x"},
    {"prompt": "p", "chosen": "a", "rejected": "b", "n": [1, {"a": None}], "x": float("nan"), "s": None},
    {"prompt": "p", "chosen": "a", "rejected": "b", "n": True, "x": None, "s": "\ud800"},
    {"prompt": "long", "chosen": "long it is", "rejected": " longer", "n": -3, "x": 7, "s": ""},
    {"prompt": "p", "chosen": "a", "rejected": "b", "input": "not in the prompt", "image": "x"},
    {"rejected": "b", "chosen": "a", "prompt": "p"},
]
PLAIN = {"prompt": "plain", "chosen": "a", "rejected": "b", "n": 1, "x": 0.5, "s": "t"}


def pairs(odd: dict, n: int = ROWS - 2) -> list[dict]:
    return [{**PLAIN, "prompt": f"plain {i}", "n": i} for i in range(n)] + [odd, PLAIN]


def kept(folder, pieces):
    """What a store has of these records."""
    notes = Notes()
    store = Store(folder, create=True)
    told = store.add_source("s", "f", _counted(pieces, lambda n: None, notes))
    with store.database.read() as con:
        tables = [
            con.sql(f"SELECT * FROM data.{t} ORDER BY ALL").fetchall()
            for t in ("rows", "occurrences", "source_columns")
        ]
    return told, tables, +notes.seen


def alike(tmp_path, file, some_blocks=True, **how):
    reading = read(file, **how)
    pieces = list(reading.blocks("drop"))
    assert any(isinstance(piece, Block) for piece in pieces) == some_blocks
    assert kept(tmp_path / "blocks", iter(pieces)) == kept(tmp_path / "rows", iter(read(file, **how)))
    return pieces


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("curate.data.reading.ROWS", ROWS)


def test_pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for odd in [*ODD, PLAIN] for row in pairs(odd)))
    pieces = alike(tmp_path, file)
    assert (
        sum(isinstance(piece, Block) for piece in pieces) == 3
    )  # those of odd characters and numbers, and the plain ones


def test_examples_of_text_tables_and_parquet(tmp_path):
    rows = [{"question": f"q{i}", "completion": f" c{i}", "score": str(i / 8), "name": f"{i:03}"} for i in range(6)]
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    alike(tmp_path / "csv", tmp_path / "rows.csv", kind="sft")
    pq.write_table(pa.Table.from_pylist([{**row, "tags": None, "n": 3} for row in rows]), tmp_path / "rows.parquet")
    alike(tmp_path / "parquet", tmp_path / "rows.parquet", kind="sft")
    answers = [
        {"prompt": "q", "completion": "so #### 3", "answer": "3"},
        {"prompt": "q", "completion": "4", "answer": "4"},
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    alike(tmp_path / "answers", tmp_path / "answers.jsonl", some_blocks=False, kind="sft")


def test_limits_and_bad_rows(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, [*[PLAIN] * ROWS, *pairs(ODD[2])])))
    assert [len(piece) for piece in read(file).blocks(limit=5)] == [5]
    with_bad = list(read(file).blocks("drop", limit=2 * ROWS - 1))
    assert len(with_bad) == ROWS and with_bad[-1].row is None and with_bad[-1].index == 2 * ROWS - 2
    with pytest.raises(ValidationError, match="'rejected' is"):
        list(read(file).blocks())


def test_ids_are_those_of_the_rows():
    texts = ['\x00\x1f"\\/\u2028é😀%s', "plain"]
    assert text_ids("preference", [texts, texts[::-1], ["x", "y"]]) == [
        Pair(a, b, c).row_id for a, b, c in zip(texts, texts[::-1], "xy", strict=True)
    ]
    assert text_ids("sft", [texts, texts, None, None]) == [Example(text, text).row_id for text in texts]
    assert text_ids("%", [["a"]]) == [content_id("%", "a")]
