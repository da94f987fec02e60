"""Latent states of runs: statistics against plain loops, the two-sided test against enumeration, a planted detour found."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from curate.errors import ModelError, UsageError
from curate.jobs.run_states.states import Run, convergence_step, held_out, holm, run_states, standardised, visit_test
from curate.jobs.run_states.weights import STATISTICS, checkpoint_tensors, weight_statistics
from pipelines.run_states import labels, main, report, states_of_sweep
from tests import forked
from tests.sweeps import ROUND, STRAIGHT, write_sweep

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_fourteen_numbers_of_a_hand_made_model():
    """One matrix [[3, 0], [0, -4], [0, 0]]: singular values 4 and 3; one bias (1, 2, 6)."""
    tensors = {"w": torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]), "b.bias": torch.tensor([1.0, 2.0, 6.0])}
    found = dict(zip(STATISTICS, weight_statistics(tensors)))
    assert found == pytest.approx(
        {
            "l1": 7, "l2": 5, "l1_l2": 1.4, "trace": -1, "spectral": 4, "trace_spectral": -0.25, "singular_mean": 3.5,
            "singular_variance": 0.25, "weight_mean": -1 / 6, "weight_median": 0, "weight_variance": 25 / 6 - 1 / 36,
            "bias_mean": 3, "bias_median": 2, "bias_variance": 14 / 3,
        }
    )  # fmt: skip


def test_statistics_against_numpy_over_several_tensors():
    draw = torch.Generator().manual_seed(0)
    shapes = {"embed": (30, 8), "conv": (4, 3, 2, 2), "norm": (8,), "norm.bias": (8,), "flag": (2,)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors["flag"] = tensors["flag"] > 0  # no floats: left out
    found = dict(zip(STATISTICS, weight_statistics(tensors)))
    matrices = [tensors["embed"].double().numpy(), tensors["conv"].double().numpy().reshape(4, -1)]
    singular = [np.linalg.svd(w, compute_uv=False) for w in matrices]
    assert found["singular_mean"] == pytest.approx(np.mean([s.mean() for s in singular]))
    assert found["singular_variance"] == pytest.approx(np.mean([s.var() for s in singular]))
    assert found["spectral"] == pytest.approx(np.mean([s[0] for s in singular]))
    assert found["trace_spectral"] == pytest.approx(np.mean([np.trace(w) / s[0] for w, s in zip(matrices, singular)]))
    assert found["l1_l2"] == pytest.approx(np.mean([abs(w).sum() / np.linalg.norm(w) for w in matrices]))
    every = np.concatenate([tensors[n].numpy().ravel() for n in ("embed", "conv", "norm")]).astype(np.float64)
    assert found["weight_median"] == pytest.approx(np.median(every))
    assert found["weight_variance"] == pytest.approx(every.var())
    del tensors["norm.bias"]
    assert np.isnan(weight_statistics(tensors)[-3:]).all()  # a model without biases


def test_standardised_leaves_out_what_never_changes():
    values = np.array([[1.0, 5.0, np.nan, 0.0], [3.0, 5.0, np.nan, np.nan], [5.0, 5.0, 2.0, 1.0]])
    found = standardised(values)
    np.testing.assert_allclose(found[:, 0], np.array([-1, 0, 1]) * math.sqrt(1.5))
    assert np.isnan(found[:, 1:3]).all()
    np.testing.assert_allclose(found[:, 3], [-1, np.nan, 1])


def test_the_two_sided_test_against_every_relabelling():
    visited, times = [1, 0, 1, 0, 0, 1, 0], [9.0, 2.0, 8.0, 3.0, math.inf, 7.0, 3.0]
    r, p = visit_test(visited, times)
    ranks = np.array([5, 0, 4, 1.5, 6, 3, 1.5])
    assert r == pytest.approx(np.corrcoef(visited, ranks)[0, 1])
    every = [np.corrcoef([i in s for i in range(7)], ranks)[0, 1] for s in itertools.combinations(range(7), 3)]
    assert p == pytest.approx(np.mean(np.abs(every) >= abs(r) - 1e-12))


def test_p_is_never_above_one_nor_zero_and_is_uniform_under_no_effect():
    assert (
        visit_test([1, 0, 1, 0], [1.0, 1.0, 2.0, 2.0])[1] == 1.0
    )  # no correlation at all: 2·(one-sided p) would be above 1
    rng = np.random.default_rng(0)
    p = [visit_test(rng.permutation(10) < 4, rng.random(10))[1] for _ in range(300)]
    assert min(p) > 0 and max(p) <= 1
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09
    drawn = visit_test(np.arange(40) < 20, np.arange(40.0))  # too many ways to count: drawn, and not 0
    assert drawn[0] < -0.8 and 0 < drawn[1] < 0.001
    assert np.isnan(visit_test([1, 1], [1.0, 2.0])).all() and np.isnan(visit_test([1, 0], [math.nan, 2.0])).all()


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, math.nan, 0.03]), [0.03, 0.06, np.nan, 0.06])
    assert holm([0.7, 0.9]) == [1.0, 1.0]


def test_convergence_steps():
    log = [{"step": 10, "eval_loss": 1.0}, {"step": 15, "loss": 0.1}, {"step": 20, "eval_loss": 0.4}]
    assert convergence_step(log, "eval_loss", 0.5, low=True) == 20
    assert convergence_step(log, "eval_loss", 0.1, low=True) == math.inf
    assert convergence_step(log, "eval_loss", 0.3, low=False) == 10
    assert math.isnan(convergence_step(log, "accuracy", 0.5, low=False))


def test_the_number_of_states_by_held_out_likelihood():
    rng = np.random.default_rng(0)
    paths = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2]] * 5 + [[0, 0, 1, 1, 1, 1, 2, 2, 2]] * 5)
    x = np.array([[-1.5, 0.0], [0.0, 1.5], [1.5, 0.0]])[paths] + 0.2 * rng.normal(size=(10, 9, 2))
    x[0, 4] = np.nan
    curve = held_out(x, most=5, seed=0)
    assert max(curve, key=curve.__getitem__) == 3, curve


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def job(monkeypatch, capsys):
    """The script as a function: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_states.py", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


