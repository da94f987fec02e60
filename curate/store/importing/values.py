"""The values of an imported file: which run and checkpoint each line is about, its columns as ours, and what is kept of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from curate.errors import UsageError, ValidationError
from curate.models.naming import natural
from curate.rows import content_id
from curate.store.entries import DatasetValue, Measured
from curate.store.importing.mapping import PLACES, VALUES
from curate.store.importing.notes import numeric_names
from curate.store.importing.rows import Found
from curate.store.importing.table import GROUPED, Table, numbers, step_of, steps_of, text_of, values_of


def check_places(table: Table, labels: pl.DataFrame) -> None:
    """ValidationError where two lines about datasets are about the same run and checkpoint."""
    twice = labels.is_duplicated()
    if twice.any():
        first = int(twice.arg_max() or 0)
        same = labels.with_row_index().filter(pl.all_horizontal(pl.col(n).eq_missing(labels[n][first]) for n in PLACES))
        raise ValidationError(
            f"{table.at(first)} and {table.at(same['index'][1]).removeprefix(table.shown + ', ')} are about the same run and checkpoint. "
            "If a line is about a row of data, say which with row= or --on; else map what tells them apart with run= or checkpoint=."
        )


def read_places(table: Table, mapping: Mapping[str, str]) -> pl.DataFrame:
    """run, checkpoint, step for every line. Without a run, it is the file's name without its ending."""
    n = len(table.frame)
    run = text_of(table.frame[mapping["run"]]) if "run" in mapping else pl.Series([table.path.name.split(".")[0]] * n)
    given = mapping.get("checkpoint") or mapping.get("step")
    checkpoint = text_of(table.frame[given]) if given else pl.Series([""] * n, dtype=pl.String)
    for name, column in (("run", run), ("checkpoint", checkpoint)):
        table.refuse(
            column.is_null().to_numpy(),
            mapping.get(name) or given or name,
            f"which {name} the line is about, not an empty cell",
        )
    if "step" in mapping:
        steps = pl.Series(steps_of(table, mapping["step"]), dtype=pl.Int64)
    else:
        if "checkpoint" in mapping:
            odd = table.frame[mapping["checkpoint"]].cast(pl.String).str.strip_chars()
            bad = odd.str.contains(GROUPED).fill_null(False) | odd.str.contains(r"^-\d").fill_null(False)
            table.refuse(
                bad.to_numpy(),
                mapping["checkpoint"],
                "a checkpoint's name or step, without separators or a sign (1000)",
            )
        of = {name: step_of(name) for name in checkpoint.unique().to_list()}
        steps = pl.Series([of[name] for name in checkpoint.to_list()], dtype=pl.Int64)
    labels = pl.DataFrame({"run": run.alias("run"), "checkpoint": checkpoint.alias("checkpoint"), "step": steps})
    _check_steps(table, labels)
    return labels


def _check_steps(table: Table, labels: pl.DataFrame) -> None:
    """Two checkpoints of one run at the same step cannot be put in order."""
    distinct = labels.unique(maintain_order=True).filter(pl.col("step").is_not_null())
    twice = distinct.filter(pl.struct("run", "step").is_duplicated())
    if len(twice):
        run, first, step = twice.row(0)
        second = twice.filter((pl.col("run") == run) & (pl.col("step") == step))["checkpoint"][1]
        raise ValidationError(
            f"{table.shown}: the checkpoints {first!r} and {second!r} of run {run!r} are both of step {step}. Give each a step of its own."
        )


def convert(table: Table, mapping: Mapping[str, str], *, text: Sequence[str], of_rows: bool) -> dict[str, np.ndarray]:
    """Our columns as (lines,) arrays: float64 with NaN for unknown, masked booleans, or text with None."""
    strange = [name for name in text if name not in mapping]
    if strange:
        raise UsageError(f"--text {strange[0]}: no such column is mapped; there are {', '.join(mapping) or 'none'}.")
    result: dict[str, np.ndarray] = {}
    for ours, theirs in mapping.items():
        if ours in VALUES or not of_rows or ours in numeric_names():
            result |= _with_meaning(table, mapping, ours, theirs)
        else:
            result[ours] = values_of(table, theirs, ours, as_text=ours in text)
    return result


