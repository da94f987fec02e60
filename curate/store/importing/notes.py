"""What is said of an import, and what it may not be called: names that mean something else here, values that are there already."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from curate.errors import UsageError
from curate.models.naming import natural
from curate.store.importing.rows import own_columns
from curate.store.imports import Import
from curate.store.store import Store
from curate.store.views import BASE

NOT_OURS = (*BASE, "index", "key", "run", "checkpoint", "step", "subject")


def check_columns(store: Store, columns: Mapping[str, np.ndarray]) -> None:
    """UsageError for a column whose name is one of ours, a score's, a column of the user's data, or an imported one of another type."""
    from curate.scores import SCORES

    readable = numeric_names() | {"n_samples", "n_correct", "accuracy", "target_nll", "target_logp", "trained"}
    scores = {name: recipe["name"] for recipe in store.recipes() for name in _score_names(recipe["text"])}
    own = {name.lower(): name for name in own_columns(store)}
    for name, values in columns.items():
        alias = f"give it another name, such as `--map imported_{name}=…`"
        if name.lower() in NOT_OURS:
            raise UsageError(f"--map {name}=: every row has a column {name!r} of ours; {alias}.")
        if name in readable:
            continue
        if name in SCORES or name in scores:
            whose = f"the recipe {scores[name]!r} computes" if name in scores else "curate computes"
            raise UsageError(f"--map {name}=: {name!r} is a score that {whose}; {alias}.")
        if name.lower() in own:
            raise UsageError(f"--map {name}=: your data has a column {own[name.lower()]!r} already; {alias}.")
        _check_type(store, name, values)


def _check_type(store: Store, name: str, values: np.ndarray) -> None:
    """A column keeps its type: numbers that become text, or the other way round, would change what was imported before."""
    new = "text" if values.dtype.kind in "OUT" else "true and false" if values.dtype.kind == "b" else "numbers"
    words = {"VARCHAR": "text", "BOOLEAN": "true and false"}
    kinds = store.sql(
        "SELECT data_type FROM duckdb_columns() WHERE schema_name = 'data' AND table_name = 'm_imported' AND lower(column_name) = lower(?)",
        [name],
    )
    old = words.get(kinds.item(), "numbers") if len(kinds) else new
    if old != new and (old, new) != ("numbers", "true and false"):
        numbers = [str(one.number) for one in store.imports() if name in one.columns and one.fingerprints]
        raise UsageError(
            f"--map {name}=: it is {new} here and was {old} before (import {', '.join(numbers)}). Give it another name, or "
            f"`curate forget {store.folder} --import {numbers[-1] if numbers else 'N'}` first."
        )


def _score_names(text: str) -> list[str]:
    import yaml

    from curate.recipe.schema import ScoreRequest

    return [ScoreRequest.read(entry).name for entry in (yaml.safe_load(text) or {}).get("scores", [])]


def notes_of(store: Store, one: Import, labels: pl.DataFrame, columns: Mapping[str, np.ndarray]) -> list[str]:
    """Sentences about values that are unknown, that were there already, or that stand where nobody looks for them."""

    notes = [*_unknown(columns), *_order(labels)]
    ours = numeric_names()
    others = [c for c in columns if c not in ours]
    if others and len(one.fingerprints) > 1:
        notes.append(
            f"{', '.join(others)}: several runs or checkpoints a row, so they are in the view `trajectories`, not in `scored`."
        )
    texts = [c for c in columns if columns[c].dtype.kind == "O"]
    if texts:
        notes.append(f"Text: {', '.join(texts)}.")
    notes += _there_already(store, one)
    measured = {
        c for m in store.measured() if m.reads != "import" for c in store.measured_columns().get(m.measurement, ())
    }
    both = [c for c in columns if c in measured]
    if both:
        notes.append(
            f"{', '.join(both)}: measured here too. Where a recipe measures them, its values count and stand in `scored`, and the imported "
            f"ones beside them as {', '.join(f'imported_{c}' for c in both)}."
        )
    return notes


def _unknown(columns: Mapping[str, np.ndarray]) -> list[str]:
    """How many values of each column are unknown."""
    unknown = {}
    for name, values in columns.items():
        if values.dtype.kind == "O":
            n = sum(v is None for v in values)
        elif isinstance(values, np.ma.MaskedArray):
            n = int(np.ma.getmaskarray(values).sum())
        else:
            n = int(np.isnan(values).sum())
        if n:
            unknown[name] = (n, len(values))
    if not unknown:
        return []
    shown = ", ".join(f"{name} in {n:,} of {total:,} lines" for name, (n, total) in unknown.items())
    return [f"Unknown (empty, NaN or infinite, kept as NULL): {shown}."]


def _order(labels: pl.DataFrame) -> list[str]:
    """Checkpoints without a step that can be read stand in the order of their names."""
    notes = []
    for run in labels["run"].unique(maintain_order=True).to_list():
        of_run = labels.filter(pl.col("run") == run).unique()
        names = sorted(of_run.filter(pl.col("step").is_null())["checkpoint"].to_list(), key=natural)
        if len(of_run) > 1 and names:
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            after = "" if len(names) == len(of_run) else ", after those with a step"
            counts = "Scores that name a step count them 0, 1, 2. " if not after else ""
            notes.append(
                f"Run {run}: no step can be read from {shown}: they are ordered by name{after}. {counts}Map step= to say their steps."
            )
    return notes


def _there_already(store: Store, one: Import) -> list[str]:
    """Columns of earlier imports of which rows get new values."""
    notes = []
    for old in store.imports():
        shared = [c for c in one.columns if c in old.columns]
        meets = set(old.fingerprints) & set(one.fingerprints) or (old.per_row and one.per_row and old.fingerprints)
        if shared and meets and not (old.path == one.path and old.columns == one.columns):
            notes.append(
                f"{', '.join(shared)} came with import {old.number} ({old.file}) too: where both have a row, this file's values count."
            )
    return notes


def numeric_names() -> set[str]:
    """Columns that scores compute with: they are numbers, whatever they look like in a file."""
    from curate.scores import DATASET_VALUES, SCORES

    needs = [need for one in (*SCORES.values(), *DATASET_VALUES.values()) for need in (*one.needs, *one.optional)]
    return {need.rpartition(".")[2] for need in needs if not need.startswith("row.")}
