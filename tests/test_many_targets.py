"""The example on the demo's own rows: what it names as a target's strongest rows are problems of the same kind, and its table holds every pair."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow.parquet as pq

from examples import many_targets


def kind(row) -> str:
    """Which sort of problem, by its operator."""
    return next(name for name in (" * ", " < ", " + ", " - ") if name in row.completion)


def test_a_targets_strongest_rows_are_of_its_kind(tmp_path):
    path, train, targets = many_targets.built_in()
    found = many_targets.influence(path, train[:40], targets)
    for m, rows in enumerate(many_targets.strongest(found.cosines, 2)):
        assert [kind(train[i]) for i in rows] == [kind(targets[m])] * 2
        assert found.cosines[rows[0], m] == found.cosines[:, m].max()
    text = many_targets.report(train[:40], targets, found.cosines, top=2)
    assert text.count("\n") == 3 * 3 - 1
    assert f"target 1  {targets[1].row_id}" in text
    many_targets.write(tmp_path / "influence.parquet", train[:40], targets, found)
    table = pq.read_table(tmp_path / "influence.parquet").to_pydict()
    at = 2 * 40 + 7
    assert (table["target_id"][at], table["row_id"][at]) == (targets[2].row_id, train[7].row_id)
    assert table["product"][at] == found.products[7, 2]


def test_unknown_values_are_left_out():
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [2.0, np.nan]])
    assert many_targets.strongest(values, 3) == [[2, 0], []]


def test_half_of_the_arguments_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["many_targets.py", "a-model", "rows.jsonl"])
    assert many_targets.main() == 2
    assert "MODEL TRAIN TARGETS" in capsys.readouterr().err
