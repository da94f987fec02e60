"""From measured columns to scores and dataset values: no model is run, and it is free to do again.

A recipe that measures scores the one series it names. Imported logs may hold several training runs: a row's score is then the mean over the
runs it was trained in, and dataset values stand per run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import UsageError
from curate.plan.plan import Plan
from curate.plan.step import RequestedScore
from curate.store import DatasetValue, Trajectories
from curate.workflow.columns import Columns, Series

if TYPE_CHECKING:
    from curate.scores.declare import DatasetValue as Declared

OF_TRAINED_ROWS = (
    "premem_values",
    "phase_values",
)  # dataset values that say nothing of rows that no run has trained on


def compute_scores(
    columns: Columns, wanted: Sequence[RequestedScore]
) -> tuple[dict[str, np.ndarray], list[Trajectories]]:
    """name -> (rows,) float64, NaN where unknown, for every score that is wanted; and run by run those with a value at every checkpoint."""
    result: dict[str, np.ndarray] = {}
    trajectories: dict[str, Trajectories] = {}
    for want in wanted:
        per_run = []
        for series in columns.runs(want.score.over):
            given = columns.of(want, series)
            if given is None:
                continue
            if want.score.per_checkpoint is not None:
                at_each = want.score.compute_each(given, steps=series.steps, params=want.params)
                own = trajectories.setdefault(series.run, Trajectories(series.run, series.places, {}))
                own.values[want.name] = columns.where_trained(at_each, series)
                values = at_each[:, -1]
            else:
                values = _values(columns, want, series, given)
            per_run.append(columns.where_trained(values, series))
        over_runs = _most_common if want.score.names else _mean
        result[want.name] = over_runs(per_run) if per_run else np.full(len(columns.row_ids), np.nan)
    return result, list(trajectories.values())


def _values(columns: Columns, want: RequestedScore, series: Series | None, given: dict[str, Any]) -> np.ndarray:
    """(rows,) of one model, or of one run."""
    if series is None:
        return want.score.compute(given, steps=None, rates=None, trained=None, params=want.params)
    return want.score.compute(
        given, steps=series.steps, rates=columns.rates(series), trained=series.trained, params=want.params
    )


def nothing_known(columns: Columns, wanted: Sequence[RequestedScore], scores: Mapping[str, np.ndarray]) -> list[str]:
    """A sentence for every score that no row has a value of: which, and why."""
    notes = []
    for want in wanted:
        if want.name not in scores or not len(scores[want.name]) or np.isfinite(scores[want.name]).any():
            continue
        least = max((sum(s.trained) for s in columns.runs(want.score.over) if s), default=0)
        if want.score.over and want.score.least > least:
            why = f"it needs {want.score.least} checkpoints of a training or more, and there are {least}; step 0, the untrained model, is none"
        else:
            lacking = [text for text in want.score.needs if columns.has_nothing(want, text)]
            why = f"no row has {' or '.join(lacking)}" if lacking else "what it needs is not known together in any row"
        notes.append(f"{want.name} is unknown (NULL) in every row: {why}.")
    return notes


def named(plan: Plan, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scores, and beside every code a text column `<score>_name`, None where the code is unknown. Any shape."""
    result = dict(scores)
    for want in plan.wanted:
        if want.score.names and want.name in scores:
            text = np.dtypes.StringDType(na_object=None)  # so that a column of nothing but NULL is text too
            codes = scores[want.name]
            names = np.array([*want.score.names, None], dtype=text)
            result[f"{want.name}_name"] = names[np.where(np.isnan(codes), len(names) - 1, codes).astype(int)]
    return result


def compute_dataset_values(columns: Columns, wanted: Sequence[RequestedScore], prefix: str = "") -> list[DatasetValue]:
    """Every dataset value whose columns are known, with its interval, per run and checkpoint where it is over checkpoints.

    A threshold that the recipe sets for a score is used for the dataset values that share the parameter, and so is DPO's β; those about one score are
    computed where the recipe asks for it, with its settings (of a name that they do not tell apart, with the first).
    """
    from curate.scores import DATASET_VALUES

    if not columns.row_ids:
        return []
    shared = _shared_settings(columns.plan, wanted)
    result: list[DatasetValue] = []
    for declared in DATASET_VALUES.values():
        if prefix and declared.name in OF_TRAINED_ROWS:
            continue
        about = [want.params for want in wanted if want.score.name == declared.of] if declared.of else [shared]
        known: dict[tuple[str, str, str], DatasetValue] = {}
        for settings in about:
            params = {key: settings[key] for key in declared.parameters if key in settings}
            for series in columns.runs(declared.over):
                for value in _dataset_values(columns, declared, params, series, prefix):
                    known.setdefault((value.name, value.run, value.checkpoint), value)  # two settings: the first
        result += known.values()
    return result


def _shared_settings(plan: Plan, wanted: Sequence[RequestedScore]) -> dict[str, Any]:
    """Every parameter that a score of the recipe sets, the first one's where several do, and DPO's β."""
    settings: dict[str, Any] = {}
    for want in wanted:
        for key, value in want.params.items():
            settings.setdefault(key, value)
    if plan.beta is not None:
        settings["beta"] = plan.beta
    return settings


def _dataset_values(
    columns: Columns, declared: Declared, params: dict[str, Any], series: Series | None, prefix: str
) -> list[DatasetValue]:
    """What one function says of the rows, of one model or of one run; [] where a column that it needs is not there."""
    given = columns.of(RequestedScore(declared.name, declared, params), series, trained_only=True)  # type: ignore[arg-type]
    if given is None:
        return []
    steps, trained = (series.steps, series.trained) if series else (None, None)
    try:
        values = declared.compute(given, steps=steps, trained=trained, params=params)
    except UsageError:
        return []  # a parameter of this name means something else there
    run = series.run if series else ""
    result = []
    for value in values:
        checkpoint, step = "", None
        if series and value.at is not None:
            checkpoint, step = series.checkpoints[value.at], series.steps[value.at]
        name = prefix + value.name
        result.append(DatasetValue(name, value.value, value.low, value.high, value.n, run, checkpoint, step))
    return result


def _most_common(per_run: list[np.ndarray]) -> np.ndarray:
    """(rows,) the code that most runs agree on; NaN at a tie, and where no run knows one."""
    if len(per_run) == 1:
        return per_run[0]
    stacked = np.stack(per_run)
    codes = np.unique(stacked[np.isfinite(stacked)])
    if not len(codes):
        return np.full(stacked.shape[1], np.nan)
    votes = np.stack([(stacked == code).sum(0) for code in codes])  # (codes, rows)
    alone = (votes == votes.max(0)).sum(0) == 1
    return np.where(alone & (votes.max(0) > 0), codes[votes.argmax(0)], np.nan)


def _mean(per_run: list[np.ndarray]) -> np.ndarray:
    """(rows,) mean over runs where known; NaN where none is."""
    if len(per_run) == 1:
        return per_run[0]
    stacked = np.stack(per_run)
    known = np.isfinite(stacked)
    n = known.sum(0)
    return np.where(n > 0, np.where(known, stacked, 0.0).sum(0) / np.maximum(n, 1), np.nan)
