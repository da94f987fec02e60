"""What a declared score and a declared dataset value are: a function over measured columns, with parameters that are checked.

numpy float64 in, (rows,) float64 out, NaN for what is unknown. The decorators that make them are in declare.py.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from curate.errors import UsageError, did_you_mean
from curate.scores.parameters import Parameter, checked

Array = np.ndarray[Any, np.dtype[np.float64]]
Kind = Literal["preference", "sft", "any"]
Over = Literal["checkpoints"] | None
Worst = Literal["high", "low", "none"]
Cost = Literal["free", "forward", "sampling", "backward", "direction"]
# What a column costs to measure, for those that cost something other than a forward pass (a test holds it to the measurements' own word).
_READS: dict[str, Cost] = {
    **dict.fromkeys(("prompt_tokens", "chosen_tokens", "rejected_tokens", "completion_tokens"), "free"),
    **dict.fromkeys(("edit_distance", "truncated"), "free"),
    **dict.fromkeys(("n_samples", "n_correct", "accuracy", "sample_logp", "n_unfinished"), "sampling"),
    **dict.fromkeys(("entk_cc", "entk_cr", "entk_rr", "loss_gradient"), "backward"),
}
_ALONG = (
    "forecast_",
    "head_forecast_",
    "contribution_",
    "influence_",
    "cosine_",
)  # columns along a direction in weight space
_COSTS: tuple[Cost, ...] = ("free", "forward", "sampling", "backward", "direction")


def cost_of(column: str) -> Cost:
    """What a column costs to measure."""
    return "direction" if column.startswith(_ALONG) else _READS.get(column, "forward")


class Need(NamedTuple):
    """One column that a score reads. role: "" (see above; "reference" is the same), "policy", "warmup" (the reference after a short warm-up
    that curate runs), or "row" for the user's own column.
    """

    role: str
    column: str

    @classmethod
    def read(cls, text: str) -> Need:
        role, dot, column = text.partition(".")  # a user's column may have a dot in its name
        if not dot:
            return cls("", text)
        return cls("" if role == "reference" else role, column)


@dataclass(frozen=True)
class Columns:
    """What a score and a dataset value have in common: a function over columns, with parameters.

    name: the function's. path: "module:name". needs, optional: column names, in the order of the function's positional arguments (an
    optional column is None where nobody measured it). takes_steps: the function wants `steps`, the (K,) steps of the checkpoints (NaN
    where one is unknown); takes_rates: `rates`, their (K,) learning rates; takes_trained: `trained`, (K,) False at step 0, the untrained model.
    """

    name: str
    path: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    optional: tuple[str, ...]
    kind: Kind
    over: Over
    source: str
    parameters: Mapping[str, Parameter]
    takes_steps: bool
    takes_rates: bool
    takes_trained: bool

    what: typing.ClassVar[str] = "function"

    @property
    def description(self) -> str:
        """The docstring's first line."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """The parameters that have a default, with it."""
        return {p.name: p.default for p in self.parameters.values() if not p.required}

    @property
    def columns(self) -> tuple[Need, ...]:
        """needs, then optional, as (role, column)."""
        return tuple(Need.read(text) for text in (*self.needs, *self.optional))

    def need(self, text: str, params: Mapping[str, Any]) -> Need:
        """One of needs or optional with its parameters (else their defaults) filled in: "forecast_{step}_chosen" is forecast_sign_chosen where
        step is sign.
        """
        return Need.read(text.format_map({**self.defaults, **params}) if "{" in text else text)

    @property
    def cost(self) -> Cost:
        """The dearest pass that its needs ask for: free (tokens or the user's own columns), forward, sampling, backward."""
        needs = [Need.read(text) for text in self.needs]
        return max(
            ("free" if n.role == "row" else cost_of(n.column) for n in needs),
            key=_COSTS.index,
            default="free",
        )

    def check(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The full set of parameters, defaults filled in, numbers as floats where floats are wanted.

        Raises UsageError for an unknown parameter (naming the nearest), a missing one, a wrong type or a value out of range.
        """
        for key in params:
            if key not in self.parameters:
                takes = f"it takes {', '.join(self.parameters)}" if self.parameters else "it takes none"
                hint = did_you_mean(str(key), self.parameters, f"{takes}.", cutoff=0.5)
                raise UsageError(
                    f"{self.what} {self.name}: there is no parameter {str(key)!r}; {hint} `curate scores` lists them."
                )
        result = {}
        for p in self.parameters.values():
            if p.name in params:
                result[p.name] = checked(params[p.name], p.type, f"{self.what} {self.name}: {p.name}")
            elif p.required:
                raise UsageError(
                    f"{self.what} {self.name}: the parameter {p.name!r} has no default; write `{self.name}: {{{p.name}: …}}`."
                )
            else:
                result[p.name] = p.default
        return result

    def call(
        self,
        columns: Mapping[str, Any],
        *,
        steps: Iterable[int | None] | None = None,
        rates: Iterable[float | None] | None = None,
        trained: Iterable[bool] | None = None,
        params: Mapping[str, Any] | None = None,
        function: Callable[..., Any] | None = None,
    ) -> Any:
        """The function (or `function`, of the same arguments) over named columns. `columns`: each need, as it is written in `needs`, to its array.

        trained: whether each checkpoint is one of the training (None: all but that of step 0).
        """
        missing = [need for need in self.needs if columns.get(need) is None]
        if missing:
            raise UsageError(
                f"{self.what} {self.name} needs {', '.join(missing)}, which nobody measured; it got {', '.join(columns) or 'nothing'}."
            )
        arrays = [_as_column(columns.get(text), text, self) for text in (*self.needs, *self.optional)]
        rows = {len(array) for array in arrays if array is not None}
        if len(rows) > 1:
            raise UsageError(f"{self.what} {self.name}: its columns have different numbers of rows: {sorted(rows)}.")
        extra: dict[str, Any] = {}
        if self.takes_steps:
            extra["steps"] = None if steps is None else np.asarray([np.nan if s is None else s for s in steps])
        if self.takes_rates:
            extra["rates"] = None if rates is None else np.asarray(list(rates), dtype=np.float64)
        if self.takes_trained:
            flags = trained if trained is not None or steps is None else [s != 0 for s in steps]
            extra["trained"] = None if flags is None else np.asarray(list(flags), dtype=bool)
        try:
            return (function or self.function)(*arrays, **self.check(params or {}), **extra)
        except ValueError as error:
            raise UsageError(f"{self.what} {self.name}: {error}") from error
        except Exception as error:
            if self.function.__module__.startswith("curate."):
                raise
            given = ", ".join((*self.needs, *self.optional))
            raise UsageError(
                f"{self.what} {self.name} ({self.path}) failed on the columns {given}: {type(error).__name__}: {error}"
            ) from error

    def __call__(self, *arrays: Any, **params: Any) -> Any:
        """The plain function, as it was written."""
        return self.function(*arrays, **params)


def _as_column(values: Any, name: str, owner: Columns) -> Any:
    """One column as the function gets it: float64, or as it is for the user's own columns that are no numbers."""
    if values is None:
        return None
    if Need.read(name).role == "row" and not isinstance(values, np.ndarray):
        if any(isinstance(value, list | tuple | dict) for value in values):  # one object a row, not a table
            array = np.empty(len(values), dtype=object)
            for i, value in enumerate(values):
                array[i] = value
            return array
    array = np.asarray(values)
    if Need.read(name).role == "row":
        return array if array.dtype.kind in "OUSTM" else array.astype(np.float64)
    array = array.astype(np.float64, copy=False)
    dimensions = 2 if owner.over == "checkpoints" else 1
    if array.ndim != dimensions:
        shape = "(rows, checkpoints)" if dimensions == 2 else "(rows,)"
        raise UsageError(f"{owner.what} {owner.name}: {name} has shape {array.shape}, expected {shape}.")
    return array


@dataclass(frozen=True)
class Score(Columns):
    """A number per row. unit: of the value. worst: which end is bad to train on. high_means: what a high value says, in words.

    null_where: the name of a score of the same family, "" for none: where that one is 1, this one is NULL and that is its right value,
    not an unknown one (first_learned_step where never_learned). names: of the codes 0, 1, … where the value is a code and no amount;
    the view `scored` then shows them too, in a text column `<score>_name`. per_checkpoint: a function of the same arguments that gives the
    value at every checkpoint, (rows, K), the last of which is the score; the view `trajectories` shows these. least: how many checkpoints of
    the training it needs, where step 0, the untrained model, is none. version: rises when the formula changes, so that it is computed anew.
    plain: what a high value means, in a sentence that needs no paper (ours: words.py; a user's own without one: high_means).
    """

    unit: str
    worst: Worst
    high_means: str
    null_where: str = ""
    names: tuple[str, ...] = ()
    per_checkpoint: Callable[..., Array] | None = None
    least: int = 0
    version: int = 1
    plain: str = ""

    what = "score"

    def compute(
        self,
        columns: Mapping[str, Any],
        *,
        steps: Iterable[int | None] | None = None,
        rates: Iterable[float | None] | None = None,
        trained: Iterable[bool] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Array:
        """(rows,) float64, NaN where unknown.

        columns: need (as written in `needs` and `optional`) -> (rows,) array, or (rows, K) over checkpoints in step order.
        Raises UsageError for a missing column, bad parameters, or a function that returns another shape.
        """
        result = np.asarray(
            self.call(columns, steps=steps, rates=rates, trained=trained, params=params), dtype=np.float64
        )
        rows = len(columns[(*self.needs, *self.optional)[0]])
        if result.shape != (rows,):
            raise UsageError(
                f"score {self.name} ({self.path}) returned shape {result.shape}, expected one number a row: ({rows},)."
            )
        return result

    def compute_each(
        self,
        columns: Mapping[str, Any],
        *,
        steps: Iterable[int] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Array:
        """(rows, K) float64, NaN where unknown: the score at every checkpoint, for a score that has `per_checkpoint`. Else as `compute`."""
        values = self.call(columns, steps=steps, params=params, function=self.per_checkpoint)
        return np.asarray(values, dtype=np.float64)


class Value(NamedTuple):
    """A number about a whole dataset with its 95% interval.

    n: rows it rests on. at: the index of the checkpoint it is of, in step order; None where it is of the model or of the whole series.
    value, low, high are NaN where unknown (n = 0).
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    at: int | None = None


@dataclass(frozen=True)
class DatasetValue(Columns):
    """Numbers about a whole dataset, each with an interval. of: the score that it is about, "" for none: computed only beside that one."""

    of: str = ""

    what = "dataset value"

    def compute(
        self,
        columns: Mapping[str, Any],
        *,
        steps: Iterable[int | None] | None = None,
        trained: Iterable[bool] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> list[Value]:
        """The values; columns as in Score.compute."""
        return list(self.call(columns, steps=steps, trained=trained, params=params))