def _with_meaning(table: Table, mapping: Mapping[str, str], ours: str, theirs: str) -> dict[str, np.ndarray]:
    """A column that is numbers by its name, as ours."""
    values = numbers(table, theirs)
    if ours == "samples":
        table.refuse(values < 0, theirs, "a count, 0 or more")
        return {"n_samples": values}
    if ours == "correct":
        samples = numbers(table, mapping["samples"])
        with np.errstate(invalid="ignore", divide="ignore"):
            table.refuse((values < 0) | (values > samples), theirs, f"a count from 0 to {mapping['samples']}")
            return {"n_correct": values, "accuracy": np.where(samples > 0, values / samples, np.nan)}
    if ours == "perplexity":
        table.refuse(values < 1 - 1e-6, theirs, "a perplexity, 1 or more")
        return {"target_nll": np.log(values)}
    if ours == "trained":
        table.refuse((values != 0) & (values != 1) & ~np.isnan(values), theirs, "true or false")
        return {"trained": np.ma.MaskedArray(values == 1, np.isnan(values))}
    return {{"nll": "target_nll", "logp": "target_logp"}.get(ours, ours): values}


def lines_of(
    table: Table, labels: pl.DataFrame, columns: Mapping[str, np.ndarray], joined: Found, origin: str
) -> tuple[list[Measured], Any]:
    """One fingerprint a run and checkpoint, and a pyarrow table of all values; every column stands in the measurement `imported`."""
    import pyarrow as pa

    from curate.store.shards import arrow_column

    labels = labels[joined.lines]
    distinct = labels.unique(maintain_order=True)
    order = sorted(
        range(len(distinct)),
        key=lambda i: (distinct["run"][i], distinct["step"][i] or 0, natural(distinct["checkpoint"][i])),
    )
    measured = [
        Measured(
            content_id("import", origin, run, checkpoint, step),
            "imported",
            "import",
            run=run,
            checkpoint=checkpoint,
            step=step,
            engine="imported",
            params={"source": origin},
        )
        for run, checkpoint, step in distinct[order].iter_rows()
    ]
    prints = distinct[order].with_columns(pl.Series("fingerprint", [m.fingerprint for m in measured]))
    lines = labels.join(prints, on=list(PLACES), how="left", nulls_equal=True, maintain_order="left")
    keys = pl.DataFrame({"fingerprint": lines["fingerprint"], "row_id": joined.row_ids})
    kept = _once(table, keys, columns, joined)
    taken = {name: values[joined.lines][kept] for name, values in columns.items()}
    return measured, pa.table(
        {**keys[kept].to_dict(as_series=True), **{name: arrow_column(values) for name, values in taken.items()}}
    )


def _once(table: Table, keys: pl.DataFrame, columns: Mapping[str, np.ndarray], joined: Found) -> np.ndarray:
    """The lines to keep: where two different ids are of one row, and say the same of it, once. ValidationError where two lines do not."""
    every = np.arange(len(keys))
    if not keys.is_duplicated().any():
        return every
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for i, key in zip(every.tolist(), keys.iter_rows(), strict=True):
        first = seen.setdefault(key, i)
        if first == i:
            kept.append(i)
            continue
        a, b = int(joined.lines[first]), int(joined.lines[i])
        if not all(_alike(values[a], values[b]) for values in columns.values()):
            raise ValidationError(
                f"{table.at(a)} and {table.at(b).removeprefix(table.shown + ', ')} are about one row of the store ({key[1]}: two of the ids are "
                "the same text) and have other values. Leave one of them out."
            )
    return np.array(kept)


def _alike(a: Any, b: Any) -> bool:
    both_unknown = (a is np.ma.masked or a != a or a is None) and (b is np.ma.masked or b != b or b is None)
    return bool(both_unknown or a == b)


def dataset_values(labels: pl.DataFrame, columns: Mapping[str, np.ndarray]) -> list[DatasetValue]:
    """A value for every line and column; n, low and high belong to the one other column, if there is one."""
    names = [name for name in columns if name not in ("n", "low", "high")]
    about = {key: columns[key] for key in ("low", "high") if key in columns and len(names) == 1}
    result = []
    for i, (run, checkpoint, step) in enumerate(labels.iter_rows()):
        n = columns["n"][i] if "n" in columns and not np.isnan(columns["n"][i]) else None
        low, high = (
            None if key not in about or np.isnan(about[key][i]) else float(about[key][i]) for key in ("low", "high")
        )
        for name in names:
            value = columns[name][i]
            unknown = value is np.ma.masked or np.isnan(value)
            size = None if n is None else int(n)
            known = None if unknown else float(value)
            result.append(DatasetValue(name, known, low, high, size, run=run, checkpoint=checkpoint, step=step))
    return result
