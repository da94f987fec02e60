"""Measurements taken elsewhere, brought into a store: `curate import STORE FILE --map ours=theirs …`.

    row         the row: our row id; or a number into the source named by `source`, when that has been read; else somebody else's id
    index       always a number into a source that has been read        row_id      always our row id
    run, checkpoint, step      which training run and checkpoint (a checkpoint that is a whole number is its step too)
    correct, samples           -> n_correct, n_samples, accuracy = correct / samples (NULL for no samples)
    perplexity                 -> target_nll = ln(perplexity), in float64 because perplexities come as low as 1.0000026
    nll, logp                  -> target_nll (mean nats a token), target_logp (summed nats)
    trained                    whether that run trained on the row
    any other name             a measurement column of that name

Without row, index or row_id the file is about datasets: every other name is a dataset value, with `n`, `low` and `high` where mapped.
Empty cells, NaN and infinities are unknown (NULL). Importing a file again replaces what it brought.
"""

from __future__ import annotations

import difflib
import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from curate.errors import UsageError, ValidationError
from curate.progress import counted
from curate.rows import ID_DIGITS, content_id
from curate.store import DatasetValue, Measured, Store

PLACES = ("run", "checkpoint", "step")
ROWS = ("row", "index", "row_id")
VALUES = ("correct", "samples", "perplexity", "nll", "logp", "trained")
READERS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


