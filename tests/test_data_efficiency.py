"""The data-efficiency study: the arithmetic of its table by hand, its rows, and that the committed result is whole."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from benchmarks import data_efficiency as study


def test_rows_needed_reads_the_iid_curve_in_log_rows():
    sizes, mean = [100, 200, 400], np.array([0.2, 0.4, 0.6])
    table = [(0.4, 200.0), (0.5, 200 * 2**0.5), (0.3, 100 * 2**0.5), (0.6, 400.0), (0.1, 100.0), (0.61, np.inf)]
    for accuracy, rows in table:
        assert study.rows_needed(accuracy, sizes, mean) == pytest.approx(rows)
    dented = np.array([0.2, 0.1, 0.6])  # made monotone: 0.2, 0.2, 0.6
    assert study.rows_needed(0.4, sizes, dented) == pytest.approx(200 * 2**0.5)


def test_the_interval_is_students():
    mean, half = study.interval(np.array([1.0, 2.0, 3.0]))  # s = 1, t(2) = 4.303
    assert (mean, half) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert study.interval(np.array([1.0]))[1] == np.inf


def test_kinds_come_in_the_shares_of_what_was_picked():
    drawn = [study.apportioned({"a": 1, "b": 2, "c": 5}, 10, random.Random(seed)) for seed in range(200)]
    for kinds in drawn:
        assert len(kinds) == 10
        for kind, share in (("a", 1.25), ("b", 2.5), ("c", 6.25)):
            assert kinds.count(kind) in (int(share), int(share) + 1)
    assert np.mean([kinds.count("b") for kinds in drawn]) == pytest.approx(2.5, abs=0.15)


def test_every_method_starts_alike_and_no_prompt_occurs_twice():
    start = {"picked": {name: {"times2": 3, "add3": 1} for name in study.METHODS if name != "iid"}}
    done = {(7, "start", study.SETTINGS["start"]): start}
    sets = {name: study.training_rows(7, name, study.BUDGETS[0], done) for name in study.METHODS}
    test = {row.prompt for row in study.task.splits(seed=7, train=0, test=study.SETTINGS["test"], pool=0)["test"]}
    n = study.SETTINGS["start"]
    for rows in sets.values():
        assert rows[:n] == sets["iid"][:n]
        prompts = {row.prompt for row in rows}
        assert len(prompts) == len(rows) == study.BUDGETS[0]
        assert not prompts & test
    new = [row.cell for row in sets["rounds"][n:]]
    assert new.count("times2") == 3 * new.count("add3") == 0.75 * study.SETTINGS["round"]
    assert sets["iid"] == study.training_rows(7, "iid", study.BUDGETS[1], {})[: study.BUDGETS[0]]  # nested


def test_the_other_rivals_take_part_in_the_first_seeds():
    first, later = study.cells_of(study.LEAST_SEEDS - 1), study.cells_of(study.LEAST_SEEDS)
    assert {method for _, method, _ in first} == {"start", *study.METHODS}
    assert {method for _, method, _ in later} == {"start", "rounds", "iid"}
    assert study.taking_part("loss", range(20)) == list(range(study.LEAST_SEEDS))
    assert study.taking_part("rounds", range(20)) == list(range(20))


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    file = tmp_path / "study.jsonl"
    lines = [{"seed": 0, "method": "start", "rows": 240, "accuracy": 0.5, "seconds": 1.0}]
    file.write_text(json.dumps(study.SETTINGS) + "\n" + json.dumps(lines[0]) + '\n{"seed": 0, "meth')
    done = study.load(file)
    assert done == {(0, "start", 240): lines[0]}
    assert study.left(done)[0] == (0, "rounds", study.BUDGETS[0])
    file.write_text(json.dumps({**study.SETTINGS, "steps": 1}) + "\n")
    with pytest.raises(SystemExit, match="other settings"):
        study.load(file)


def test_the_committed_result_is_whole():
    done = study.load()
    assert done
    assert len(study.finished_seeds(done)) >= 2
    text = study.report(done)
    assert text.count("±") > len(study.METHODS)
    for (seed, method, size), line in done.items():
        assert 0 <= line["accuracy"] <= 1
        if method == "rounds" and size < study.BUDGETS[-1]:
            assert sum(line["picked"]["rounds"].values()) == line["hard"]
        if method == "loss" and "picked" in line:  # as many as the hard rows of the same seed
            assert sum(line["picked"]["loss"].values()) == done[seed, "rounds", size]["hard"]
