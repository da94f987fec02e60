"""Calibration of τ: synthetic runs whose τ is known, slow loops, and the real logs of Llama-3-8B on GSM8K."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from curate.scores import DATASET_VALUES
from curate.scores.calibration import Run, calibrate, calibrate_groups, nll_floors, premem_points, r_squared
from curate.scores.premem import running

PAPER = math.exp(-2.3)  # the authors write the mask as ln ln perplexity ≥ −2.3


def synthetic(n_runs=4, tau=0.2, seed=0):
    rng = np.random.default_rng(seed)
    runs = []
    for i in range(n_runs):
        accuracy = np.clip(rng.random((200, 4)) * 0.5 + np.linspace(0.1 * i, 0.5, 4), 0, 1)
        nll = rng.random((200, 4)) * np.linspace(1, 0.2, 4)
        runs.append(Run(f"run{i}", accuracy, nll, running(accuracy, nll, tau).mean(axis=0)))
    return runs


def test_the_threshold_that_made_the_data_is_found():
    found = calibrate(synthetic(tau=0.2))
    assert found.threshold == pytest.approx(0.2, rel=0.02)
    assert found.in_sample.r2 > 0.9999 and found.leave_one_run_out.r2 > 0.999
    assert found.in_sample.low <= found.in_sample.r2 <= found.in_sample.high
    assert [p.run for p in found.points[:5]] == ["run0"] * 4 + ["run1"] and found.points[5].checkpoint == 1
    assert found.notes == []


def test_r_squared_is_about_the_diagonal():
    y = np.array([0.1, 0.2, 0.3])
    assert r_squared(y, y) == 1
    assert r_squared(y + 0.1, y) == pytest.approx(-0.5)  # 1 − 0.03/0.02, although perfectly correlated
    assert math.isnan(r_squared(y[:1], y[:1])) and math.isnan(r_squared(y[:0], y[:0]))


def test_one_run_and_missing_heldout():
    run = synthetic(1)[0]
    found = calibrate([run])
    assert found.leave_one_run_out is None and "one run" in found.notes[0]
    partly = Run("partly", run.accuracy, run.target_nll, np.where([1, 0, 1, 1], run.heldout, np.nan))
    assert [p.checkpoint for p in calibrate([partly]).points] == [0, 2, 3]
    with pytest.raises(ValueError, match="held-out accuracy"):
        calibrate([Run("none", run.accuracy, run.target_nll, np.full(4, np.nan))])
    with pytest.raises(ValueError, match="heldout"):
        Run("short", run.accuracy, run.target_nll, run.heldout[:2])


def test_unmeasured_rows_are_left_out():
    run = synthetic(1)[0]
    nan = np.full((3, 4), np.nan)
    more = Run("more", np.concatenate([run.accuracy, nan]), np.concatenate([run.target_nll, nan]), run.heldout)
    np.testing.assert_allclose(premem_points([more], 0.2), premem_points([run], 0.2))


def test_groups_and_their_floors():
    found = calibrate_groups({"easy": synthetic(3, tau=0.1), "hard": synthetic(3, tau=0.4, seed=1)})
    assert found["easy"].threshold == pytest.approx(0.1, rel=0.03) and found["hard"].threshold == pytest.approx(
        0.4, rel=0.03
    )
    nll = np.array([[1.0, 0.02], [1.0, 0.04], [1.0, 0.3], [1.0, 0.5], [np.nan, np.nan]])
    floors, warning = nll_floors(nll, np.array(["a", "a", "b", "b", "b"]))
    assert floors == pytest.approx({"a": 0.03, "b": 0.4}) and "per group" in warning and "'b'" in warning
    assert nll_floors(nll[:2], np.array(["a", "b"]))[1] is None  # 0.02 and 0.04: within a factor of two
    assert nll_floors(nll[:2], np.array(["a", "a"]))[1] is None


@pytest.fixture(scope="module")
def gsm8k(shared):
    """13 runs, 51 checkpoints: rows trained on, accuracy over the first sample set, float64 NLL, test accuracy."""
    folder = shared / "data" / "premem_gsm8k"
    train = pl.read_parquet(folder / "train.parquet").with_columns(pl.col("run").cast(pl.String)).filter("in_train")
    heldout = pl.read_parquet(folder / "test.parquet")
    runs = []
    for name in sorted(train["run"].unique()):
        rows = train.filter(pl.col("run") == name).sort("step", "example_id")
        steps = rows["step"].unique().sort().to_list()
        tested = heldout.filter(pl.col("run") == name).sort("step")
        assert tested["step"].to_list() == steps

        def series(values, k=len(steps)):
            return np.ascontiguousarray(values.reshape(k, -1).T)

        accuracy = rows["n_correct"].cast(pl.Float64).to_numpy() / rows["n_samples"].cast(pl.Float64).to_numpy()
        nll = np.log(rows["perplexity"].to_numpy().astype(np.float64))
        runs.append(Run(name, series(accuracy), series(nll), tested["test_accuracy"].to_numpy()))
    return runs


def test_gsm8k_is_read_as_it_is(gsm8k):
    assert len(gsm8k) == 13 and sum(run.accuracy.shape[1] for run in gsm8k) == 51
    assert sorted({len(run.accuracy) for run in gsm8k}) == [1868, 3736, 7473]
    assert 2e-6 < min(run.target_nll.min() for run in gsm8k) < 3e-6  # float64 throughout: 1.0000026 is no 1


def test_gsm8k_points_against_a_slow_loop(gsm8k):
    """Plain Python, row by row, on the quarter run and the 3-epoch run with 50 samples."""
    for name in ("gsm8k_12epochs_quarter_lr2e-05_bs128", "gsm8k_3epochs_full_lr2e-05_bs128"):
        run = next(run for run in gsm8k if run.name == name)
        totals = [0.0] * run.accuracy.shape[1]
        for accuracy, nll in zip(run.accuracy.tolist(), run.target_nll.tolist()):
            best = 0.0
            for t, (a, n) in enumerate(zip(accuracy, nll)):
                best = max(best, a if n >= PAPER else 0.0)
                totals[t] += min(best, a)
        np.testing.assert_allclose(premem_points([run], PAPER), np.array(totals) / len(run.accuracy), rtol=1e-12)


def test_gsm8k_calibration(gsm8k):
    """The published threshold is found again, and holds on runs it was not fitted on. The numbers are what the README prints."""
    found = calibrate(gsm8k, threshold=PAPER)
    assert found.given.r2 == pytest.approx(0.9349, abs=5e-4)
    assert found.threshold == pytest.approx(0.0983, abs=5e-4) and found.in_sample.r2 == pytest.approx(0.9354, abs=5e-4)
    left_out = found.leave_one_run_out
    assert left_out.r2 == pytest.approx(0.9193, abs=2e-3) and left_out.n == 51 and left_out.mean_error < 0.035
    assert 0.80 < left_out.low < left_out.r2 < left_out.high < 0.97
    assert len(found.left_out) == 13 and all(0.093 < tau < 0.103 for tau in found.left_out.values())
    baselines = {name: fit.r2 for name, fit in found.baselines.items()}
    assert baselines["train accuracy"] == pytest.approx(-6.04, abs=0.01)
    assert baselines["first checkpoint's train accuracy"] == pytest.approx(0.542, abs=1e-3)
    assert baselines["train NLL (line, in-sample)"] == pytest.approx(0.219, abs=1e-3)
    assert baselines["train NLL (line, leave-one-run-out)"] == pytest.approx(-0.054, abs=1e-3)
    # the two R² again, in plain Python, from the points
    mean = sum(p.heldout for p in found.points) / 51
    spread = sum((p.heldout - mean) ** 2 for p in found.points)
    for fit, name in ((found.in_sample, "premem"), (left_out, "premem_left_out")):
        assert fit.r2 == pytest.approx(1 - sum((p.heldout - getattr(p, name)) ** 2 for p in found.points) / spread)
    # the τ of a left-out run never saw that run
    without = calibrate(
        [run for run in gsm8k if "6epochs_half" not in run.name], grid=np.array(sorted({*found.left_out.values()}))
    )
    assert without.threshold == found.left_out["gsm8k_6epochs_half_lr2e-05_bs128"]


def test_gsm8k_the_outer_min_matters(gsm8k):
    """Without it the value cannot fall when answers are forgotten: the fit is worse."""
    x = np.concatenate(
        [np.maximum.accumulate(np.where(r.target_nll >= PAPER, r.accuracy, 0), axis=1).mean(axis=0) for r in gsm8k]
    )
    y = np.concatenate([run.heldout for run in gsm8k])
    assert r_squared(x, y) < r_squared(premem_points(gsm8k, PAPER), y) - 0.05


def test_gsm8k_most_zeros_are_fluent(gsm8k):
    """docs/scores.md §5: about three quarters of the zeros of the 50-sample run were fluent from the start."""
    run = next(run for run in gsm8k if run.name == "gsm8k_3epochs_full_lr2e-05_bs128")
    columns = {"accuracy": run.accuracy, "target_nll": run.target_nll}
    values = DATASET_VALUES["premem_values"].compute(columns, params={"threshold": PAPER}, steps=[58, 116, 174])
    last = next(v for v in values if v.name == "premem_zeros_fluent" and v.at == 2)
    assert last.value == pytest.approx(0.77, abs=0.01) and last.n == 1060
