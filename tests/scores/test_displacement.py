"""CHES from inner products, against a loop over hidden states."""

from __future__ import annotations

import numpy as np
import pytest

from curate.errors import UsageError
from curate.scores import SCORES


def test_by_hand():
    """h+ = (1, 2) of 2 states, h− = (3, −1) of 4: ⟨h+, h−⟩ = 1, ‖h+‖² = 5."""
    columns = {"hidden_cc": [5.0], "hidden_cr": [1.0], "chosen_tokens": [2.0], "rejected_tokens": [4.0]}
    assert SCORES["ches"].compute(columns)[0] == -4
    assert SCORES["ches_ln"].compute(columns)[0] == 1 / 8 - 5 / 4
    assert np.isnan(SCORES["ches_ln"].compute({**columns, "chosen_tokens": [0.0]})[0])
    assert SCORES["last_state_product"].compute({"last_cr": [-3.5]})[0] == -3.5
    assert SCORES["edit_distance"].compute({"edit_distance": [0.25]})[0] == 0.25


@pytest.mark.parametrize("eos_state", [False, True])
def test_against_a_loop_over_states(eos_state):
    """T states predict a response of T tokens; with the EOS position's own state there are T + 1. ches_ln is CHES of the means."""
    rng = np.random.default_rng(0)
    columns = {
        name: []
        for name in ("hidden_cc", "hidden_cr", "hidden_eos_cc", "hidden_eos_cr", "chosen_tokens", "rejected_tokens")
    }
    slow, slow_ln = [], []
    for _ in range(20):
        tc, tr = rng.integers(1, 9, 2)
        states_c, states_r = rng.normal(size=(tc + 1, 6)), rng.normal(size=(tr + 1, 6))  # the last is EOS's own
        for prefix, cut in (("hidden", -1), ("hidden_eos", None)):
            plus, minus = states_c[:cut].sum(0), states_r[:cut].sum(0)
            columns[f"{prefix}_cc"].append(plus @ plus)
            columns[f"{prefix}_cr"].append(plus @ minus)
        columns["chosen_tokens"].append(tc)
        columns["rejected_tokens"].append(tr)
        used_c, used_r = (states_c, states_r) if eos_state else (states_c[:-1], states_r[:-1])
        slow.append(used_c.sum(0) @ used_r.sum(0) - used_c.sum(0) @ used_c.sum(0))
        slow_ln.append(used_c.mean(0) @ used_r.mean(0) - used_c.mean(0) @ used_c.mean(0))
    np.testing.assert_allclose(SCORES["ches"].compute(columns, params={"eos_state": eos_state}), slow, rtol=1e-12)
    np.testing.assert_allclose(SCORES["ches_ln"].compute(columns, params={"eos_state": eos_state}), slow_ln, rtol=1e-12)


def test_the_eos_convention_needs_its_columns():
    with pytest.raises(UsageError, match="score ches: eos_state: true needs hidden_eos_cc"):
        SCORES["ches"].compute({"hidden_cc": [5.0], "hidden_cr": [1.0]}, params={"eos_state": True})
