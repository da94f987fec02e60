"""Decisions by arrays are the decisions row by row, to the last reason, count and note, over random rules with ties, NULLs, groups and budgets."""

from __future__ import annotations

import numpy as np
import pytest

from curate.errors import CurateError
from curate.workflow.decide import Candidates, Compared, decide
from curate.workflow.spec import SelectSpec
from tests.workflow import slow_decide

WORST = {"loss": "high", "gap": "low", "tied": "high"}


def case(seed: int):
    """A rule, and the same rows as each of the two takes them."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([0, 1, 7, 40, 200]))
    some = lambda values, share: np.where(rng.random(n) < share, np.nan, values)  # noqa: E731
    groups = rng.choice(["a", "b", "NULL", "ü"], n).tolist()
    groups = [None if rng.random() < 0.1 else g for g in groups] if seed % 3 else [None] * n
    held = rng.choice([None, "row", "prompt"], n, p=[0.8, 0.1, 0.1]).tolist() if seed % 2 else None
    parts = []
    for text in ("a < 1", "b > 2"):
        parts.append((text, rng.random(n) < 0.4, some(rng.normal(size=n), 0.3), some(rng.normal(size=n), 0.3)))
    passed = some((~(parts[0][1] | parts[1][1])).astype(float), 0.05)
    order_unknown = [None if rng.random() < 0.9 else str(rng.choice(["k", "l"])) for _ in range(n)]
    shared = {
        "row_ids": [f"{x:05x}" for x in rng.permutation(n * 7)[:n]],
        "passed": passed,
        "scores": {
            "loss": some(rng.normal(size=n), 0.1),
            "gap": some(rng.integers(-2, 3, n).astype(float), 0.1),
            "tied": np.where(rng.random(n) < 0.5, 0.0, -0.0),
        },
        "order": rng.permutation(n),
        "order_unknown": order_unknown if seed % 5 == 0 else [None] * n,
        "groups": groups,
        "tokens": some(rng.integers(1, 9, n).astype(float), 0.05),
        "weight": rng.integers(1, 4, n).astype(float) if seed % 2 else np.ones(n),
        "excused": {"loss": rng.random(n) < 0.5} if seed % 4 == 0 else {},
        "held": held,
    }
    compared = [None] * n
    for text, false, value, cut in parts:
        for i in range(n):
            if false[i] and compared[i] is None:
                compared[i] = (text, *(None if np.isnan(x[i]) else float(x[i]) for x in (value, cut)))
    masked = [
        Compared(text, false, *(np.ma.masked_invalid(x) for x in (value, cut))) for text, false, value, cut in parts
    ]
    keep = [
        None,
        {"share": float(rng.choice([0.0, 0.3, 0.5, 1.0]))},
        {"rows": int(rng.integers(0, 30))},
        {"tokens": int(rng.integers(0, 300))},
    ]
    per = [None, "g", {"g": {"a": 0.5, "b": {"rows": 3}}}]
    spec = SelectSpec(
        where="a < 1 AND\n b > 2" if rng.random() < 0.7 else None,
        drop_worst={name: float(rng.choice([0.0, 0.01, 0.2, 0.5])) for name in WORST if rng.random() < 0.5},
        order_by=[None, "k desc", "random"][rng.integers(3)],
        keep=keep[rng.integers(4)],
        per=per[rng.integers(3)] if seed % 3 else None,
        duplicates="as_found" if seed % 2 else "once",
        unknown=str(rng.choice(["error", "keep", "drop", "drop"])),
        exclude="heldout" if held is not None else None,
    )
    fast = Candidates(**shared, compared=masked if seed % 7 else None)
    slow = slow_decide.Candidates(**shared, compared=compared if seed % 7 else None)
    return spec, fast, slow


def outcome(make, rows, spec):
    try:
        found = make(rows, spec, WORST)
    except (CurateError, IndexError) as error:
        return type(error).__name__, str(error)
    reasons = list(found.reasons)
    return (
        found.kept.tolist(),
        found.rank.tolist(),
        reasons,
        [str(reason) for reason in reasons],
        found.counts,
        list(found.counts["dropped_by"]),
    )


@pytest.mark.parametrize("block", range(8))
def test_the_same_as_row_by_row(block):
    for seed in range(block * 60, block * 60 + 60):
        spec, fast, slow = case(seed)
        assert outcome(decide, fast, spec) == outcome(slow_decide.decide, slow, spec), (seed, spec)
