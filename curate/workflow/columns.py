"""The columns that scores are computed from, read from the store: for one model, or in step order over the checkpoints of a run."""

from __future__ import annotations

import datetime
import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.plan.plan import Plan
from curate.plan.step import RequestedScore
from curate.store import Measured
from curate.store.sql import quote

if TYPE_CHECKING:
    from curate.store import Place, Store


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


@dataclass(frozen=True, order=True)
class _Place:
    """Where a checkpoint stands in its run: one of an unknown step comes after the others, in the order it was named in."""

    has_no_step: bool
    step: int
    checkpoint: str


def series_of(
    measured: Sequence[Measured],
    bindings: Mapping[tuple[str, str, str | None], Sequence[str]],
    over: str | None,
    labels: Mapping[str, Sequence[Place]] | None = None,
) -> list[Series]:
    """The runs that columns without a role come from, each in step order. bindings, labels: as `Plan` has them; what has no label is called as it
    was measured.
    """
    by_fingerprint = {m.fingerprint: m for m in measured}
    runs: dict[str, dict[_Place, dict[str, str]]] = {}  # run -> place -> column -> fingerprint
    columns: set[str] = set()
    for (role, column, where), fingerprints in bindings.items():
        if where != over or role:
            continue
        columns.add(column)
        for number, fingerprint in enumerate(fingerprints):
            m, before = by_fingerprint[fingerprint], list(fingerprints[:number]).count(fingerprint)
            called = (labels or {}).get(fingerprint) or [(m.run, m.checkpoint, m.step)]
            run, checkpoint, step = called[min(before, len(called) - 1)]
            place = _Place(step is None, number if step is None else step, checkpoint)
            runs.setdefault(run, {}).setdefault(place, {})[column] = fingerprint
    return [_series(run, by_step, sorted(columns)) for run, by_step in sorted(runs.items())]


def _series(run: str, labels: Mapping[_Place, Mapping[str, str]], columns: Sequence[str]) -> Series:
    order = sorted(labels)
    nobody_knows = all(place.has_no_step for place in order)  # then their order stands for the steps
    return Series(
        run,
        tuple(None if place.has_no_step and not nobody_knows else place.step for place in order),
        tuple(place.checkpoint or str(place.step) for place in order),
        {column: [labels[place].get(column) for place in order] for column in columns},
        tuple((place.checkpoint, None if place.has_no_step else place.step) for place in order),
    )


