"""`threshold: auto`: τ from held-out accuracies that were made with a known one, over runs and over groups."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

import curate
from curate.console import Progress
from curate.errors import UsageError
from curate.recipe.load import load_recipe
from curate.report.explain import explain_row
from curate.report.summary import summarise
from curate.rows import Example
from curate.scores.premem import running
from curate.store.importing.importing import import_file
from curate.workflow.run import run_steps

STEPS = (10, 20, 30, 40)
TAUS = {"a": 0.1, "b": 0.5}
MAP = {"row": "id", "run": "run", "checkpoint": "step", "accuracy": "acc", "nll": "nll"}


def trajectories(rng, rows, tau):
    """(rows, K) accuracies that rise and NLLs that fall through τ."""
    accuracy = np.sort(rng.random((rows, len(STEPS))), axis=1).round(3)
    nll = tau * np.exp(np.sort(rng.normal(0.0, 1.5, (rows, len(STEPS))), axis=1)[:, ::-1])
    return accuracy, nll


def lines(ids, run, accuracy, nll):
    """One line a row and checkpoint, as logs have them."""
    found = {"id": [], "run": [], "step": [], "acc": [], "nll": []}
    for i, row_id in enumerate(ids):
        for k, step in enumerate(STEPS):
            for name, value in zip(found, (row_id, run, step, accuracy[i, k], nll[i, k]), strict=True):
                found[name].append(value)
    return pl.DataFrame(found)


def test_one_threshold_from_imported_test_accuracies(tmp_path, capsys):
    """Three runs whose test accuracy is their premem at τ = 0.1: found to within the gaps of the grid, said, stored, explained."""
    rng, store, parts, tests = np.random.default_rng(0), tmp_path / "store", [], []
    for run in ("r1", "r2", "r3"):
        accuracy, nll = trajectories(rng, 200, 0.1)
        parts.append(lines([str(i) for i in range(200)], run, accuracy, nll))
        tests += [(run, s, v) for s, v in zip(STEPS, running(accuracy, nll, 0.1).mean(axis=0).tolist(), strict=True)]
    pl.concat(parts).write_parquet(tmp_path / "train.parquet")
    pl.DataFrame(tests, schema=["run", "step", "test_accuracy"], orient="row").write_parquet(tmp_path / "test.parquet")
    import_file(store, tmp_path / "train.parquet", MAP)
    raw = {"kind": "sft", "scores": [{"premem_accuracy": {"threshold": "auto"}}, {"fluent": {"threshold": "auto"}}]}
    with pytest.raises(
        UsageError, match="needs held-out accuracies, and there are none. Name rows with answers as `heldout"
    ):
        curate.run(raw, store=store)
    import_file(
        store, tmp_path / "test.parquet", {"run": "run", "checkpoint": "step", "test_accuracy": "test_accuracy"}
    )
    result = curate.run(raw, store=store, progress=Progress())
    (tau,) = (v for v in result.values if v.name == "premem_threshold")
    assert tau.value == pytest.approx(0.1, rel=0.03) and tau.low <= tau.value <= tau.high and tau.n == 12
    said = capsys.readouterr().err
    assert "calibrated on 12 checkpoints of 3 runs: R² about y = x 1.000" in said and "does not transfer" not in said
    row = explain_row(result.store, result.store.sql("SELECT row_id FROM rows LIMIT 1").item())
    assert {s["name"]: s["params"] for s in row.scores}["premem_accuracy"] == {"threshold": tau.value}
    assert (
        f"premem_accuracy (threshold {tau.value:.4g})" in row.text()
        and "premem_threshold" in summarise(result.store).text()
    )


@pytest.mark.parametrize("threshold", ["auto", 0.1])
def test_new_held_out_accuracies_outdate_scores_that_are_calibrated_with_them(tmp_path, threshold):
    """`curate select` refuses what another τ was made of, and takes what no held-out accuracy enters."""
    rng, store = np.random.default_rng(3), tmp_path / "store"
    accuracy, nll = trajectories(rng, 100, 0.1)
    lines([str(i) for i in range(100)], "r", accuracy, nll).write_parquet(tmp_path / "train.parquet")
    import_file(store, tmp_path / "train.parquet", MAP)
    told = {"run": "run", "checkpoint": "step", "test_accuracy": "test_accuracy"}

    def taken(tau):
        tests = [("r", s, v) for s, v in zip(STEPS, running(accuracy, nll, tau).mean(axis=0).tolist(), strict=True)]
        frame = pl.DataFrame(tests, schema=["run", "step", "test_accuracy"], orient="row")
        frame.write_parquet(tmp_path / "test.parquet")
        import_file(store, tmp_path / "test.parquet", told)

    raw = {"kind": "sft", "scores": [{"premem_accuracy": {"threshold": threshold}}]}
    loaded = load_recipe({**raw, "select": {"order_by": "premem_accuracy desc"}}, store=store)
    step = lambda *steps: run_steps(loaded, steps, progress=Progress(quiet=True))  # noqa: E731
    taken(0.1)
    step("score")
    taken(0.1)  # the same again
    step("select")
    taken(0.5)
    if threshold == "auto":
        with pytest.raises(UsageError, match=r"as scores of .* comes from other .*curate score"):
            step("select")
        step("score")
    assert step("select").selection.counts["kept"] == 100


def test_runs_that_want_other_thresholds_are_said(tmp_path, capsys):
    rng, store, parts, tests = np.random.default_rng(1), tmp_path / "store", [], []
    for run, tau in (("r1", 0.02), ("r2", 0.5)):
        accuracy, nll = trajectories(rng, 100, 0.1)
        parts.append(lines([str(i) for i in range(100)], run, accuracy, nll))
        tests += [(run, s, v) for s, v in zip(STEPS, running(accuracy, nll, tau).mean(axis=0).tolist(), strict=True)]
    pl.concat(parts).write_parquet(tmp_path / "train.parquet")
    pl.DataFrame(tests, schema=["run", "step", "test_accuracy"], orient="row").write_parquet(tmp_path / "test.parquet")
    import_file(store, tmp_path / "train.parquet", MAP)
    import_file(
        store, tmp_path / "test.parquet", {"run": "run", "checkpoint": "step", "test_accuracy": "test_accuracy"}
    )
    curate.run(
        {"kind": "sft", "scores": [{"premem_accuracy": {"threshold": "auto"}}]}, store=store, progress=Progress()
    )
    assert "This τ does not transfer from run to run" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["group", "meta.topic"])
def test_a_threshold_per_group_from_held_out_rows(tmp_path, capsys, column):
    """Two groups with their own τ and held-out rows: one τ for both is warned of, each group's own is found."""
    per = {} if column == "group" else {"per": column}
    rng, rows, heldout, logs = np.random.default_rng(2), [], [], []
    for group, tau in TAUS.items():
        accuracy, nll = trajectories(rng, 300, tau)
        examples = [Example(f"{group}{i}", "x", "y") for i in range(300)]
        rows += [{"prompt": e.prompt, "completion": "x", "answer": "y", column: group} for e in examples]
        tests = [Example(f"test {group}{i}", "x", "y") for i in range(2)]
        heldout += [{"prompt": e.prompt, "completion": "x", "answer": "y", column: group} for e in tests]
        expected = np.tile(running(accuracy, nll, tau).mean(axis=0), (2, 1))
        logs += [
            lines([e.row_id for e in examples], "r", accuracy, nll),
            lines([e.row_id for e in tests], "r", expected, expected),
        ]
    for name, found in (("train", rows), ("heldout", heldout)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    pl.concat(logs).write_parquet(tmp_path / "logs.parquet")
    raw = {"kind": "sft", "source": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")}
    raw |= {"scores": [{"premem_accuracy": {"threshold": "auto_per_group", **per}}]}
    with pytest.raises(UsageError, match="nothing was imported"):  # but the rows are read now
        curate.run(raw, store=tmp_path / "store")
    import_file(
        tmp_path / "store", tmp_path / "logs.parquet", {"row_id" if k == "row" else k: v for k, v in MAP.items()}
    )
    result = curate.run(raw, store=tmp_path / "store", progress=Progress())
    found = {v.name: v.value for v in result.values if v.name.startswith("premem_threshold")}
    assert found == {f"premem_threshold_{g}": pytest.approx(tau, rel=0.03) for g, tau in TAUS.items()}
    assert "τ of group a = 0.1" in capsys.readouterr().err
    own = result.store.sql("SELECT premem_accuracy FROM scored WHERE role = 'train' ORDER BY row_id")
    by_hand = {"threshold": {g: found[f"premem_threshold_{g}"] for g in TAUS}, **per}
    fixed = curate.run({**raw, "scores": [{"premem_accuracy": by_hand}]}, store=tmp_path / "store")
    assert own.equals(fixed.store.sql("SELECT premem_accuracy FROM scored WHERE role = 'train' ORDER BY row_id"))
    curate.run(
        {**raw, "scores": [{"premem_accuracy": {"threshold": 0.1, **per}}]},
        store=tmp_path / "store",
        progress=Progress(),
    )
    said = capsys.readouterr().err
    assert "One threshold for all rows may not fit" in said and "{threshold: auto_per_group, per: COLUMN}" in said
    with pytest.raises(UsageError, match=f"no column '{column}s'; did you mean '{column}'"):
        misspelt = {"premem_accuracy": {"threshold": "auto_per_group", "per": f"{column}s"}}
        curate.run({**raw, "scores": [misspelt]}, store=tmp_path / "store")
    with pytest.raises(UsageError, match=f"per '{column}' and per 'answer_length'"):
        other = {"fluent": {"threshold": "auto_per_group", "per": "answer_length"}}
        curate.run({**raw, "scores": [*raw["scores"], other]}, store=tmp_path / "store")
    with pytest.raises(UsageError, match="of group 'b', and there are none"):
        lone = [json.dumps(row) for row in heldout if row[column] == "a"]
        (tmp_path / "heldout.jsonl").write_text("\n".join(lone) + "\n")
        curate.run(raw, store=tmp_path / "store")
