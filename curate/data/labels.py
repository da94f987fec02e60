"""Class labels by their names: `datasets` stores a number and keeps what it stands for in the features (a parquet file in its metadata)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curate.recipe.bounds import json_value

Labels = dict[str, list[str]]  # column -> the names of its numbers


def class_names(features: Any) -> Labels:
    """The columns that are class labels: of `datasets.Features`, or of a parquet file's metadata, if it has any."""
    if isinstance(features, Mapping) and b"huggingface" in features:
        try:
            features = json_value(features[b"huggingface"])["info"]["features"]
        except (ValueError, KeyError, TypeError):
            return {}
    if not isinstance(features, Mapping):
        return {}
    by_column = {str(column): _names(feature) for column, feature in features.items() if isinstance(column, str)}
    return {column: names for column, names in by_column.items() if names}


def _names(feature: Any) -> list[str]:
    """The names of a class label, or of a list of labels; [] of anything else."""
    if isinstance(feature, list) and len(feature) == 1:
        return _names(feature[0])
    get = feature.get if isinstance(feature, Mapping) else lambda key: getattr(feature, key, None)
    kind = get("_type") or type(feature).__name__
    if kind == "ClassLabel":
        names = get("names")
        return [str(name) for name in names] if isinstance(names, list | tuple) else []
    return _names(get("feature")) if kind in ("List", "LargeList", "Sequence") else []


def with_names(row: dict[str, Any], labels: Labels) -> dict[str, Any]:
    """The row with names for its labels' numbers; -1, which `datasets` writes where there is no label, is None."""
    if not labels:
        return row
    return row | {column: _named(row[column], names) for column, names in labels.items() if column in row}


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_named(item, names) for item in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if 0 <= value < len(names):
        return names[value]
    return None if value == -1 else value
