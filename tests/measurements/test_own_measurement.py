"""The example of a user's own measurement: one file, the same pass, the right numbers."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.loading.model import Model
from tests.passes.forward_models import double, make, oracle_side, random_pairs

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_measurement.py"


@pytest.fixture
def example():
    before = dict(MEASUREMENTS)
    yield runpy.run_path(str(EXAMPLE))
    MEASUREMENTS.clear()
    MEASUREMENTS.update(before)


def test_the_example_measures_what_it_says(example):
    module, pairs = make("llama"), random_pairs(6)
    model = Model(module)
    calls = []
    run = model.packed_states
    model.packed_states = lambda layout: calls.append(layout) or run(layout)
    wanted = [MEASUREMENTS["likelihood"], MEASUREMENTS["hidden"], example["stumbles"].measurement]
    found = forward.measure(model, pairs, wanted)
    assert len(calls) == 1  # fused: no second forward
    module64 = double(module)
    for name in ("chosen", "rejected"):
        shares = []
        for pair in pairs:
            side = getattr(pair, name)
            logp, _ = oracle_side(module64, side)
            own = logp[np.arange(side.n_response), side.ids[side.start :].astype(int)]
            shares.append(float((logp.amax(1) - own > 3).double().mean()))
        np.testing.assert_allclose(found[f"{name}_stumbles"], shares)
    score = example["stumble"].compute(found)
    np.testing.assert_allclose(score, found["chosen_stumbles"] - found["rejected_stumbles"])


def test_the_file_is_short():
    lines = [line for line in EXAMPLE.read_text().split('if __name__ == "__main__":')[0].splitlines() if line.strip()]
    assert len(lines) <= 32
