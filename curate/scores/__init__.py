"""Scores and dataset values, one file a family; declare.py has the two decorators and the registry of everything they decorate here."""

from __future__ import annotations

# The families: importing one registers its scores. Light: numpy only.
from curate.scores import (
    answers,  # noqa: F401
    cartography,  # noqa: F401
    displacement,  # noqa: F401
    flags,  # noqa: F401
    flips,  # noqa: F401
    forecast,  # noqa: F401
    gradients,  # noqa: F401
    hardness,  # noqa: F401
    limem,  # noqa: F401
    phases,  # noqa: F401
    premem,  # noqa: F401
    ranking,  # noqa: F401
    ranking_values,  # noqa: F401
    rates,  # noqa: F401
    squeezing,  # noqa: F401
    trajectories,  # noqa: F401
)
from curate.scores.declare import DATASET_VALUES, SCORES, dataset_value, resolve, score
from curate.scores.declared import DatasetValue, Need, Score, Value
from curate.scores.parameters import Parameter, Positive, Range, Share

__all__ = [
    "DATASET_VALUES",
    "SCORES",
    "DatasetValue",
    "Need",
    "Parameter",
    "Positive",
    "Range",
    "Score",
    "Share",
    "Value",
    "dataset_value",
    "resolve",
    "score",
]
