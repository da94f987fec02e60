"""Pass rates, their intervals, pass@k and bands, against tables by hand and against plain Python's exact fractions."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import duckdb
import numpy as np
import pytest

from curate.measurements.accuracy import Graded, accuracy
from curate.scores import DATASET_VALUES, SCORES
from curate.scores.intervals import wilson
from curate.scores.rates import BANDS

nan = np.nan
# right ones, samples: pass rate, its 95% interval (Wilson's formula by hand), band of .2 .. .8
TABLE = [
    (0, 4, 0.0, 0.0, 0.4899, "undecided"),  # too few to tell: neither all wrong nor undecided is claimed lightly
    (0, 16, 0.0, 0.0, 0.1936, "all_wrong"),
    (1, 32, 0.03125, 0.0055, 0.1574, "below"),
    (1, 5, 0.2, 0.0362, 0.6245, "undecided"),
    (4, 8, 0.5, 0.2152, 0.7848, "inside"),
    (16, 32, 0.5, 0.3363, 0.6637, "inside"),
    (31, 32, 0.96875, 0.8426, 0.9945, "above"),
    (16, 16, 1.0, 0.8064, 1.0, "all_right"),
    (4, 4, 1.0, 0.5101, 1.0, "undecided"),
    (nan, 4, nan, nan, nan, None),  # nothing to grade by
    (nan, nan, nan, nan, nan, None),
    (0, 0, nan, nan, nan, None),
    (5, 4, nan, nan, nan, None),  # no such counts
]
COUNTS = {"n_correct": [row[0] for row in TABLE], "n_samples": [row[1] for row in TABLE]}


def test_the_table_by_hand():
    for name, at in (("pass_rate", 2), ("pass_rate_low", 3), ("pass_rate_high", 4)):
        np.testing.assert_allclose(SCORES[name].compute(COUNTS), [row[at] for row in TABLE], atol=5e-5)
    codes = SCORES["pass_band"].compute(COUNTS)
    assert [None if np.isnan(code) else BANDS[int(code)] for code in codes] == [row[5] for row in TABLE]


def test_the_interval_is_the_one_of_dataset_values():
    c, n = np.array([(c, n) for n in range(1, 33) for c in range(n + 1)], float).T
    low, high = (SCORES[name].compute({"n_correct": c, "n_samples": n}) for name in ("pass_rate_low", "pass_rate_high"))
    np.testing.assert_allclose(np.stack([low, high]).T, [wilson(a / b, int(b)) for a, b in zip(c, n, strict=True)])


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_pass_at_is_the_share_of_subsets_with_a_right_one(k):
    pairs = [(c, n) for n in range(1, 17) for c in range(n + 1)]
    counts = {"n_correct": [c for c, _ in pairs], "n_samples": [n for _, n in pairs]}
    exact = [float(1 - Fraction(comb(n - c, k), comb(n, k))) if n >= k else nan for c, n in pairs]
    np.testing.assert_allclose(SCORES["pass_at"].compute(counts, params={"k": k}), exact, atol=1e-15)


def test_pass_at_is_unbiased():
    """Its mean over all outcomes of n samples, by the exact binomial, is 1 − (1 − p)^k; that of the plug-in is not."""
    p, n, k = 0.3, 8, 4
    c = np.arange(n + 1)
    chance = np.array([comb(n, int(i)) * p**i * (1 - p) ** (n - i) for i in c])
    estimate = SCORES["pass_at"].compute({"n_correct": c, "n_samples": np.full(n + 1, n)}, params={"k": k})
    assert chance @ estimate == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(chance @ (1 - (1 - c / n) ** k) - (1 - (1 - p) ** k)) > 0.01


def test_a_band_works_on_counts():
    """BETWEEN in SQL over the stored double has a row in it where the fraction c/n itself is: at every end a decimal can name."""
    c, n = np.array([(c, n) for n in range(1, 65) for c in range(n + 1)], float).T
    rates = SCORES["pass_rate"].compute({"n_correct": c, "n_samples": n})  # noqa: F841 (DuckDB reads it)
    for low, high in ((".2", ".8"), (".1", ".9"), (".05", ".95"), (".3", ".7"), (".25", ".375")):
        inside = duckdb.sql(f"SELECT rates.column0 BETWEEN {low} AND {high} FROM rates").fetchnumpy().popitem()[1]
        exact = [Fraction(low) <= Fraction(int(a), int(b)) <= Fraction(high) for a, b in zip(c, n, strict=True)]
        assert inside.tolist() == exact


def test_values_of_a_set():
    """Of the nine rows whose counts are known: two all wrong, two all right."""
    values = {v.name: v for v in DATASET_VALUES["pass_rate_values"].compute(COUNTS)}
    assert values["pass_rate_all_wrong"].value == values["pass_rate_all_right"].value == 2 / 9
    assert values["pass_rate_mixed"].value == 5 / 9 and values["pass_rate_mixed"].n == 9
    assert values["pass_rate"].value == pytest.approx(np.nanmean([row[2] for row in TABLE]))
    by_band = {v.name.removeprefix("pass_band_"): v.value for v in DATASET_VALUES["pass_band_values"].compute(COUNTS)}
    assert by_band == {name: sum(row[5] == name for row in TABLE) / 9 for name in BANDS}
    [at] = DATASET_VALUES["pass_at_values"].compute(COUNTS, params={"k": 8})
    assert (at.name, at.n) == ("pass_at_8", 6)  # of rows with 8 samples or more


@pytest.mark.parametrize(
    ("leave_out", "rates"), [(False, [0.5, 0.0, 1.0]), (True, [2 / 3, nan, 1.0])], ids=["wrong", "leave_out"]
)
def test_unfinished_samples_count_as_the_recipe_says(leave_out, rates):
    """Of the first row's four samples one was cut before it gave an answer, of the second's both."""
    right, wrong = Graded(True, outcome="right"), Graded(False, outcome="wrong")
    cut = Graded(False, finished=False, outcome="unfinished", counts=not leave_out)
    columns = accuracy([[right, right, wrong, cut], [cut, cut], [right]])
    np.testing.assert_allclose(SCORES["pass_rate"].compute(columns), rates)


def test_a_band_has_two_ends():
    from curate.errors import UsageError

    with pytest.raises(UsageError, match="low below high"):
        SCORES["pass_band"].compute(COUNTS, params={"low": 0.8, "high": 0.2})
