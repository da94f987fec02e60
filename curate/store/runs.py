"""The training runs of a store as arrays: a column of every row over the checkpoints of a run, in step order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from curate.store.store import Store

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class StoredRun:
    """One run. values: column -> (rows, K) float64, NaN where unmeasured; its steps rise."""

    run: str
    steps: tuple[int, ...]
    checkpoints: tuple[str, ...]
    row_ids: list[str]
    values: dict[str, Array]


def stored_runs(
    store: Store,
    columns: Sequence[str],
    *,
    kind: str,
    recipe: dict[str, Any] | None = None,
    optional: Sequence[str] = (),
    sources: Sequence[str] | None = None,
) -> list[StoredRun]:
    """Every run that has all the columns, known for some row, at one checkpoint or more; by name.

    recipe: an entry of `Store.recipes`: only what it uses and what was imported (None: everything). optional: columns that come along
    where every checkpoint of the run has them. sources: the rows (None: the rows to train on, or all where no source says so).
    """
    uses = None if recipe is None else set(recipe["uses"])
    having = store.known_columns([*columns, *optional])
    labels: dict[str, dict[int, tuple[str, dict[str, str]]]] = {}
    called = {} if recipe is None else store.places(recipe["name"])
    for m in store.measured():
        if not (uses is None or m.fingerprint in uses or m.reads == "import"):
            continue
        for run, checkpoint, step in called.get(m.fingerprint) or [(m.run, m.checkpoint, m.step)]:
            if step is None:
                continue
            for column in having.get(m.fingerprint, ()):
                labels.setdefault(run, {}).setdefault(step, (checkpoint, {}))[1][column] = m.fingerprint
    row_ids = store.row_ids_of(sources, kind=kind, role="train") or store.row_ids_of(sources, kind=kind)
    runs = []
    for run, at in sorted(labels.items()):
        steps = [s for s in sorted(at) if set(columns) <= at[s][1].keys()]
        if not steps:
            continue
        names = [*columns, *(c for c in optional if all(c in at[s][1] for s in steps))]
        values = {c: store.series([at[s][1][c] for s in steps], [c], row_ids)[c] for c in names}
        known = np.isfinite(values[columns[0]]).any(axis=0) if row_ids else np.zeros(len(steps), bool)
        if not known.any():  # of another kind of row
            continue
        kept = [s for s, k in zip(steps, known, strict=True) if k]
        values = {c: v[:, known] for c, v in values.items()}
        runs.append(StoredRun(run, tuple(kept), tuple(at[s][0] or str(s) for s in kept), row_ids, values))
    return runs
