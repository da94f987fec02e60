"""From measured columns to scores: which fingerprints make a series, and in which order."""

from __future__ import annotations

import numpy as np

from curate.scores import SCORES, score
from curate.scoring import series_of
from curate.store import Measured


def measured(name: str, step: int | None) -> Measured:
    return Measured(name, "likelihood", "forward", run="sft", checkpoint=name, step=step)


def test_a_checkpoint_of_an_unknown_step_comes_last():
    """A model beside the numbered checkpoints (`merged/`) is the plan's last one, whatever number its place in the list is."""
    known = [measured("checkpoint-100", 100), measured("checkpoint-200", 200), measured("merged", None)]
    uses = {("", "target_nll", "checkpoints"): [m.fingerprint for m in known]}
    (series,) = series_of(known, uses, "checkpoints")
    assert series.columns["target_nll"] == ["checkpoint-100", "checkpoint-200", "merged"]
    assert series.steps == (100, 200, None)


def test_where_no_step_is_known_the_order_stands_for_it():
    known = [measured("b", None), measured("a", None)]
    (series,) = series_of(known, {("", "target_nll", "checkpoints"): ["b", "a"]}, "checkpoints")
    assert series.steps == (0, 1) and series.checkpoints == ("b", "a")


def test_scores_take_a_step_that_nobody_knows():
    accuracy = np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    first = SCORES["first_learned_step"].compute({"accuracy": accuracy}, steps=(100, 200, None))
    assert first.tolist()[0] == 200 and np.isnan(first[1])
    logps = {"chosen_logp": np.array([[-2.0, -1.0, -3.0]]), "rejected_logp": np.array([[-1.0, -2.0, -1.0]])}
    flipped = SCORES["flipped"].compute(logps, steps=(100, 200, None), params={"last": 200})
    assert flipped.tolist() == [1.0]

    @score(needs=("accuracy",), over="checkpoints")
    def given(accuracy, *, steps=None):
        return np.full(len(accuracy), steps.dtype.kind == "i", float)

    assert given.compute({"accuracy": accuracy}, steps=(0, 1, 2)).tolist() == [1.0, 1.0]
