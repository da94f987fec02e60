"""Measurements taken elsewhere, brought into a store: `curate import STORE FILE --map ours=theirs …`.

    row         the row: our row id, source:index, or a number into the source named by `source`; in a store without rows, somebody else's id
    index       always a number into a source that has been read        row_id      always our row id
    run, checkpoint, step      which training run and checkpoint (a checkpoint that is a whole number is its step too)
    correct, samples           -> n_correct, n_samples, accuracy = correct / samples (NULL for no samples)
    perplexity                 -> target_nll = ln(perplexity), in float64 because perplexities come as low as 1.0000026
    nll, logp                  -> target_nll (mean nats a token), target_logp (summed nats)
    trained                    whether that run trained on the row
    any other name             a column of that name: numbers, true and false, or text

Instead of a row, `on` names a column that the rows have too. With neither the file is about datasets: every other name is a dataset value,
with `n`, `low` and `high` where mapped. Empty cells, NaN and infinities are unknown (NULL). Importing a file again replaces what it brought.
An import is numbered, and `curate forget STORE --import N` takes it back (store/forgetting.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from curate.console import counted
from curate.errors import UsageError, ValidationError, did_you_mean, nearest
from curate.models.naming import natural
from curate.rows import content_id
from curate.store.entries import DatasetValue, Measured
from curate.store.importing.notes import check_columns, notes_of, numeric_names
from curate.store.importing.rows import Found, check_lines, find_rows
from curate.store.importing.table import GROUPED, Table, numbers, read_table, step_of, steps_of, text_of, values_of
from curate.store.imports import Import
from curate.store.store import Store

PLACES = ("run", "checkpoint", "step")
ROWS = ("row", "index", "row_id")
VALUES = ("correct", "samples", "perplexity", "nll", "logp", "trained")
MEANING = {  # ours -> the columns that it gives, where they are called otherwise
    "samples": ("n_samples",),
    "correct": ("n_correct", "accuracy"),
    "perplexity": ("target_nll",),
    "nll": ("target_nll",),
    "logp": ("target_logp",),
}


@dataclass(frozen=True)
class Imported:
    """What an import brought, and its number. lines: of the file. rows: distinct rows, new_rows: of them unknown before. values: dataset values.

    notes: what may be other than meant, a sentence each.
    """

    file: str
    source: str
    lines: int
    rows: int
    new_rows: int
    runs: int
    checkpoints: int
    columns: tuple[str, ...]
    values: int
    number: int = 0
    notes: tuple[str, ...] = ()
    per_row: bool = False

    @property
    def hint(self) -> str:
        return "\n".join(self.notes)

    def __str__(self) -> str:
        places = "" if self.per_row else f" over {self.checkpoints:,} checkpoints of {self.runs:,} runs"
        names = ", ".join(self.columns)
        if not self.rows:
            text = f"{self.file}: {self.values:,} dataset values ({names}) over {self.checkpoints:,} checkpoints of {self.runs:,} runs."
        else:
            new = f" ({self.new_rows:,} of them known only by the file's ids)" if self.new_rows else ""
            text = f"{self.file}: {names} for {self.rows:,} rows{new}{places}, {self.lines:,} lines."
        return counted("\n".join([text, *self.notes]))


def import_file(
    store: Store | str | Path,
    file: str | Path,
    mapping: Mapping[str, str],
    *,
    source: str | None = None,
    kind: str | None = None,
    on: str | None = None,
    new_rows: bool = False,
    worst: Mapping[str, Literal["high", "low"]] | None = None,
    text: Sequence[str] = (),
) -> Imported:
    """Bring a file (parquet, csv, tsv, json, jsonl; text also .gz) into a store (made if there is none). All of it, or nothing.

    mapping: ours -> the file's column. on: a column that the rows have too, "ours=theirs" where the file calls it otherwise. source: which
    source row numbers, or the file's own ids, belong to; the file, if None. new_rows: ids that no row has are rows without text. worst:
    column -> the end that is bad, for `drop_worst`. text: columns that are text although they look like numbers. kind: of rows that have
    no text here ("preference" where a chosen_ or rejected_ column is mapped, else "sft").
    Raises UsageError for what cannot be meant (a column that is not there: the nearest is named), ValidationError for a value that is not what
    its column holds, naming file, line and column (lines count from 1).
    """
    path = Path(file)
    check_names(mapping, on)
    joins = _sides(path, on, mapping) if on else None
    wanted = {**mapping, **({"on": joins[1]} if joins else {})}
    table = read_table(path, wanted)
    how = next((k for k in ROWS if k in mapping), "on" if joins else "")
    places = read_places(table, mapping)
    columns = convert(
        table, {k: v for k, v in mapping.items() if k not in (*PLACES, *ROWS)}, text=text, of_rows=bool(how)
    )
    if not columns:
        raise UsageError(
            "--map: no column to import, only which row and run it is. Add one, such as correct=n_correct samples=n_samples."
        )
    ends = check_worst(worst or {}, columns)
    ours, theirs = joins or ("", mapping.get(how, ""))
    if how:
        check_lines(table, theirs, places)
    else:
        check_places(table, places)
    origin = source or "/".join(path.resolve().parts[-2:])
    needs_rows = bool(joins) or how in ("index", "row_id")
    made = not isinstance(store, Store) and not (Path(store) / "curate.duckdb").exists()
    store = store if isinstance(store, Store) else Store(store, create=not needs_rows)
    one = Import(
        0, table.shown, str(path.resolve()), origin, "", tuple(columns), ends, not any(k in mapping for k in PLACES), n_lines=len(table.frame)
    )  # fmt: skip
    if not how:
        return _import_values(store, table, one, places, columns, made)
    found = find_rows(store, table, how, theirs, ours=ours, source=source, origin=origin, new_rows=new_rows)
    return _import_rows(store, table, one, places, columns, found, kind, made)


def _import_rows(
    store: Store,
    table: Table,
    one: Import,
    places: pl.DataFrame,
    columns: dict[str, np.ndarray],
    found: Found,
    kind: str | None,
    made: bool,
) -> Imported:
    check_columns(store, columns)
    kind = kind or ("preference" if any(c.startswith(("chosen_", "rejected_")) for c in columns) else "sft")
    measured, values = lines_of(table, places, columns, found, one.origin)
    one = Import(
        **{
            **vars(one),
            "how": found.how,
            "fingerprints": tuple(m.fingerprint for m in measured),
            "n_rows": len(set(found.row_ids)),
        }
    )
    new = 0
    if found.foreign:
        ids = list(dict.fromkeys(found.row_ids))
        new = int((store.positions(ids) < 0).sum())
    notes = [*found.notes, *notes_of(store, one, places, columns)]
    kept, replaced = store.write_import(one, measured, values, keys=found.foreign, kind=kind)
    notes += _said(store, kept, replaced, made)
    runs, checkpoints = places["run"].n_unique(), places.n_unique()
    return Imported(
        one.file,
        one.origin,
        one.n_lines,
        one.n_rows,
        new,
        runs,
        checkpoints,
        one.columns,
        0,
        kept.number,
        tuple(notes),
        one.per_row,
    )


def _import_values(
    store: Store, table: Table, one: Import, places: pl.DataFrame, columns: dict[str, np.ndarray], made: bool
) -> Imported:
    said = dataset_values(places, columns)
    kept, replaced = store.write_import(one, [], said=said)
    runs, checkpoints = places["run"].n_unique(), places.n_unique()
    notes = _said(store, kept, replaced, made)
    return Imported(
        one.file, one.origin, one.n_lines, 0, 0, runs, checkpoints, one.columns, len(said), kept.number, tuple(notes)
    )


def _said(store: Store, kept: Import, replaced: Sequence[int], made: bool) -> list[str]:
    lines = (
        [f"It replaces import {' and '.join(map(str, replaced))}."] if any(n != kept.number for n in replaced) else []
    )
    return [*lines, *([f"There was no store at {store.folder}: it was made."] if made else [])]


def check_places(table: Table, places: pl.DataFrame) -> None:
    """ValidationError where two lines about datasets are about the same run and checkpoint."""
    twice = places.is_duplicated()
    if twice.any():
        first = int(twice.arg_max() or 0)
        same = places.with_row_index().filter(pl.all_horizontal(pl.col(n).eq_missing(places[n][first]) for n in PLACES))
        raise ValidationError(
            f"{table.at(first)} and {table.at(same['index'][1]).removeprefix(table.shown + ', ')} are about the same run and checkpoint. "
            "If a line is about a row of data, say which with row= or --on; else map what tells them apart with run= or checkpoint=."
        )


def check_names(mapping: Mapping[str, str], on: str | None = None) -> None:
    """Ours that are nearly one of the words with a meaning, pairs that need each other, and names that mean one column twice. Raises UsageError."""
    words = (*ROWS, *PLACES, *VALUES)
    taken: dict[str, str] = {}
    for ours in mapping:
        near = nearest(ours, words, cutoff=0.8)
        if near and ours not in words:
            raise UsageError(
                f"--map: {ours}= is not a word with a meaning here; did you mean {near}=? (Else choose a less similar column name.)"
            )
        if ours.lower() == "fingerprint" or not re.fullmatch(r"\w+", ours):
            raise UsageError(f"--map: {ours!r} cannot name a column; use letters, digits and underscores.")
        for name in MEANING.get(ours, (ours,)):
            if name.lower() in taken:
                raise UsageError(
                    f"--map: {taken[name.lower()]}= and {ours}= both give the column {name}. Leave one of them out."
                )
            taken[name.lower()] = ours
    if ("correct" in mapping) != ("samples" in mapping):
        raise UsageError(
            "--map: correct= and samples= go together: accuracy is correct / samples. For a finished accuracy map accuracy=."
        )
    named = [*(k for k in ROWS if k in mapping), *(["on"] if on else [])]
    if len(named) > 1:
        raise UsageError(f"--map: the row is named twice, by {named[0]} and {named[1]}. Give one of them.")


def check_worst(worst: Mapping[str, str], columns: Mapping[str, np.ndarray]) -> dict[str, Literal["high", "low"]]:
    """The ends that are bad, of columns that are imported and are numbers. Raises UsageError."""
    for name, end in worst.items():
        if name not in columns:
            hint = did_you_mean(name, columns, f"there are {', '.join(columns)}.", show=str)
            raise UsageError(f"--worst {name}={end}: the import has no column {name!r}; {hint}")
        if end not in ("high", "low"):
            raise UsageError(f"--worst {name}={end}: expected {name}=low (low values are bad) or {name}=high.")
        if columns[name].dtype.kind == "O":
            raise UsageError(f"--worst {name}={end}: {name} is text, which has no low and no high end.")
    return dict(worst)  # type: ignore[arg-type]


def _sides(path: Path, on: str, mapping: Mapping[str, str]) -> tuple[str, str]:
    """`--on` as (the rows' column, the file's)."""
    ours, sign, theirs = on.partition("=")
    if not ours or (sign and not theirs):
        raise UsageError(f"--on {on}: expected a column that both have, such as --on prompt_id, or --on OURS=THEIRS.")
    if not sign:
        return on, on
    names = read_table(path, {}).names
    return (theirs, ours) if theirs not in names and ours in names else (ours, theirs)


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
    places = pl.DataFrame({"run": run.alias("run"), "checkpoint": checkpoint.alias("checkpoint"), "step": steps})
    _check_steps(table, places)
    return places


def _check_steps(table: Table, places: pl.DataFrame) -> None:
    """Two checkpoints of one run at the same step cannot be put in order."""
    distinct = places.unique(maintain_order=True).filter(pl.col("step").is_not_null())
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
    table: Table, places: pl.DataFrame, columns: Mapping[str, np.ndarray], found: Found, origin: str
) -> tuple[list[Measured], Any]:
    """One fingerprint a run and checkpoint, and a pyarrow table of all values; every column stands in the measurement `imported`."""
    import pyarrow as pa

    from curate.store.shards import arrow_column

    places = places[found.lines]
    distinct = places.unique(maintain_order=True)
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
    lines = places.join(prints, on=list(PLACES), how="left", nulls_equal=True, maintain_order="left")
    keys = pl.DataFrame({"fingerprint": lines["fingerprint"], "row_id": found.row_ids})
    kept = _once(table, keys, columns, found)
    taken = {name: values[found.lines][kept] for name, values in columns.items()}
    return measured, pa.table(
        {**keys[kept].to_dict(as_series=True), **{name: arrow_column(values) for name, values in taken.items()}}
    )


def _once(table: Table, keys: pl.DataFrame, columns: Mapping[str, np.ndarray], found: Found) -> np.ndarray:
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
        a, b = int(found.lines[first]), int(found.lines[i])
        if not all(_alike(values[a], values[b]) for values in columns.values()):
            raise ValidationError(
                f"{table.at(a)} and {table.at(b).removeprefix(table.shown + ', ')} are about one row of the store ({key[1]}: two of the ids are "
                "the same text) and have other values. Leave one of them out."
            )
    return np.array(kept)


def _alike(a: Any, b: Any) -> bool:
    both_unknown = (a is np.ma.masked or a != a or a is None) and (b is np.ma.masked or b != b or b is None)
    return bool(both_unknown or a == b)


def dataset_values(places: pl.DataFrame, columns: Mapping[str, np.ndarray]) -> list[DatasetValue]:
    """A value for every line and column; n, low and high belong to the one other column, if there is one."""
    names = [name for name in columns if name not in ("n", "low", "high")]
    about = {key: columns[key] for key in ("low", "high") if key in columns and len(names) == 1}
    found = []
    for i, (run, checkpoint, step) in enumerate(places.iter_rows()):
        n = columns["n"][i] if "n" in columns and not np.isnan(columns["n"][i]) else None
        low, high = (
            None if key not in about or np.isnan(about[key][i]) else float(about[key][i]) for key in ("low", "high")
        )
        for name in names:
            value = columns[name][i]
            unknown = value is np.ma.masked or np.isnan(value)
            size = None if n is None else int(n)
            known = None if unknown else float(value)
            found.append(DatasetValue(name, known, low, high, size, run=run, checkpoint=checkpoint, step=step))
    return found