@dataclass(frozen=True)
class Imported:
    """What an import brought. lines: of the file. rows: distinct rows, new_rows: of them unknown before. values: dataset values.

    hint: what may have been meant where numbers were taken for somebody else's ids, else "".
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
    hint: str = ""

    def __str__(self) -> str:
        places = f"{self.checkpoints:,} checkpoints of {self.runs:,} runs"
        if not self.rows:
            return counted(f"{self.file}: {self.values:,} dataset values ({', '.join(self.columns)}) over {places}.")
        new = f" ({self.new_rows:,} of them known only by the file's ids)" if self.new_rows else ""
        told = (
            f"{self.file}: {', '.join(self.columns)} for {self.rows:,} rows{new} over {places}, {self.lines:,} lines."
        )
        return counted(told) + (f"\n{self.hint}" if self.hint else "")


def import_file(
    store: Store | str | Path,
    file: str | Path,
    mapping: Mapping[str, str],
    *,
    source: str | None = None,
    kind: str | None = None,
) -> Imported:
    """Bring a parquet, csv or jsonl(.gz) file into a store (made if there is none).

    mapping: ours -> the file's column. source: which source row numbers, or the file's own ids, belong to; the file, if None. kind: of rows that
    have no text here ("preference" where a chosen_ or rejected_ column is mapped, else "sft"). Raises UsageError for a column that the file
    does not have (the nearest is named), ValidationError for a value that is no number, naming file, row and column (rows count from 0).
    """
    path = Path(file)
    shown = path.as_posix()
    check_names(mapping)
    table = read_table(path)
    for ours, theirs in mapping.items():
        if theirs not in table.columns:
            near = difflib.get_close_matches(theirs, table.columns, 1)
            hint = f"Did you mean {ours}={near[0]}?" if near else f"It has: {', '.join(table.columns)}."
            raise UsageError(f"{shown}: no column {theirs!r} (wanted for {ours}). {hint}")
    if not len(table):
        raise ValidationError(f"{shown}: no rows in this file.")
    taken = [k for k in ROWS if k in mapping]
    if len(taken) > 1:
        raise UsageError(f"--map: the row is named twice, by {taken[0]} and {taken[1]}. Give one of them.")
    places = read_places(table, mapping, path)
    columns = convert(table, {k: v for k, v in mapping.items() if k not in (*PLACES, *ROWS)}, shown)
    if not columns:
        raise UsageError(
            "--map: no column to import, only which row and run it is. Add one, such as correct=n_correct samples=n_samples."
        )
    origin = source or "/".join(path.resolve().parts[-2:])
    store = store if isinstance(store, Store) else Store(store, create=True)
    runs = places["run"].n_unique()
    checkpoints = places.n_unique()
    if not taken:
        twice = places.is_duplicated()
        if twice.any():
            first = int(twice.arg_max() or 0)
            same = places.with_row_index().filter(
                pl.all_horizontal(pl.col(n).eq_missing(places[n][first]) for n in PLACES)
            )
            raise ValidationError(
                f"{shown}: rows {same['index'][0]} and {same['index'][1]} are about the same run and checkpoint. If a line is about a row of "
                "data, say which with row=; else map what tells them apart with run= or checkpoint=."
            )
        values = dataset_values(places, columns)
        store.write_dataset_values(f"import:{origin}", values)
        return Imported(shown, origin, len(table), 0, 0, runs, checkpoints, tuple(columns), len(values))
    kind = kind or ("preference" if any(c.startswith(("chosen_", "rejected_")) for c in columns) else "sft")
    keys = table[mapping[taken[0]]]
    row_ids, new = find_rows(store, keys, taken[0], source, origin, kind, shown)
    write(store, places, row_ids, columns, origin, shown)
    hint = _numbers_hint(store, keys) if new and taken[0] == "row" and source is None else ""
    return Imported(shown, origin, len(table), len(set(row_ids)), new, runs, checkpoints, tuple(columns), 0, hint)


def check_names(mapping: Mapping[str, str]) -> None:
    """Ours that are nearly one of the words with a meaning, and pairs that need each other. Raises UsageError."""
    words = (*ROWS, *PLACES, *VALUES)
    for ours in mapping:
        near = difflib.get_close_matches(ours, words, 1, 0.8)
        if near and ours not in words:
            raise UsageError(
                f"--map: {ours}= is not a word with a meaning here; did you mean {near[0]}=? (Else choose a less similar column name.)"
            )
        if ours.lower() == "fingerprint" or not re.fullmatch(r"\w+", ours):
            raise UsageError(f"--map: {ours!r} cannot name a column; use letters, digits and underscores.")
    if ("correct" in mapping) != ("samples" in mapping):
        raise UsageError(
            "--map: correct= and samples= go together: accuracy is correct / samples. For a finished accuracy map accuracy=."
        )


def read_table(path: Path) -> pl.DataFrame:
    """A file as a polars frame. Raises UsageError where there is none of a known type, ValidationError where it cannot be parsed."""
    kind = next((end for end in sorted(READERS, key=len, reverse=True) if path.name.lower().endswith(end)), None)
    if not path.is_file():
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
            if path.parent.is_dir()
            else []
        )
        raise UsageError(
            f"{path.as_posix()}: no such file."
            + (f" Did you mean {path.with_name(near[0]).as_posix()}?" if near else "")
        )
    if kind is None:
        raise UsageError(f"{path.as_posix()}: expected {', '.join(READERS)}.")
    try:
        if kind == ".parquet":
            return pl.read_parquet(path)
        data = gzip.decompress(path.read_bytes()) if kind.endswith(".gz") else path.read_bytes()
        if not data.strip():
            return pl.DataFrame()
        return (
            pl.read_csv(data, infer_schema_length=None)
            if ".csv" in kind
            else pl.read_ndjson(data, infer_schema_length=None)
        )
    except (pl.exceptions.PolarsError, OSError, EOFError, UnicodeDecodeError) as error:
        raise ValidationError(
            f"{path.as_posix()}: not readable as {kind.strip('.')} ({str(error).splitlines()[0]})."
        ) from None


def read_places(table: pl.DataFrame, mapping: Mapping[str, str], path: Path) -> pl.DataFrame:
    """run, checkpoint, step for every line. Without a run, it is the file's name without its ending."""
    n = len(table)
    run = _text(table[mapping["run"]]) if "run" in mapping else pl.Series([path.name.split(".")[0]] * n)
    given = mapping.get("checkpoint") or mapping.get("step")
    checkpoint = _text(table[given]) if given else pl.Series([""] * n, dtype=pl.String)
    for name, column in (("run", run), ("checkpoint", checkpoint)):
        if column.null_count():
            row = column.is_null().arg_max()
            raise ValidationError(
                f"{path.as_posix()}, row {row}: {mapping.get(name, name)!r} is empty, expected which {name} the line is about."
            )
    steps = (
        _text(table[mapping["step"]])
        if "step" in mapping
        else checkpoint.str.extract(r"^(?:checkpoint-|step-?)?(\d+)$", 1)
    )
    return pl.DataFrame(
        {
            "run": run.alias("run"),
            "checkpoint": checkpoint.alias("checkpoint"),
            "step": steps.cast(pl.Int64, strict=False),
        }
    )