def test_as_a_job_it_exits_as_the_command_line_does(tmp_path):
    script = REPOSITORY / "pipelines" / "run_states.py"
    done = forked.run(script, "none", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("ModelError: ") and "Traceback" not in done.stderr


def test_a_planted_detour_is_found_exactly(sweep, job):
    code, text, _ = job(*sweep, "--json", "--most", "4")
    assert code == 0
    found = json.loads(text)
    paths = {run["run"]: run["states"] for run in found["runs"]}
    names = dict(zip((paths["run0"][k] for k in (0, 5, 8, 23)), "acbd"))
    for number in range(12):
        assert "".join(names[s] for s in paths[f"run{number}"]) == (ROUND if number < 6 else STRAIGHT)
    detours = [state for state in found["states"] if state["detour"]]
    assert [names[state["state"]] for state in detours] == ["c"]
    assert sorted(detours[0]["runs"]) == [f"run{i}" for i in range(6)]
    assert detours[0]["p"] == detours[0]["p_holm"] == pytest.approx(2 / math.comb(12, 6))
    assert all(state["p"] is None for state in found["states"] if not state["detour"])  # every run visits the others
    moves = {(names[m["from"]], names[m["to"]]): m["runs"] for m in found["moves"]}
    assert moves == {("a", "b"): 6, ("a", "c"): 6, ("c", "b"): 6, ("b", "d"): 12}


def test_with_as_many_states_as_the_likelihood_wants_the_first_detour_is_the_planted_one(sweep):
    """Later states can be flagged beside it, since z-scores within a run carry its detour into the run's other checkpoints."""
    runs, found = states_of_sweep(sweep, quiet=True)
    first = next(number for number, state in enumerate(found.states) if state.detour)
    for number in range(12):
        path = found.paths[f"run{number}"]
        planted = ROUND if number < 6 else STRAIGHT
        assert [s == first for s in path] == [letter == "c" for letter in planted]
    text = report(runs, found)
    assert "DETOUR" in text and f"{len(found.states)} states" in text


def test_times_of_ones_own_and_none(sweep, tmp_path, job):
    times = tmp_path / "times.csv"
    times.write_text("run,step\n" + "".join(f"run{i},{'' if i == 0 else 100 - i}\n" for i in range(12)))
    code, text, _ = job(*sweep, "--times", times, "--quiet", "--most", "4")
    assert code == 0 and "never" in text and text.count("DETOUR") == 1
    code, text, wrong = job(*sweep, "--metric", "eval_rouge", "--quiet")
    assert code == 2 and text == "" and "--metric eval_rouge: no run's log has it; the logs have eval_loss" in wrong
    for run in (bare := tmp_path / "bare", *sweep):  # the same runs without their logs
        run.mkdir() if run == bare else shutil.copytree(
            run, bare / run.name, ignore=shutil.ignore_patterns("trainer_state.json")
        )
    code, text, _ = job(*(bare / run.name for run in sweep), "--quiet", "--most", "1")
    assert code == 0 and "not known" in text and "DETOUR" not in text
    times.write_text("run,step\nrun1,7\n")
    code, text, wrong = job(*sweep, "--times", times, "--quiet")
    assert code == 2 and text == "" and "no line for run 'run0'" in wrong


def test_folders_of_one_name_are_told_apart(tmp_path):
    assert labels([tmp_path / "a" / "sft", tmp_path / "b" / "sft"]) == ["a/sft", "b/sft"]
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    with pytest.raises(UsageError, match="named twice"):
        labels([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_what_cannot_be_a_sweep(tmp_path, sweep, job):
    with pytest.raises(UsageError, match="at least 3"):
        run_states([Run("a", (1, 2), np.zeros((2, 14)))])
    with pytest.raises(UsageError, match="two runs are called 'a'"):
        run_states([Run("a", (1, 2), np.zeros((2, 14)))] * 3)
    with pytest.raises(UsageError, match="nothing about the weights changes"):
        run_states([Run(name, (1, 2), np.zeros((2, 14))) for name in "abc"])
    (tmp_path / "empty").mkdir()
    code, _, wrong = job(*sweep[:2], tmp_path / "empty", "--quiet")
    assert code == 1 and "holds no checkpoint" in wrong
    with pytest.raises(ModelError, match="no weights"):
        checkpoint_tensors(tmp_path / "empty")
