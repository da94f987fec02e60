"""From measured columns to scores and dataset values: no model is run, and it is free to do again.

A recipe that measures scores the one series it names. Imported logs may hold several training runs: a row's score is then the mean over the
runs it was trained in, and dataset values stand per run.
"""

from __future__ import annotations

import datetime
import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import UsageError
from curate.plan.plan import Plan
from curate.plan.step import RequestedScore
from curate.store import DatasetValue, Measured, Trajectories
from curate.store.sql import quote

if TYPE_CHECKING:
    from curate.store import Place, Store


OF_TRAINED_ROWS = (
    "premem_values",
    "phase_values",
)  # dataset values that say nothing of rows that no run has trained on


@dataclass(frozen=True)
class Series:
    """The checkpoints of one run: for every column the fingerprint per step (None where this step lacks the column). places: (checkpoint, step) of
    each as the store has them.
    """

    run: str
    steps: tuple[int | None, ...]
    checkpoints: tuple[str, ...]
    columns: dict[str, list[str | None]]
    places: tuple[tuple[str, int | None], ...] = ()

    @property
    def trained(self) -> list[bool]:
        """Whether each is a checkpoint of the training; that of step 0 is the untrained model."""
        return [step != 0 for _, step in self.places]


def series_of(
    measured: Sequence[Measured],
    uses: dict[tuple[str, str, str | None], list[str]],
    over: str | None,
    names: Mapping[str, Sequence[Place]] | None = None,
) -> list[Series]:
    """The runs that the columns of these uses come from, each in step order. names: as `Plan.labels`; what has none is called as it was measured."""
    by_fingerprint = {m.fingerprint: m for m in measured}
    runs: dict[str, dict[tuple[bool, int, str], dict[str, str]]] = {}
    for (role, column, where), fingerprints in uses.items():
        if where != over or role:
            continue
        for order, fingerprint in enumerate(fingerprints):
            m, again = by_fingerprint[fingerprint], fingerprints[:order].count(fingerprint)
            called = (names or {}).get(fingerprint) or [(m.run, m.checkpoint, m.step)]
            run, checkpoint, step = called[min(again, len(called) - 1)]
            place = (
                step is None,
                order if step is None else step,
                checkpoint,
            )  # one of an unknown step comes after the others
            runs.setdefault(run, {}).setdefault(place, {})[column] = fingerprint
    columns = sorted({column for (role, column, where) in uses if where == over and not role})
    result = []
    for run, places in sorted(runs.items()):
        order_of = sorted(places)
        nobody_knows = all(unknown for unknown, _, _ in order_of)  # then their order stands for it
        result.append(
            Series(
                run,
                tuple(None if unknown and not nobody_knows else step for unknown, step, _ in order_of),
                tuple(name or str(step) for _, step, name in order_of),
                {column: [places[p].get(column) for p in order_of] for column in columns},
                tuple((name, None if unknown else step) for unknown, step, name in order_of),
            )
        )
    return result


