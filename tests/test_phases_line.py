"""Phases from imported logs to what people read: the view `scored`, selection by name, summary, explain."""

from __future__ import annotations

import shutil

import polars as pl
import pytest

import curate
from curate.report.explain import explain_row
from curate.report.summary import summarise
from curate.scores.phases import NAMES
from curate.store import Store
from curate.store.importing.importing import import_file
from curate.workflow.score import _most_common

# row -> run -> (correct of 4, NLL) at steps 10, 20, 30
LOGS = {
    1: {"a": [(0, 2.0), (3, 0.5), (4, 0.01)], "b": [(0, 2.0), (3, 0.5), (4, 0.01)]},  # learned in both
    2: {"a": [(0, 2.0), (0, 0.05), (4, 0.01)], "b": [(0, 2.0), (0, 0.05), (4, 0.01)]},  # memorised in both
    3: {"a": [(0, 2.0), (4, 0.5), (0, 0.5)], "b": [(0, 2.0), (0, 1.5), (0, 1.5)]},  # forgotten, unlearned: a tie
    4: {"a": [(0, 2.0), (1, 1.0), (1, 1.0)]},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    lines = [
        {"id": row, "run": run, "step": 10 * (k + 1), "k": correct, "n": 4, "nll": nll}
        for row, runs in LOGS.items()
        for run, series in runs.items()
        for k, (correct, nll) in enumerate(series)
    ]
    pl.DataFrame(lines).write_parquet(folder / "logs.parquet")
    names = {"row": "id", "run": "run", "checkpoint": "step", "correct": "k", "samples": "n", "nll": "nll"}
    import_file(folder / "store", folder / "logs.parquet", names)
    (folder / "phases.yaml").write_text(
        "kind: sft\nstore: store\nscores:\n  - phase: {threshold: 0.1, smooth: false}\n"
        "  - phase: {threshold: 3, smooth: false, as: all_fluent}\n"
        "select: {where: \"phase_name = 'memorised'\", unknown: drop}\n"
    )
    result = curate.run(folder / "phases.yaml")
    assert result.selection.counts["kept"] == 1
    return Store(folder / "store")


def test_names_stand_beside_the_codes(store):
    found = store.sql(
        "SELECT o.key::INTEGER AS id, phase, phase_name, all_fluent_name FROM scored JOIN occurrences o USING (row_id)"
    )
    assert found.sort("id").rows() == [
        (1, 2.0, "learned", "learned"),
        (2, 3.0, "memorised", "learned"),  # τ above every NLL: all are fluent, accuracy alone decides
        (3, None, None, None),  # the runs disagree
        (4, 1.0, "learning", "learning"),
    ]


def test_the_phase_at_every_checkpoint_stands_in_the_trajectories(store, tmp_path):
    found = store.sql(
        "SELECT o.key::INTEGER AS id, run, step, accuracy, phase, phase_name, all_fluent_name FROM trajectories JOIN occurrences o USING (row_id)"
    )
    of = {(row["id"], row["run"]): [] for row in found.to_dicts()}
    for row in found.sort("step").to_dicts():
        assert row["accuracy"] == LOGS[row["id"]][row["run"]][row["step"] // 10 - 1][0] / 4
        of[row["id"], row["run"]].append(row["phase_name"])
        assert row["phase"] == NAMES.index(row["phase_name"])
    assert of == {
        (1, "a"): ["unlearned", "learned", "learned"],
        (1, "b"): ["unlearned", "learned", "learned"],
        (2, "a"): ["unlearned", "memorised", "memorised"],
        (2, "b"): ["unlearned", "memorised", "memorised"],
        (3, "a"): ["unlearned", "learned", "forgotten"],  # here the runs disagree, and each says its own
        (3, "b"): ["unlearned", "unlearned", "unlearned"],
        (4, "a"): ["unlearned", "learning", "learning"],
    }
    shutil.copytree(store.folder, tmp_path / "store")
    other = curate.run({"kind": "sft", "scores": ["accuracy"]}, store=tmp_path / "store").store
    columns, mine = (other.sql("SELECT * FROM trajectories LIMIT 0", recipe=name).columns for name in (None, "phases"))
    assert "phase" not in columns  # the scores of the recipe that was scored last
    assert mine == [*columns, "phase", "all_fluent", "phase_name", "all_fluent_name"]


def test_the_summary_shows_shares_per_run_and_checkpoint(store):
    summary = summarise(store)
    last = {v["name"]: (v["value"], v["n"]) for v in summary.values if v["run"] == "a" and v["step"] == 30}
    assert {name: value for name, value in last.items() if name.startswith("phase_")} == {
        "phase_unlearned": (0.0, 4),
        "phase_learning": (0.25, 4),
        "phase_learned": (0.25, 4),
        "phase_memorised": (0.25, 4),
        "phase_forgotten": (0.25, 4),
    }
    text = summary.text()
    assert text.count("Phases of the rows") == 2 and "Smoothing" not in text
    words = [line.split() for line in text.split("Phases of the rows")[1].splitlines()]
    assert next(w for w in words if w[:1] == ["30"])[1:5] == ["0.00", "(0.00", "to", "0.49)"]


def test_explain_says_the_name(store):
    row_id = store.sql("SELECT row_id FROM scored WHERE phase_name = 'memorised'").item()
    text = explain_row(store, row_id).text()
    assert any(line.startswith("phase") and ": memorised" in line for line in text.splitlines())
    assert "phase_name" not in text


def test_most_runs_decide():
    import numpy as np

    nan = np.nan
    runs = [np.array([0, 1, nan, nan, 2.0]), np.array([0, 2, 3, nan, 4.0]), np.array([4, 3, nan, nan, 4.0])]
    np.testing.assert_array_equal(_most_common(runs), [0, nan, 3, nan, 4])


def test_nobody_asks_nobody_pays(store):
    """Values about one score are computed only beside it."""
    (store.folder.parent / "plain.yaml").write_text("kind: sft\nstore: store\nscores: [premem_accuracy]\n")
    curate.run(store.folder.parent / "plain.yaml")
    names = set(store.sql("SELECT name FROM dataset_values", recipe="plain")["name"])
    assert "premem_accuracy" in names and not any(name.startswith("phase_") for name in names)


def test_names_are_text_even_where_no_phase_is_known(store):
    """τ of a run of one late checkpoint, all below it: fluent or memorised, nobody can tell."""
    folder = store.folder.parent
    lines = {"id": [1, 2], "run": ["c", "c"], "step": [30, 30], "k": [4, 4], "n": [4, 4], "nll": [0.01, 0.02]}
    pl.DataFrame(lines).write_parquet(folder / "late.parquet")
    names = {"row": "id", "run": "run", "checkpoint": "step", "correct": "k", "samples": "n", "nll": "nll"}
    import_file(folder / "late", folder / "late.parquet", names)
    (folder / "late.yaml").write_text("kind: sft\nstore: late\nscores: [phase]\n")
    curate.run(folder / "late.yaml")
    found = Store(folder / "late").sql("SELECT phase, phase_name FROM scored")
    assert found.rows() == [(None, None)] * 2 and found["phase_name"].dtype == pl.String
    assert Store(folder / "late").sql("SELECT 1 FROM scored WHERE phase_name = 'learned'").is_empty()
