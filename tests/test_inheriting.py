"""heldout, targets and pools are read as the source is where they do not say otherwise; what differs is said before anything is measured."""

from __future__ import annotations

import json

import pytest

from curate.console import Progress
from curate.errors import UsageError
from curate.jobs.collect.candidates import check_pool, pool_rows
from curate.jobs.collect.rounds import read_rows
from curate.plan.targets import Targets
from curate.recipe.load import load_recipe
from curate.recipe.sources import inherit
from curate.rows import Example
from curate.store import Store
from curate.workflow.read import read_sources, validate_rows

TEMPLATE = "Question: {q}\nAnswer:"
SFT = {"path": "train.jsonl", "columns": {"prompt": TEMPLATE, "completion": "a"}, "on_bad_row": "drop"}
PAIRS = {"path": "pairs.jsonl", "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}


class Said(Progress):
    def __init__(self):
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text):
        self.lines.append(text)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", [{"q": f"What is {i}?", "a": f" {i}"} for i in range(6)])
    write(tmp_path / "held.jsonl", [{"q": f"What is {i}?", "a": f" {i}"} for i in range(4, 8)])
    write(tmp_path / "plain.jsonl", [{"prompt": "What is 9?", "completion": " 9"}])
    write(tmp_path / "pairs.jsonl", [{"q": f"What is {i}?", "good": f" {i}", "bad": " 0"} for i in range(1, 4)])
    write(tmp_path / "tasks.jsonl", [{"q": f"What is {i}?", "completion": f" {i}"} for i in range(2)])
    return tmp_path


def recipe(**more):
    return load_recipe({"kind": "sft", "scores": [], **more})


def test_held_out_rows_are_the_training_rows_that_they_repeat(folder):
    """Same template, same columns: the same rows, and so the same tokens and likelihoods. Before, they were other rows, and nothing was said."""
    loaded, said = recipe(source=SFT, heldout="held.jsonl"), Said()
    store = Store(folder / "store", create=True)
    names = read_sources(loaded, store, said)
    train, held = (store.row_ids_of(names[role], kind="sft", role=role) for role in ("train", "heldout"))
    wanted = [Example(f"Question: What is {i}?\nAnswer:", f" {i}").row_id for i in range(8)]
    assert (train, held) == (wanted[:6], wanted[4:])
    assert [line for line in said.lines if "held-out" in line] == [
        "2 of 4 held-out rows are training rows too: what is said about held-out rows is partly about those."
    ]
    found = validate_rows(loaded)
    assert found["heldout"].n_bad == 0 and "2 of 4 held-out rows are training rows too" in " ".join(
        found["heldout"].notes
    )


def test_rows_of_other_columns_say_so(folder):
    """What is inherited and does not fit is an error that names the way out; that way is said by every command."""
    with pytest.raises(
        UsageError,
        match=r"(?s)heldout\.columns\.\w+: plain.*has no column.*taken from `source`.*heldout\.columns=\{\}",
    ):
        read_sources(recipe(source=SFT, heldout="plain.jsonl"), Store(folder / "store", create=True), Said())
    said = Said()
    read_sources(
        recipe(source=SFT, heldout={"path": "plain.jsonl", "columns": {}}), Store(folder / "store", create=True), said
    )
    assert (
        f"heldout: read otherwise than the source: columns {{}} (source: {{prompt: {TEMPLATE}, completion: a}})."
        in said.lines
    )


def test_formats_that_were_found_differ(folder):
    write(
        folder / "chat.jsonl", [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    )
    said = Said()
    read_sources(recipe(source="plain.jsonl", heldout="chat.jsonl"), Store(folder / "store", create=True), said)
    assert any(
        line.startswith("heldout: its rows are messages, the source's are prompt_completion") for line in said.lines
    )


INHERITED = [
    # (the section, the key, what it is), of source {path: owner/rows:main, split: test, revision: v1, format: preference, on_bad_row: drop, limit: 5}
    ({"path": "x.jsonl"}, "format", "preference"),
    ({"path": "x.jsonl"}, "on_bad_row", "drop"),
    ({"path": "x.jsonl"}, "limit", None),
    ({"path": "x.jsonl"}, "split", "train"),  # a file has none
    ({"path": ["x.jsonl.gz", "data/*.parquet"]}, "split", "train"),
    ({"path": "owner/other"}, "split", "test"),
    ({"path": "owner/other"}, "revision", None),
    ({"path": "owner/rows:other"}, "revision", "v1"),
    ({"path": "owner/rows", "revision": None}, "revision", None),
    ({"path": "owner/rows", "split": "train"}, "split", "train"),
    ({"path": "x.jsonl", "format": "auto"}, "format", "auto"),
]


@pytest.mark.parametrize(("section", "key", "value"), INHERITED)
def test_what_is_inherited(section, key, value):
    source = {
        "path": "owner/rows:main",
        "split": "test",
        "revision": "v1",
        "format": "preference",
        "on_bad_row": "drop",
        "limit": 5,
    }
    loaded = load_recipe(
        {"kind": "preference", "source": source, "heldout": section, "targets": {"t": {**section, "of": "chosen"}}}
    )
    assert getattr(loaded.recipe.heldout, key) == getattr(loaded.recipe.targets["t"], key) == value


def test_targets_are_read_as_the_source_is(folder):
    """One of the recipe's kind takes everything; one of the other kind the columns that both kinds have."""
    targets = {"same": {"path": "pairs.jsonl", "of": "margin"}, "other": {"path": "tasks.jsonl", "of": "completion"}}
    loaded = load_recipe({"kind": "preference", "source": PAIRS | {"format": "preference"}, "targets": targets})
    found = Targets(loaded)
    assert [row.chosen for row in found.rows("same")[""]] == [" 1", " 2", " 3"]
    assert found.rows("other")[""] == [Example("What is 0?", " 0"), Example("What is 1?", " 1")]
    assert set(validate_rows(loaded)) == {"source", "targets.same", "targets.other"}


def test_a_target_that_differs_in_nothing_that_counts_keeps_its_identity(folder):
    """What was measured of good rows stays, whether bad ones would be dropped or not."""
    section = {"path": "pairs.jsonl", "of": "margin"}
    strict, lenient = (
        load_recipe({"kind": "preference", "source": PAIRS | {"on_bad_row": policy}, "targets": {"t": section}})
        for policy in ("error", "drop")
    )
    assert Targets(strict).identity("t") == Targets(lenient).identity("t")


def test_a_pool_is_read_as_the_source_is(folder):
    loaded = recipe(source=SFT | {"limit": 1})
    pool = pool_rows(str(folder / "held.jsonl"), loaded.recipe.source)
    rows = [candidate.row for candidate in read_rows(loaded, pool, "pool")]
    assert rows == [Example(f"Question: What is {i}?\nAnswer:", f" {i}") for i in range(4, 8)]
    with pytest.raises(UsageError, match=r"(?s)pool: .*has no column 'a'.*A pool is read as `source` is"):
        check_pool(loaded, str(folder / "plain.jsonl"), "states")


def test_a_section_without_a_source_is_as_it_says():
    loaded = load_recipe({"kind": "sft", "heldout": "x.jsonl"})
    assert loaded.recipe.heldout == inherit(loaded.recipe.heldout, None)