def compute_scores(
    columns: Columns, wanted: Sequence[RequestedScore]
) -> tuple[dict[str, np.ndarray], list[Trajectories]]:
    """name -> (rows,) float64, NaN where unknown, for every score that is wanted; and run by run those with a value at every checkpoint."""
    result: dict[str, np.ndarray] = {}
    each: dict[str, Trajectories] = {}
    for want in wanted:
        per_run = []
        for series in columns.runs(want.score.over):
            given = columns.of(want, series)
            if given is None:
                continue
            if want.score.per_checkpoint is not None:
                found = want.score.compute_each(given, steps=series.steps, params=want.params)
                values = found[:, -1]
                lines = each.setdefault(series.run, Trajectories(series.run, series.places, {}))
                lines.values[want.name] = columns.where_trained(found, series)
            else:
                values = want.score.compute(
                    given,
                    steps=series.steps if series else None,
                    rates=columns.rates(series) if series else None,
                    trained=series.trained if series else None,
                    params=want.params,
                )
            per_run.append(columns.where_trained(values, series))
        over_runs = _most_common if want.score.names else _mean
        result[want.name] = over_runs(per_run) if per_run else np.full(len(columns.row_ids), np.nan)
    return result, list(each.values())


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
    computed where the recipe asks for it, with its settings.
    """
    from curate.scores import DATASET_VALUES

    if not columns.row_ids:
        return []
    settings: dict[str, Any] = {}
    for want in wanted:
        for key, value in want.params.items():
            settings.setdefault(key, value)
    if columns.plan.beta is not None:
        settings["beta"] = columns.plan.beta
    result = []
    for declared in DATASET_VALUES.values():
        about = next((want.params for want in wanted if want.score.name == declared.of), None)
        if (prefix and declared.name in OF_TRAINED_ROWS) or (declared.of and about is None):
            continue
        given_by = settings if about is None else about
        params = {key: given_by[key] for key in declared.parameters if key in given_by}
        for series in columns.runs(declared.over):
            given = columns.of(RequestedScore(declared.name, declared, params), series, trained_only=True)  # type: ignore[arg-type]
            if given is None:
                continue
            try:
                steps, trained = (series.steps, series.trained) if series else (None, None)
                values = declared.compute(given, steps=steps, trained=trained, params=params)
            except UsageError:
                continue  # a parameter of this name means something else there
            for value in values:
                at = value.at if series else None
                result.append(
                    DatasetValue(
                        prefix + value.name,
                        value.value,
                        value.low,
                        value.high,
                        value.n,
                        series.run if series else "",
                        series.checkpoints[at] if series and at is not None else "",
                        series.steps[at] if series and at is not None else None,
                    )
                )
    return result


class Columns:
    """The columns of some rows, read once from the store and kept."""

    def __init__(self, store: Store, plan: Plan, row_ids: list[str], sources: list[str]):
        self.store, self.plan, self.row_ids, self.sources = store, plan, row_ids, sources
        known = {
            m.fingerprint: m for m in store.measured()
        }  # and what is planned but not measured yet: its values are NULL
        known |= {task.fingerprint: task.measured for step in plan.steps for task in step.tasks}
        self.measured = list(known.values())
        self.names = store.measured_columns()
        self._of = {m.fingerprint: m for m in self.measured}
        self._known: dict[tuple[str, ...], np.ndarray] = {}  # fingerprints and a column -> (rows, K)
        self._at: dict[tuple[str, str], tuple[np.ndarray, int]] = {}  # a fingerprint and a column -> where of those
        self._own: dict[str, np.ndarray] = {}

    def runs(self, over: str | None) -> list[Any]:
        """The series to compute over; [None] for a score of single columns of one measured model."""
        if over is None and not self.plan_is_imported:
            return [None]
        return series_of(self.measured, self.plan.bindings, over, self.plan.labels)

    def rates(self, series: Series) -> list[float | None]:
        """The checkpoints' learning rates, as far as their trainers wrote them down."""
        known = {(s.run, s.checkpoint): s.rate for s in self.plan.roles.series}
        return [known.get((series.run, checkpoint)) for checkpoint in series.checkpoints]

    @property
    def plan_is_imported(self) -> bool:
        return not self.plan.steps and self.plan.recorded is None

    def of(self, want: RequestedScore, series: Series | None, *, trained_only: bool = False) -> dict[str, Any] | None:
        """need -> array for a score; None where a column that it needs is not there."""
        given: dict[str, Any] = {}
        for text in (*want.score.needs, *want.score.optional):
            role, column = want.need(text)
            values = (
                self.own(column, text in want.score.needs)
                if role == "row"
                else self.column(role, column, want.score.over, series)
            )
            if values is None:
                if text in want.score.needs:
                    return None
                continue
            if trained_only and series is not None and role != "row":
                trained = self.trained(series)
                values = (
                    values
                    if trained is None
                    else np.where(trained if values.ndim == 2 else trained[:, -1], values, np.nan)
                )
            given[text] = values
        return given

    def has_nothing(self, want: RequestedScore, text: str) -> bool:
        """Whether one of a score's needs is unknown in every row, of every run."""
        role, column = want.need(text)
        found = (
            self.own(column) if role == "row" else self.column(role, column, want.score.over, series)
            for series in self.runs(want.score.over)
        )
        return all(v is None or (v.dtype.kind == "f" and not np.isfinite(v).any()) for v in found)

    def column(self, role: str, column: str, over: str | None, series: Series | None) -> np.ndarray | None:
        if series is not None and not role:
            prints = series.columns.get(column)
            if prints is None or all(f is None for f in prints):
                return None
            values = self._read(tuple(f or "" for f in prints), column)
            return values if over == "checkpoints" else values[:, -1]
        found = self.plan.bindings.get((role, column, over))
        return (
            None
            if not found
            else self._read(tuple(found), column)[:, -1]
            if over is None
            else self._read(tuple(found), column)
        )

    def own(self, column: str, needed: bool = True) -> np.ndarray | None:
        """A user's own column, aligned to the rows: its first occurrence's value. None where there is no such column and it is not needed."""
        if column not in self._own:
            have = self.store.sql("SELECT * FROM occurrences LIMIT 0", source=self.sources or None).columns
            if column not in have and not needed:
                return None
            # where curate has a column of this name, the user's is meant; of one that is not there the store names the nearest
            name = quote(self.store.own_names().get(column, column))
            frame = self.store.sql(
                f"SELECT o.row_id, first({name} ORDER BY o.source, o.index) AS value, first(typeof({name})) AS kind "
                "FROM occurrences o GROUP BY o.row_id",
                source=self.sources or None,
            )
            found = dict(zip(frame["row_id"], frame["value"].to_list(), strict=True))
            values = [found.get(row_id) for row_id in self.row_ids]
            if "JSON" in frame["kind"].head(1).to_list():
                values = [json.loads(v) if isinstance(v, str) else v for v in values]
            self._own[column] = own_values(values)
        return self._own[column]

    def trained(self, series: Series) -> np.ndarray | None:
        """(rows, K) bool: whether the run trained on the row; None where nobody said, which means it did."""
        prints = next(
            (
                p
                for p in series.columns.values()
                if any(f and "trained" in self.names.get(self._of[f].measurement, ()) for f in p)
            ),
            None,
        )
        if prints is None:
            return None
        return self._read(tuple(f or "" for f in prints), "trained") != 0.0

    def where_trained(self, values: np.ndarray, series: Series | None) -> np.ndarray:
        """(rows,) or (rows, K) values, NaN where the run did not train on the row."""
        trained = self.trained(series) if series is not None else None
        return values if trained is None else np.where(trained[:, -1] if values.ndim == 1 else trained, values, np.nan)

    def _read(self, fingerprints: tuple[str, ...], column: str) -> np.ndarray:
        """(rows, K) float64. "" for a checkpoint that lacks it. What one series has read is not read again for another."""
        key = (*fingerprints, column)
        if key not in self._known:
            new = list(dict.fromkeys(f for f in fingerprints if f and (f, column) not in self._at))
            if new:
                self._known[(*new, column)] = read = self.store.series(new, [column], self.row_ids)[column]
                self._at |= {(f, column): (read, k) for k, f in enumerate(new)}
        if key not in self._known:
            nothing = np.full((len(self.row_ids), 1), np.nan)
            found = [self._at[f, column] if f else (nothing, 0) for f in fingerprints]
            self._known[key] = np.stack([values[:, k] for values, k in found], 1)
        return self._known[key]


def own_values(values: Sequence[Any]) -> np.ndarray:
    """A user's column as a score gets it: float64 where it holds numbers (true and false as 1 and 0, NULL as NaN), else Python's own values as
    objects: text, lists, dicts, datetimes, None for NULL.
    """
    if all(v is None or isinstance(v, numbers.Real | Decimal) for v in values):
        return np.array([np.nan if v is None else float(v) for v in values])
    found = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        is_day = isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)
        found[i] = datetime.datetime.combine(value, datetime.time()) if is_day else value
    return found


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
