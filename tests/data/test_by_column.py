"""Tables by columns, as pandas and `datasets` write JSON, against the rows they are; rows that look alike stay rows."""

from __future__ import annotations

import json

import pytest

from curate.data import load, read, validate
from curate.data.by_column import turned
from curate.errors import ValidationError
from curate.rows import Pair

ROWS = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(3)]
PAIRS = [Pair(**row) for row in ROWS]
LISTS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
TABLES = {
    "columns": {name: {str(i): cell for i, cell in enumerate(cells)} for name, cells in LISTS.items()},
    "columns, ids": {name: {f"id-{i}": cell for i, cell in enumerate(cells)} for name, cells in LISTS.items()},
    "index": {str(i): row for i, row in enumerate(ROWS)},
    "index, ids": {f"id-{i}": row for i, row in enumerate(ROWS)},
    "lists": LISTS,
    "split": {"columns": list(LISTS), "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]},
    "table": {"schema": {"fields": []}, "data": [{"index": i, **row} for i, row in enumerate(ROWS)]},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_by_columns_is_its_rows(tmp_path, name, indent):
    (tmp_path / "rows.json").write_text(json.dumps(TABLES[name], indent=indent))
    assert load(tmp_path / "rows.json") == PAIRS


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "records"])
def test_what_pandas_writes(tmp_path, orient):
    import datasets

    datasets.Dataset.from_list(ROWS).to_pandas().to_json(tmp_path / "rows.json", orient=orient)
    assert load(tmp_path / "rows.json") == PAIRS


def test_lists_that_a_program_holds():
    assert load(LISTS) == PAIRS


def test_a_table_among_lines_is_a_bad_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(LISTS) + "\n" + json.dumps(ROWS[0]) + "\n")
    (defect,) = validate(tmp_path / "rows.jsonl").defects
    assert "a table by columns (3 rows under prompt, chosen, rejected), expected one JSON object a line" in str(defect)


def test_rows_inside_an_object_are_named(tmp_path):
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps({"train": ROWS}, indent=indent))
        with pytest.raises(ValidationError, match=r"jq -c '\.train\[\]'"):
            read(tmp_path / "rows.json")


def message(role):
    return {"role": role, "content": role}


NO_TABLES = [
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"prompt": [message("user")], "chosen": [message("assistant")], "rejected": [message("assistant")]},
    {"conversations": [message("user")], "chosen": message("assistant"), "rejected": message("assistant")},
    {"chosen": message("assistant"), "rejected": message("assistant"), "prompt": message("user")},
    {"messages": [message("user"), message("assistant")]},
    {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
    {},
]


@pytest.mark.parametrize("row", NO_TABLES)
def test_a_row_is_no_table(row):
    assert turned(row) is None


def test_files_of_a_glob_come_in_natural_order(tmp_path):
    for number in (9, 10, 100, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    names = [source.name for source in read("part-*.jsonl", base=tmp_path).sources]
    assert names == [f"part-{number}.jsonl" for number in (1, 9, 10, 100)]
