"""What a recipe points to changes when it is whole: a run that fails or is killed leaves every view as the last whole run left it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import curate
from curate.console import Progress
from curate.errors import UsageError
from curate.recipe.load import load_recipe
from curate.store import Store
from curate.workflow import measure as measuring
from curate.workflow import run as workflow
from curate.workflow import score as scoring
from curate.workflow import select
from curate.workflow.runners.forward import ForwardRunner
from tests.workflow.pairs import write_rows

REPOSITORY = Path(__file__).resolve().parent.parent.parent
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


@pytest.fixture
def sft(tmp_path, model) -> Path:
    write_rows(tmp_path / "rows.jsonl", rows(6))
    raw = {
        "kind": "sft",
        "source": {"path": "rows.jsonl"},
        "models": {"reference": str(model)},
        "engine": {"sampler": "transformers", "device": "cpu"},
        "sampling": {"samples": 2, "max_new_tokens": 4},
        "scores": ["accuracy", "target_nll"],
        "select": {"order_by": "target_nll", "keep": {"rows": 4}},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "sft.yaml"


def views(store: Store) -> dict:
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


def test_a_run_that_fails_leaves_the_views_as_they_were(sft, tmp_path, monkeypatch):
    store = curate.run(sft).store
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


DRIVER = """
    import os, signal, sys
    from curate.store import recipes
    from curate.workflow.runners.forward import ForwardRunner
    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "measuring":
        ForwardRunner.run = die
    else:
        recipes.write_selection = die
    sys.argv = ["curate", "run", sys.argv[2], "--quiet", "--set", "sampling.temperature=0.5", "--set", "select.keep.rows=3"]
    from curate.cli import main
    main()
"""


@pytest.mark.parametrize("where", ["measuring", "publishing"])
def test_a_run_that_is_killed_leaves_the_views_as_they_were(sft, tmp_path, where):
    store = curate.run(sft).store
    before = views(store)
    change_rows(tmp_path)
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(script), where, str(sft)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
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
    result = curate.run(sft, set={"heldout": {"path": "rows.jsonl", "limit": 2}})
    change_rows(tmp_path)
    result = curate.run(sft, set={"heldout": {"path": "rows.jsonl", "limit": 2}})
    assert result.store.sql("SELECT role, count(*) AS n FROM occurrences GROUP BY role ORDER BY role").rows() == [
        ("heldout", 2),
        ("train", 9),
    ]


def test_rows_of_a_failed_reading_are_forgotten(sft, tmp_path, monkeypatch):
    store = curate.run(sft).store
    write_rows(tmp_path / "rows.jsonl", [{**row, "prompt": "wrong " + row["prompt"]} for row in rows(5)])
    with monkeypatch.context() as patched, pytest.raises(Broken):
        patched.setattr(measuring, "measure", lambda *a, **k: (_ for _ in ()).throw(Broken()))
        curate.run(sft)
    write_rows(tmp_path / "rows.jsonl", rows(6))
    assert curate.run(sft).measured == {}
    store = Store(store.folder)
    assert len(store.row_ids_of()) == 6 and len(store.scored()) == 6
