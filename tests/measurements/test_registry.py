"""The registry: what a measurement declares, who provides a column, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from curate.errors import CurateError
from curate.measurements import MEASUREMENTS, measurement, providers
from curate.passes.contract import Measurement
from curate.passes.head import STATISTICS


@pytest.fixture
def registry():
    before = dict(MEASUREMENTS)
    yield MEASUREMENTS
    MEASUREMENTS.clear()
    MEASUREMENTS.update(before)


@pytest.mark.parametrize("m", MEASUREMENTS.values(), ids=lambda m: m.name)
def test_every_measurement_says_what_it_is(m: Measurement):
    assert m.function.__doc__
    assert m.columns
    assert all(unit for unit in m.columns.values())
    assert set(m.head) <= set(STATISTICS)


@pytest.mark.parametrize(
    "column, kind, name",
    [
        ("chosen_logp", "preference", "likelihood"),
        ("target_nll", "sft", "target_likelihood"),
        ("prompt_tokens", "preference", "length"),
        ("prompt_tokens", "sft", "completion_length"),
        ("chosen_logp", "sft", None),
        ("nonsense", "sft", None),
    ],
)
def test_providers(column, kind, name):
    found = providers(column, kind)
    assert (found.name if found else None) == name


def test_two_of_one_column_are_refused(registry):
    with pytest.raises(CurateError, match="both give the column 'chosen_logp'"):

        @measurement(reads="forward", kind="any", columns={"chosen_logp": "nats"})
        def another(batch):
            """Another."""

    assert "another" not in registry


def test_two_of_one_name_are_refused(registry):
    with pytest.raises(CurateError, match="two measurements are called 'likelihood'"):
        measurement(reads="forward", kind="preference", columns={"x": "nats"}, name="likelihood")(lambda batch: {})


def test_registry_loads_no_torch():
    """A plan looks columns up; it must not pay for torch."""
    code = "import sys, curate.measurements; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
