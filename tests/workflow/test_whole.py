"""What a recipe points to changes when it is whole: a run that fails or is killed leaves every view as the last whole run left it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

import curate
from curate.console import Progress
from curate.errors import UsageError
from curate.recipe.load import load_recipe
from curate.store import Store, recipes
from curate.store.openings import kept_open
from curate.workflow import measure as measuring
from curate.workflow import run as workflow
from curate.workflow import score as scoring
from curate.workflow import select
from curate.workflow.runners.forward import ForwardRunner
from tests.forked import exit_code
from tests.workflow.pairs import write_rows

VIEWS = ("rows", "scored", "trajectories", "samples", "occurrences", "dataset_values", "selections")
CHANGES = {  # another source, other answers, another score
    "source.path": "rows.jsonl",
    "sampling.temperature": 0.5,
    "scores": ["accuracy", "target_nll", "difficulty", {"premem_accuracy": {"threshold": 1.0}}],
    "select.keep.rows": 3,
}


def rows(n: int) -> list[dict]:
    return [
        {"prompt": f"is {i} more than {i % 3}?", "completion": f" yes {i}", "answer": str(i), "n": i} for i in range(n)
    ]


def write(folder: Path, model: Path) -> Path:
    write_rows(folder / "rows.jsonl", rows(6))
    raw = {
        "kind": "sft",
        "source": {"path": "rows.jsonl"},
        "models": {"reference": str(model)},
        "engine": {"sampler": "transformers", "device": "cpu"},
        "sampling": {"samples": 2, "max_new_tokens": 4},
        "scores": ["accuracy", "target_nll"],
        "select": {"order_by": "target_nll", "keep": {"rows": 4}},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(raw))
    return folder / "sft.yaml"


@pytest.fixture
def sft(tmp_path, model) -> Path:
    return write(tmp_path, model)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("whole_run")
    curate.run(write(folder, model))
    return folder


@pytest.fixture
def store(whole_run, sft) -> Store:
    """Of a run of `sft` that was whole."""
    return Store(shutil.copytree(whole_run / "store", sft.parent / "store"))


def views(store: Store) -> dict:
    with kept_open():
        of = {
            f"{view} of {recipe}": store.sql(f"SELECT * FROM {view} ORDER BY ALL", recipe=recipe).to_dicts()
            for view in VIEWS
            for recipe in (None, "sft")
        }
    return of | {
        "sources": [(s["source"], s["fingerprint"]) for s in store.status()["sources"]],
        "n": store.status()["rows"],
    }


def change_rows(folder: Path) -> None:
    """Another first row, rows that are new, a column that is new."""
    write_rows(folder / "rows.jsonl", [{**row, "m": "x"} for row in [*rows(9)[1:], {**rows(1)[0], "n": 100}]])


class Broken(RuntimeError):
    pass


def test_a_run_that_fails_leaves_the_views_as_they_were(sft, store, tmp_path, monkeypatch):
    before = views(store)
    assert len(before["samples of None"]) == 12 and len(before["selections of sft"]) == 6
    change_rows(tmp_path)

    def breaks(*args, **kwargs):
        raise Broken

    for where, name in (
        (ForwardRunner, "run"),
        (scoring, "compute_scores"),
        (select, "select_with_control"),
        (Store, "write_selection"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, breaks)
            with pytest.raises(Broken):
                curate.run(sft, set=CHANGES)
        assert views(Store(store.folder)) == before, name
    workflow.make_plan(load_recipe(sft, set=CHANGES), progress=Progress(quiet=True))
    assert views(Store(store.folder)) == before
    assert [m.measurement for m in store.measured(reads="sample")].count("accuracy") == 2  # what was measured is kept
    assert curate.run(sft, set=CHANGES).measured == {}
    after = views(Store(store.folder))
    assert len(after["scored of None"]) == 9 and {r["n"] for r in after["scored of sft"]} == {100, *range(1, 9)}
    assert sum(r["kept"] for r in after["selections of sft"]) == 3
    whole = views(curate.run(sft, set=CHANGES, store=tmp_path / "whole").store)
    drawn = {(r["row_id"], r["sample"]): r["text"] for r in whole["samples of sft"]}
    assert {(r["row_id"], r["sample"]): r["text"] for r in after["samples of sft"]} == drawn


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def dies(where: str, sft: Path) -> None:
    """`curate run` with other answers and another selection, in a process of its own."""
    from curate.cli import main

    if where == "measuring":
        ForwardRunner.run = die
    else:
        recipes.write_selection = die
    changes = [f"--set={key}" for key in ("sampling.temperature=0.5", "select.keep.rows=3")]
    sys.argv = ["curate", "run", str(sft), "--quiet", *changes]
    main()


@pytest.mark.parametrize("where", ["measuring", "publishing"])
def test_a_run_that_is_killed_leaves_the_views_as_they_were(sft, store, tmp_path, where):
    before = views(store)
    change_rows(tmp_path)
    assert exit_code(dies, where, sft, said=tmp_path / "said") == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert views(Store(store.folder)) == before
    again = curate.run(sft, set=["sampling.temperature=0.5"])
    assert again.measured == ({"forward": 3} if where == "measuring" else {})  # of the new rows
    assert len(again.store.sql("SELECT * FROM samples")) == 18


def test_steps_one_at_a_time(sft, tmp_path, capsys):
    """Measuring alone shows its values at once where no scores stand beside them, else when they are scored anew."""

    def step(*steps, **set):
        return workflow.run_steps(load_recipe(sft, set=set), steps, progress=Progress(), command=steps[0])

    store = step("measure").store
    assert len(store.sql("SELECT * FROM samples")) == 12 and "accuracy" in store.scored().columns
    step("score")
    step("select")
    before = views(Store(store.folder))
    change_rows(tmp_path)
    step("measure")
    assert "`curate score" in capsys.readouterr().err
    assert views(Store(store.folder)) == before
    with pytest.raises(UsageError, match="curate score"):
        step("select")
    assert views(Store(store.folder)) == before
    capsys.readouterr()
    step("score")
    assert "The selection 'sft' is of earlier scores: `curate select" in capsys.readouterr().err
    now = views(Store(store.folder))
    assert len(now["scored of None"]) == len(now["scored of sft"]) == 9 and all(
        r["target_nll"] for r in now["scored of sft"]
    )
    assert now["selections of None"] == before["selections of None"]
    with pytest.raises(UsageError, match="as scores of 'sft' comes from other|never measured"):
        step("select", **{"sampling.temperature": 0.1})
    with pytest.raises(UsageError, match="accuracy of reference was never measured.*curate measure"):
        step("score", **{"sampling.temperature": 0.1})
    step("select")
    assert len(views(Store(store.folder))["selections of sft"]) == 9


def test_a_file_that_is_trained_on_and_held_out(sft, tmp_path):
    """It is read for both, or for neither."""
    curate.run(sft, set={"heldout": {"path": "rows.jsonl", "limit": 2}})
    change_rows(tmp_path)
    result = curate.run(sft, set={"heldout": {"path": "rows.jsonl", "limit": 2}})
    assert result.store.sql("SELECT role, count(*) AS n FROM occurrences GROUP BY role ORDER BY role").rows() == [
        ("heldout", 2),
        ("train", 9),
    ]


def test_rows_of_a_failed_reading_are_forgotten(sft, store, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{**row, "prompt": "wrong " + row["prompt"]} for row in rows(5)])
    with monkeypatch.context() as patched, pytest.raises(Broken):
        patched.setattr(measuring, "measure", lambda *a, **k: (_ for _ in ()).throw(Broken()))
        curate.run(sft)
    write_rows(tmp_path / "rows.jsonl", rows(6))
    assert curate.run(sft).measured == {}
    store = Store(store.folder)
    assert len(store.row_ids_of()) == 6 and len(store.scored()) == 6
