"""The flip table where pairs are unknown at some checkpoints, and backwards."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from curate.data.records import Record
from curate.report.summary import summarise
from curate.rows import Pair
from curate.store import DatasetValue, Measured, Store

UNKNOWN = float("nan")


@pytest.fixture
def store(tmp_path):
    """Two pairs known at steps 0 and 20, two at 10; logp− is −1.5 throughout."""
    made = Store(tmp_path / "store", create=True)
    pairs = [Pair(f"p{i}", "a", "b") for i in range(4)]
    made.add_source("pairs", "f", (Record("pairs", i, pair) for i, pair in enumerate(pairs)))
    chosen = {0: [-1, -2, UNKNOWN, UNKNOWN], 10: [UNKNOWN, UNKNOWN, -2, -1], 20: [-1, -1, UNKNOWN, UNKNOWN]}
    for step, values in chosen.items():
        measured = Measured(f"f{step}", "likelihood", "forward", run="dpo", checkpoint=f"c{step}", step=step)
        columns = {"chosen_logp": np.array(values, float), "rejected_logp": np.full(4, -1.5)}
        made.write_shard(measured, 0, [pair.row_id for pair in pairs], columns)
    made.ingest()
    return made


def test_a_checkpoint_where_none_of_the_pairs_is_known(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summarise(store)
        nothing = summarise(store, between=(0, 10)).flips[0]
    (flips,) = found.flips
    assert [p["ranking_accuracy"] for p in flips.path] == [0.5, pytest.approx(UNKNOWN, nan_ok=True), 1.0]
    assert found.to_json()["flips"][0]["path"][1]["chosen_logp"] is None
    assert "Of the 1 pair ranked wrong before, 100% (21% to 100%) are ranked right now." in found.text()
    assert (nothing.wrong, [c.n for c in nothing.cells]) == (0, [0, 0, 0, 0])


def test_the_path_goes_from_the_first_of_the_two_to_the_second(store):
    (flips,) = summarise(store, between=(20, 0)).flips
    assert [p["checkpoint"] for p in flips.path] == ["c20", "c10", "c0"]
    assert [p["to_wrong"] for p in flips.path] == [0, 0, 1]


def test_ranking_accuracies_come_before_the_idealised_ones_of_their_run(store):
    names = ["idealised_ranking_accuracy_b1", "ranking_accuracy", "heldout_idealised_ranking_accuracy_b1"]
    names += ["heldout_ranking_accuracy", "idealised_ranking_accuracy_ln_b1", "ranking_accuracy_ln"]
    values = [DatasetValue(name, 0.5) for name in names] + [DatasetValue("ranking_accuracy", 0.5, run="a", step=1)]
    store.write_dataset_values("import:test", values)
    assert [(v["run"], v["name"]) for v in summarise(store).values] == [
        ("", "heldout_ranking_accuracy"),
        ("", "ranking_accuracy"),
        ("", "ranking_accuracy_ln"),
        ("", "heldout_idealised_ranking_accuracy_b1"),
        ("", "idealised_ranking_accuracy_b1"),
        ("", "idealised_ranking_accuracy_ln_b1"),
        ("a", "ranking_accuracy"),
    ]


def test_numbers_stand_under_what_they_are(store):
    store.write_dataset_values("import:test", [DatasetValue("accuracy", 0.5, low=0.4, high=0.6, n=10)])
    lines = summarise(store).text().splitlines()
    at = lines.index("Answers that are right, of those sampled or tested:")
    assert lines[at + 1].split() == ["what", "estimate", "95%", "interval", "rows"]
    assert lines[at + 3].split() == ["accuracy", "0.5", "0.4", "to", "0.6", "10"]
