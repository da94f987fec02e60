"""What a `Recorder` kept of a training, as a recipe reads it: a series of measurements without checkpoints.

    models: {checkpoints: recordings:sft}      # the run's name; without any model, the store's one recorded run is meant

A recorded value's fingerprint covers the run, the step, the recorder's version, tokenizer and settings; there are no weights to hash.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from curate.errors import UsageError, did_you_mean
from curate.rows import content_id

if TYPE_CHECKING:
    from curate.plan.step import RequestedScore
    from curate.recipe.load import Loaded
    from curate.store import Measured, Store

PREFIX = "recordings:"
VERSION = 1  # raised when the same training would give other numbers
Bindings = dict[tuple[str, str, str | None], list[str]]


def recorded_runs(store: Store) -> dict[str, list[Measured]]:
    """run -> what was recorded of it, in step order."""
    by_run: dict[str, list[Measured]] = {}
    for m in store.measured():
        if "recorder" in m.params:
            by_run.setdefault(m.run, []).append(m)
    return by_run


def weights_of(run: str, step: int) -> str:
    """What stands for the weights of a step: nobody kept them."""
    return content_id("recorded", VERSION, run, step)


def run_meant(loaded: Loaded, store: Store) -> str | None:
    """The recorded run that a recipe is about, None if it is about models or imports. UsageError where it is not to be told."""
    models, runs = loaded.recipe.models, recorded_runs(store)
    asked = models.checkpoints if isinstance(models.checkpoints, str) else None
    if asked is not None and asked.startswith(PREFIX):
        name = asked.removeprefix(PREFIX)
        if name in runs:
            if models.reference or models.policy:
                raise UsageError(
                    f"models.checkpoints is {asked}: a recording has its own step 0, so leave models.reference and models.policy out."
                )
            return name
        known = did_you_mean(name, runs, f"there are: {', '.join(runs) or 'none'}.", show=lambda run: f"{PREFIX}{run}")
        raise UsageError(f"models.checkpoints is {asked}, but {store.folder} holds no such recording; {known}")
    if models.reference or models.policy or models.checkpoints or not runs or store.measured(reads="import"):
        return None
    if len(runs) > 1:
        raise UsageError(
            f"This recipe names no model, and {store.folder} holds several recorded runs ({', '.join(runs)}). "
            f"Say which: `--set models.checkpoints={PREFIX}{next(reversed(runs))}`."
        )
    return next(iter(runs))


def recorded_bindings(store: Store, run: str, requested: Iterable[RequestedScore], kind: str) -> Bindings:
    """(role, column, over) -> fingerprints, of everything recorded that scores and dataset values can read.

    A plain column is that of the first step for pairs (the reference), of the last one for SFT rows. UsageError for a score that
    needs what was not recorded.
    """
    from curate.scores import DATASET_VALUES

    series, tokens = recorded_runs(store)[run], []
    of_rows = {key: series[0].params[key] for key in ("tokenizer", "max_length", "truncation")}
    for m in store.measured(reads="tokens"):
        if all(m.params.get(key) == value for key, value in of_rows.items()):
            tokens.append(m)
    having = store.measured_columns()

    def find(column: str, role: str, over: str | None) -> list[str]:
        among = [m for m in series if column in having.get(m.measurement, ())] if not role else []
        if among:
            return [m.fingerprint for m in among] if over else [among[0 if kind == "preference" else -1].fingerprint]
        return [m.fingerprint for m in tokens if not role and column in having.get(m.measurement, ())][:1]

    bindings: Bindings = {}
    declared: list[tuple[Any, dict[str, Any], bool]] = [(want.score, want.params, True) for want in requested]
    declared += [(value, {}, False) for value in DATASET_VALUES.values() if value.kind in ("any", kind)]
    for columns, params, asked in declared:
        for text in (*columns.needs, *columns.optional):
            role, column = columns.need(text, params)
            if role == "row":
                continue
            fingerprints = find(column, role, columns.over)
            if fingerprints:
                bindings[(role, column, columns.over)] = fingerprints
            elif asked and text in columns.needs:
                have = sorted({c for m in (*series, *tokens) for c in having.get(m.measurement, ())})
                raise UsageError(
                    f"{columns.name} needs {text}, which was not recorded of {run}; there are: {', '.join(have)}. "
                    "Name the score in the recipe that the Recorder gets."
                )
    for name in ("prompt_tokens", "completion_tokens", "chosen_tokens", "rejected_tokens"):
        if fingerprints := find(name, "", None):
            bindings.setdefault(("", name, None), fingerprints)
    return bindings
