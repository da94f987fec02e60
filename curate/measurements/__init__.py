"""What is read off a pass, one file per thing measured; declare.py has the decorator and says what it takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from curate.measurements import (  # noqa: F401 - each registers what it declares
    accuracy,
    alone,
    angles,
    entk,
    entropy,
    error,
    head_displacement,
    hidden,
    length,
    likelihood,
    neighbours,
    squeezing,
)
from curate.measurements.declare import MEASUREMENTS, measurement
from curate.measurements.directions import along_direction
from curate.passes.contract import Measurement
from curate.passes.tokens import Encoded, EncodedPair

__all__ = ["MEASUREMENTS", "Measurement", "measure_tokens", "measurement", "providers"]


def providers(column: str, kind: str) -> Measurement | None:
    """The measurement that gives a column for rows of a kind, made on the spot where the column's name says along which direction; None
    where none does.
    """
    for m in MEASUREMENTS.values():
        if column in m.columns and m.kind in (kind, "any"):
            return m
    return along_direction(column, kind)


def measure_tokens(
    encoded: Sequence[Encoded | EncodedPair], measurements: Sequence[Measurement]
) -> dict[str, np.ndarray]:
    """Measurements that read tokens alone: {column: (len(encoded),) float64}. NaN for rows of another kind."""
    out = {column: np.full(len(encoded), np.nan) for m in measurements for column in m.columns}
    for i, row in enumerate(encoded):
        kind = "preference" if isinstance(row, EncodedPair) else "sft"
        for m in measurements:
            if m.kind in (kind, "any"):
                for column, value in m.function(row).items():
                    out[column][i] = value
    return out