class Columns:
    """The columns of some rows, read once from the store and kept."""

    def __init__(self, store: Store, plan: Plan, row_ids: list[str], sources: list[str]):
        self.store, self.plan, self.row_ids, self.sources = store, plan, row_ids, sources
        self._of = {m.fingerprint: m for m in store.measured()}
        # what is planned but not measured yet has values, too: NULL
        self._of |= {task.fingerprint: task.measured for step in plan.steps for task in step.tasks}
        self.measured = list(self._of.values())
        self.names = store.measured_columns()
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
        """need -> array for a score; None where a column that it needs is not there. trained_only: NaN where the run did not train on the row."""
        given: dict[str, Any] = {}
        for text in (*want.score.needs, *want.score.optional):
            values = self._need(want, text, series)
            if values is None:
                if text in want.score.needs:
                    return None
                continue
            if trained_only and want.need(text).role != "row":
                values = self.where_trained(values, series)
            given[text] = values
        return given

    def _need(self, want: RequestedScore, text: str, series: Series | None) -> np.ndarray | None:
        role, column = want.need(text)
        if role == "row":
            return self.own(column, text in want.score.needs)
        return self.column(role, column, want.score.over, series)

    def has_nothing(self, want: RequestedScore, text: str) -> bool:
        """Whether one of a score's needs is unknown in every row, of every run."""
        each = (self._need(want, text, series) for series in self.runs(want.score.over))
        return all(values is None or (values.dtype.kind == "f" and not np.isfinite(values).any()) for values in each)

    def column(self, role: str, column: str, over: str | None, series: Series | None) -> np.ndarray | None:
        """(rows, K) over checkpoints, (rows,) of one model; None where nothing gives the column."""
        fingerprints: Sequence[str | None]
        if series is not None and not role:
            fingerprints = series.columns.get(column, [])
            is_series = over == "checkpoints"
        else:
            fingerprints = self.plan.bindings.get((role, column, over), [])
            is_series = over is not None
        if not any(fingerprints):
            return None
        values = self._read(tuple(fingerprint or "" for fingerprint in fingerprints), column)
        return values if is_series else values[:, -1]

    def own(self, column: str, needed: bool = True) -> np.ndarray | None:
        """A user's own column, aligned to the rows: its first occurrence's value. None where there is no such column and it is not needed."""
        if column not in self._own:
            there = self.store.sql("SELECT * FROM occurrences LIMIT 0", source=self.sources or None).columns
            if column not in there and not needed:
                return None
            self._own[column] = own_values(self._own_values(column))
        return self._own[column]

    def _own_values(self, column: str) -> list[Any]:
        """UsageError naming the nearest column, where there is none of this name."""
        # the user's is meant where curate has a column of this name
        name = quote(self.store.own_names().get(column, column))
        frame = self.store.sql(
            f"SELECT o.row_id, first({name} ORDER BY o.source, o.index) AS value, first(typeof({name})) AS kind "
            "FROM occurrences o GROUP BY o.row_id",
            source=self.sources or None,
        )
        of_row = dict(zip(frame["row_id"], frame["value"].to_list(), strict=True))
        values = [of_row.get(row_id) for row_id in self.row_ids]
        if "JSON" in frame["kind"].head(1).to_list():
            values = [json.loads(value) if isinstance(value, str) else value for value in values]
        return values

    def trained(self, series: Series) -> np.ndarray | None:
        """(rows, K) bool: whether the run trained on the row; None where nobody said, which means it did."""
        for fingerprints in series.columns.values():
            if any(f and "trained" in self.names.get(self._of[f].measurement, ()) for f in fingerprints):
                return self._read(tuple(f or "" for f in fingerprints), "trained") != 0.0
        return None

    def where_trained(self, values: np.ndarray, series: Series | None) -> np.ndarray:
        """(rows,) or (rows, K) values, NaN where the run did not train on the row."""
        trained = self.trained(series) if series is not None else None
        if trained is None:
            return values
        return np.where(trained if values.ndim == 2 else trained[:, -1], values, np.nan)

    def _read_with(self, fingerprints: Sequence[str], column: str) -> list[str]:
        """The columns that are read when one is: all that the plan takes of just these fingerprints, since finding the rows is what takes long."""
        bound = {name for (_, name, _), given in self.plan.bindings.items() if set(given) == set(fingerprints)}
        there = {name for f in fingerprints if f in self._of for name in self.names.get(self._of[f].measurement, ())}
        new = {name for name in bound & there if not any((f, name) in self._at for f in fingerprints)}
        return sorted(new | {column})

    def _read(self, fingerprints: tuple[str, ...], column: str) -> np.ndarray:
        """(rows, K) float64. "" for a checkpoint that lacks it. What one series has read is not read again for another."""
        key = (*fingerprints, column)
        if key not in self._known:
            new = list(dict.fromkeys(f for f in fingerprints if f and (f, column) not in self._at))
            if new:
                for name, read in self.store.series(new, self._read_with(new, column), self.row_ids).items():
                    self._known[(*new, name)] = read
                    self._at |= {(f, name): (read, k) for k, f in enumerate(new)}
        if key not in self._known:
            nothing = np.full((len(self.row_ids), 1), np.nan)
            tables = [self._at[f, column] if f else (nothing, 0) for f in fingerprints]
            self._known[key] = np.stack([values[:, k] for values, k in tables], 1)
        return self._known[key]


def own_values(values: Sequence[Any]) -> np.ndarray:
    """A user's column as a score gets it: float64 where it holds numbers (true and false as 1 and 0, NULL as NaN), else Python's own values as
    objects: text, lists, dicts, datetimes, None for NULL.
    """
    if all(v is None or isinstance(v, numbers.Real | Decimal) for v in values):
        return np.array([np.nan if v is None else float(v) for v in values])
    objects = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        is_day = isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)
        objects[i] = datetime.datetime.combine(value, datetime.time()) if is_day else value
    return objects
