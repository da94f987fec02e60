"""Flags: which signs hold, by a table and by ranks; a sign that was not measured is no sign."""

from __future__ import annotations

import numpy as np

from curate.scores import DATASET_VALUES, SCORES
from curate.scores.flags import REASONS, reasons

# ten pairs: CHES 0..9, valley depth 9..0; the last is negative in its own gradient, the first two unknown in one column each
CHES = np.arange(10.0)
COLUMNS = {
    "hidden_cc": np.full(10, 5.0),
    "hidden_cr": CHES + 5.0,
    "valley_depth": CHES[::-1].copy(),
}
# K++ = 1: K+− = 2, K−− = 9 gives ρ = (1 − 2)/(1 − 4 + 9) = −1/6; K+− = 0 gives ρ = 1/10
KERNEL = {
    "entk_cc": np.ones(10),
    "entk_cr": np.where(CHES >= 9, 2.0, 0.0),
    "entk_rr": np.full(10, 9.0),
}


def test_signs_by_a_table():
    """share = 0.2 of ten rows: the two highest of each rank."""
    found = SCORES["squeezing_prone"].compute(COLUMNS, params={"share": 0.2})
    np.testing.assert_array_equal(found, [1, 1, 0, 0, 0, 0, 0, 0, 1, 1])
    with_gradients = SCORES["squeezing_prone"].compute(COLUMNS | KERNEL, params={"share": 0.2})
    np.testing.assert_array_equal(with_gradients, [1, 1, 0, 0, 0, 0, 0, 0, 1, 2])
    weight = SCORES["squeezing_weight"].compute(COLUMNS | KERNEL, params={"share": 0.2})
    np.testing.assert_allclose(weight, 1 / (1 + with_gradients))


def test_a_low_forecast_is_one_only_below_zero():
    """share = 0.2 of ten rows: the two lowest forecasts, of which one is above 0."""
    forecast = {"reference.forecast_sign_chosen": np.where(CHES == 4, -3.0, np.where(CHES == 5, 0.5, 10.0))}
    found = SCORES["squeezing_prone"].compute(COLUMNS | forecast, params={"share": 0.2})
    np.testing.assert_array_equal(found, [1, 1, 0, 0, 1, 0, 0, 0, 1, 1])
    reason, values, holds = reasons(
        COLUMNS | {"forecast_sign_chosen": forecast["reference.forecast_sign_chosen"]}, 0.2
    )["forecast low"]
    np.testing.assert_array_equal(holds, CHES == 4)
    assert reason.says(values, 4).endswith("batch_forecast -3 nats per unit of step, below 90% of the pairs")


def test_what_is_unknown():
    columns = COLUMNS | {"valley_depth": np.where(CHES == 9, np.nan, CHES)}
    found = SCORES["squeezing_prone"].compute(columns, params={"share": 0.2})
    assert np.isnan(found[9]) and found[8] == 2  # by both ranks the highest that is known
    gone = SCORES["squeezing_prone"].compute(
        COLUMNS | dict.fromkeys(KERNEL, np.full(10, np.nan)), params={"share": 0.2}
    )
    np.testing.assert_array_equal(gone, [1, 1, 0, 0, 0, 0, 0, 0, 1, 1])  # gradients that were not taken are no sign


def test_the_shares_of_the_dataset():
    any_sign, two = DATASET_VALUES["squeezing_flags"].compute(COLUMNS | KERNEL, params={"share": 0.2})
    assert (any_sign.name, any_sign.value, any_sign.n) == ("squeezing_prone_any", 0.4, 10)
    assert (two.name, two.value) == ("squeezing_prone_two", 0.1) and two.low < 0.1 < two.high


def test_reasons_in_words():
    found = reasons(COLUMNS | KERNEL, 0.2)
    assert list(found) == [reason.name for reason in REASONS if reason.name != "forecast low"]  # which was not measured
    said = [reason.says(values, 9) for reason, values, holds in found.values() if holds[9] == 1]
    assert said == [
        "the hidden states of its two responses are alike: ches 9, above 90% of the pairs",
        "its own gradient pushes the chosen response down: displacement_share -0.167 nats per nat of margin",
    ]
