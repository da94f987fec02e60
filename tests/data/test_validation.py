"""Every bad row is listed, duplicates are counted, the error for bad rows says what style.md asks for."""

from __future__ import annotations

import json

import pytest

from curate.data import load, read, validate
from curate.errors import UsageError, ValidationError

GOOD = [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(5)]
BOOL = {"prompt": "p", "chosen": " a", "rejected": True}
BLANK = {"prompt": "p", "chosen": "", "rejected": " b"}


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def of(rows):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "data/pairs.jsonl"

    return of


def test_the_error_of_bad_rows(source):
    path = source([*GOOD, BOOL, GOOD[0], BOOL])
    with pytest.raises(ValidationError) as caught:
        load(path)
    assert str(caught.value) == (
        "data/pairs.jsonl, row 6: 'rejected' is true (bool), expected text or messages.\n"
        "  2 of 8 rows are like this. Drop them with `--set source.on_bad_row=drop`, or list them with `curate validate data/pairs.jsonl`."
    )
    with pytest.raises(
        ValidationError,
        match=r"1 of 3 rows is like this, 2 are bad in all\. .*heldout\.on_bad_row=drop.*validate recipe\.yaml",
    ):
        list(read(source([BLANK, GOOD[0], BOOL])).good(setting="heldout", target="recipe.yaml"))


def test_dropping_bad_rows(source):
    bad = []
    reading = read(source([BOOL, GOOD[0], BLANK, GOOD[1]]))
    assert [record.index for record in reading.good("drop", bad=bad)] == [1, 3]
    assert [record.index for record in bad] == [0, 2]
    assert len(load(source([BOOL, *GOOD]), on_bad_row="drop")) == 5


def test_nothing_follows_the_first_bad_row(source):
    given = []
    with pytest.raises(ValidationError):
        for record in read(source([GOOD[0], BOOL, GOOD[1]])).good():
            given.append(record.index)
    assert given == [0]


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_every_row_bad(source, policy):
    with pytest.raises(
        ValidationError, match=r"2 of 2 rows are like this: none of the 2 rows can be used. Name the columns"
    ):
        load(source([BOOL, BOOL]), on_bad_row=policy)


def test_validation_counts(source):
    found = validate(source([*GOOD, BOOL, GOOD[0], BLANK, GOOD[0] | {"rejected": " c"}]))
    assert (found.n_rows, found.n_bad, found.duplicates, found.n_distinct) == (9, 2, 1, 6)
    assert [(d.row, d.column) for d in found.defects] == [(6, "rejected"), (8, "chosen")]
    assert found.notes == ("1 prompts occur in more than one row: 2 of 6 distinct rows, the commonest in 2 of them.",)


def test_duplicates_are_of_content_not_of_columns(source):
    assert validate(source([GOOD[0] | {"id": 1}, GOOD[0] | {"id": 2}])).duplicates == 1


def test_notes(source):
    found = validate(
        source(
            [
                {"prompt": "p", "completion": "c"},
                {"prompt": "p\n", "completion": "d"},
                {"prompt": "q", "completion": " #### 5"},
            ]
        )
    )
    assert found.notes == (
        "In 1 rows prompt and reply follow each other without white space, as they are. If that is not meant, end the prompt with a "
        'template: `columns: {prompt: "{prompt}\\n"}`.',
        "2 rows have no answer to grade against.",
    )


def test_notes_of_unpaired_rows(source):
    found = validate(source([{"prompt": "p ", "completion": "c", "label": label} for label in (True, False, True)]))
    assert found.duplicates == 1
    assert found.notes[0].startswith(
        "2 rows are unpaired preferences (KTO): 1 desirable, 1 undesirable. Target likelihoods"
    )


def test_advice_names_the_recipes_own_key_of_the_rows(tmp_path):
    """Rows that are not the source's (held out, a target's): what to set is said under their own key."""
    file = tmp_path / "pairs_source.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(ValidationError) as error:
        read(file, kind="sft", setting="targets.safe")
    assert str(error.value).startswith(f"targets.safe: {file}: preference pairs")
    assert "`--set targets.safe.columns.completion=chosen`" in str(error.value)
    with pytest.raises(UsageError, match=r"^heldout\.format: 'jsonlines' is not a format"):
        read(file, format="jsonlines", setting="heldout")
