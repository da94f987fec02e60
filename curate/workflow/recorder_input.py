"""What a Recorder is given, and what it measures of it: a recipe, or data, or rows with the scores that are wanted of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import UsageError
from curate.plan.requests import requested_scores
from curate.recipe.load import Loaded, load_recipe
from curate.store import Measured

if TYPE_CHECKING:
    from curate.data.records import Record

DEFAULT_SCORES = {"preference": ["ranking_gap", "flipped"], "sft": ["target_nll", "confidence", "variability"]}
WITH_SAMPLES = ["accuracy", "correctness"]


def read_given(rows: Any, scores: Any, samples: int, *, set: Any, store: Any) -> tuple[Loaded, list[Record] | None]:
    """The recipe, and the rows themselves where they are no source of it (None: they are). UsageError for what is neither recipe, data nor rows."""
    if type(rows) is dict or (isinstance(rows, str | Path) and str(rows).endswith((".yaml", ".yml"))):
        if scores is not None or samples:
            raise UsageError("scores and samples stand in the recipe; change them with set={…}.")
        return load_recipe(rows, set=set, store=store), None
    records: list[Record] | None = None
    source: dict[str, str] = {}
    if isinstance(rows, str | Path):
        from curate.data import read

        kind: str = read(str(rows)).kind
        source = {"source": str(rows)}
    else:
        records = records_of(rows)
        assert records[0].row is not None
        kind = records[0].row.kind
    sampling = {"sampling": {"samples": samples}} if samples else {}
    raw = {"kind": kind, "scores": _scores(kind, scores, samples), **source, **sampling}
    return load_recipe(raw, set=set, store=store), records


def _scores(kind: str, scores: Any, samples: int) -> list[Any]:
    """What is recorded of rows that come without a recipe."""
    if scores is not None:
        return list(scores)
    if samples and kind == "preference":
        raise UsageError("samples: answers to pairs cannot be graded; record SFT rows with answers.")
    return [*DEFAULT_SCORES[kind], *(WITH_SAMPLES if samples else [])]


def check_settings(run: str, store: Path, recorded: Sequence[Measured], now: dict[str, dict[str, Any]]) -> None:
    """A resumed training goes on in its own run only with the settings that were recorded there: other tokens or samples are other numbers.

    now: measurement -> its parameters.
    """
    before = {m.measurement: m.params for m in recorded}
    for name, params in now.items():
        for key, value in params.items():
            known = before.get(name, {}).get(key, value)
            if json.dumps(known, sort_keys=True) != json.dumps(value, sort_keys=True):
                was = "of another tokenizer" if key == "tokenizer" else f"with {key} {known!r}, and it is {value!r} now"
                raise UsageError(
                    f"Recorder: run {run} in {store} was recorded {was}: no series of one model. "
                    "Go on with the settings of then, or give what follows a name of its own: Recorder(…, run='…')."
                )


def records_of(rows: Any) -> list[Record]:
    """Rows of ours as they are, anybody else's read as a file's would be. UsageError for what is neither."""
    from curate.data import read
    from curate.data.records import Record

    if isinstance(rows, list | tuple) and rows and hasattr(rows[0], "row_id"):
        return [Record("", i, row) for i, row in enumerate(rows)]
    if isinstance(rows, list | tuple) and not rows:
        raise UsageError(
            "Recorder: expected a recipe, data, a datasets.Dataset, or rows as curate.load(…) returns them; found nothing."
        )
    return list(read(rows).good())


def wanted_measurements(loaded: Loaded) -> list[Any]:
    """What a recipe's scores need of a model in training. UsageError where that needs gradients, another model, or nothing at all."""
    from curate.measurements import providers

    measurements: dict[str, Any] = {}
    for want in requested_scores(loaded):
        for text in want.score.needs:
            role, column = want.need(text)
            measurement = providers(column, loaded.recipe.kind) if role != "row" else None
            if role == "row" or (measurement is not None and measurement.reads == "tokens"):
                continue
            if role:
                raise UsageError(
                    f"{want.name} needs {text}, which a recording does not have: it knows one model, the one in training."
                )
            if measurement is None:
                raise UsageError(
                    f"{want.name} needs the column {column}, which nothing measures on {loaded.recipe.kind} rows."
                )
            if measurement.reads not in ("forward", "sample"):
                raise UsageError(
                    f"{want.name} needs a {measurement.reads} pass, which is measured on saved checkpoints, not in training."
                )
            measurements[measurement.name] = measurement
    if not measurements:
        raise UsageError("This recipe has no score that needs a model: there is nothing to record.")
    return list(measurements.values())