def convert(table: pl.DataFrame, mapping: Mapping[str, str], file: str) -> dict[str, np.ndarray]:
    """Our columns as (lines,) arrays: float64 with NaN for unknown, or masked booleans."""
    given = {ours: numbers(table[theirs], file) for ours, theirs in mapping.items()}
    result: dict[str, np.ndarray] = {}
    for ours, values in given.items():
        theirs = mapping[ours]
        if ours == "samples":
            _check(values < 0, table[theirs], file, "a count, 0 or more")
            result["n_samples"] = values
        elif ours == "correct":
            with np.errstate(invalid="ignore"):
                _check(
                    (values < 0) | (values > given["samples"]),
                    table[theirs],
                    file,
                    f"a count from 0 to {mapping['samples']}",
                )
            result["n_correct"] = values
            with np.errstate(invalid="ignore", divide="ignore"):
                result["accuracy"] = np.where(given["samples"] > 0, values / given["samples"], np.nan)
        elif ours == "perplexity":
            _check(values < 1 - 1e-6, table[theirs], file, "a perplexity, 1 or more")
            result["target_nll"] = np.log(values)
        elif ours == "nll":
            result["target_nll"] = values
        elif ours == "logp":
            result["target_logp"] = values
        elif ours == "trained":
            _check((values != 0) & (values != 1) & ~np.isnan(values), table[theirs], file, "true or false")
            result["trained"] = np.ma.MaskedArray(values == 1, np.isnan(values))
        else:
            result[ours] = values
    return result


def numbers(column: pl.Series, file: str) -> np.ndarray:
    """(lines,) float64, NaN for empty cells. Raises ValidationError naming the first cell that is no number."""
    if column.dtype == pl.Categorical or column.dtype == pl.Enum:
        column = column.cast(pl.String)
    if column.dtype == pl.String:
        stripped = column.str.strip_chars()
        plain = stripped.str.to_lowercase().replace({"true": "1", "false": "0", "": None})
        numeric = plain.cast(pl.Float64, strict=False)
        _check((numeric.is_null() & plain.is_not_null()).to_numpy(), column, file, "a number")
        column = numeric
    elif not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise ValidationError(f"{file}, row 0: {column.name!r} is {column[0]!r} ({column.dtype}), expected a number.")
    values: np.ndarray = column.cast(pl.Float64).fill_null(float("nan")).to_numpy().copy()
    values[~np.isfinite(values)] = np.nan
    return values


def find_rows(
    store: Store, keys: pl.Series, how: str, source: str | None, origin: str, kind: str, file: str
) -> tuple[list[str], int]:
    """The row id of every line, and how many rows were added for keys that only the file knows."""
    text = _text(keys)
    if text.null_count():
        raise ValidationError(
            f"{file}, row {text.is_null().arg_max()}: {keys.name!r} is empty, expected which row the line is about."
        )
    unique = text.unique(maintain_order=True)
    known_sources = [s["source"] for s in store.sources()]
    if how == "row" and bool(unique.str.contains(rf"^[0-9a-f]{{{ID_DIGITS}}}$").all()):
        how = "row_id" if (store.positions(unique.to_list()) >= 0).any() else "foreign"
    elif how == "row":
        how = "index" if source in known_sources else "foreign"
        meant = [name for name in known_sources if source and Path(name).name == Path(source).name]
        if how == "foreign" and meant:
            raise UsageError(f"--source {source}: rows were read as {meant[0]}. Say --source {meant[0]}.")
    if how == "row_id":
        ids = unique.to_list()
        unknown = np.flatnonzero(store.positions(ids) < 0)
        if len(unknown):
            how_many = f"{len(unknown):,} of {len(ids):,} rows"
            raise ValidationError(
                f"{file}: {keys.name!r} names row {ids[unknown[0]]}, which is not in this store ({how_many})."
            )
    elif how == "index":
        ids = _rows_at(store, unique, source, known_sources, keys.name, file)
    else:
        before = store.status()["rows"]
        ids = store.add_foreign_rows(origin, unique.to_list(), kind=kind)
        new = store.status()["rows"] - before
        return _spread(text, unique, ids), new
    return _spread(text, unique, ids), 0


def write(
    store: Store, places: pl.DataFrame, row_ids: list[str], columns: Mapping[str, np.ndarray], origin: str, file: str
) -> None:
    """One fingerprint a run and checkpoint; every column stands in the measurement `imported`."""
    import pyarrow as pa

    distinct = places.unique(maintain_order=True)
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
        for run, checkpoint, step in distinct.iter_rows()
    ]
    prints = distinct.with_columns(pl.Series("fingerprint", [m.fingerprint for m in measured]))
    lines = places.join(prints, on=list(PLACES), how="left", nulls_equal=True, maintain_order="left")
    keys = pl.DataFrame({"fingerprint": lines["fingerprint"], "row_id": row_ids})
    twice = keys.is_duplicated()
    if twice.any():
        first = int(twice.arg_max() or 0)
        same = keys.with_row_index().filter(
            (pl.col("fingerprint") == keys["fingerprint"][first]) & (pl.col("row_id") == keys["row_id"][first])
        )
        raise ValidationError(
            f"{file}: rows {same['index'][0]} and {same['index'][1]} are about the same row, run and checkpoint. "
            "Map what tells them apart with run= or checkpoint=, or remove one."
        )
    from curate.storage.shards import arrow_column

    table = pa.table(
        {**keys.to_dict(as_series=True), **{name: arrow_column(values) for name, values in columns.items()}}
    )
    store.put_values(measured, table)


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


def _rows_at(
    store: Store, unique: pl.Series, source: str | None, known: list[str], column: str, file: str
) -> list[str]:
    if source is None and len(known) == 1:
        source = known[0]
    if source not in known:
        near = difflib.get_close_matches(source or "", known, 1)
        listed = ", ".join(known) or "none; `curate run RECIPE` reads one"
        hint = f"Did you mean --source {near[0]}?" if near else f"Sources that have been read: {listed}."
        raise UsageError(f"index= needs the source that the numbers count in; found {source or 'none'}. {hint}")
    frame = store.sql("SELECT index::VARCHAR AS key, row_id FROM data.occurrences WHERE source = ?", [source])
    of = dict(zip(frame["key"], frame["row_id"], strict=True))
    wrong = [key for key in unique.to_list() if key not in of]
    if wrong:
        raise ValidationError(
            f"{file}: {column!r} is {wrong[0]}, expected the number of a good row of {source} (counted from 0; it has {len(of):,}). "
            f"{len(wrong):,} of {len(unique):,} are like this."
        )
    return [of[key] for key in unique.to_list()]


def _numbers_hint(store: Store, keys: pl.Series) -> str:
    """Whole numbers that were taken for somebody else's ids may have been the numbers of rows that the store has read."""
    read = [s["source"] for s in store.sources() if s["role"] == "train"]
    if not read or not bool(_text(keys).str.contains(r"^\d+$").all()):
        return ""
    where = read[0] if len(read) == 1 else f"FILE ({', '.join(read)})"
    return f"Are these the numbers of rows of a source, counted from 0? Then import it again with --source {where}."


def _spread(text: pl.Series, unique: pl.Series, ids: list[str]) -> list[str]:
    """The ids of the distinct keys back to every line."""
    frame = pl.DataFrame({"key": text}).join(
        pl.DataFrame({"key": unique, "id": ids}), on="key", how="left", maintain_order="left"
    )
    found: list[str] = frame["id"].to_list()
    return found


def _text(column: pl.Series) -> pl.Series:
    """A column as text: whole numbers without a point, whatever their type."""
    if column.dtype.is_float() and bool((column.drop_nulls() % 1 == 0).all()):
        column = column.cast(pl.Int64, strict=False)
    return column.cast(pl.String, strict=False)


def _check(bad: np.ndarray, column: pl.Series, file: str, expected: str) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        value = column[row]
        raise ValidationError(
            f"{file}, row {row}: {column.name!r} is {value!r} ({type(value).__name__}), expected {expected}. "
            f"{int(bad.sum()):,} of {len(column):,} rows are like this."
        )
