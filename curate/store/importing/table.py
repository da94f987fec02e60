"""A file of values taken elsewhere, as columns: read by the readers that sources are read by, so that one file means one thing.

Cells of csv and json keep how they were written until it is known what they are: ids stay text (007 is not 7), a number may come as text,
and what is neither is an error that names the line. Empty cells, NaN and infinities are unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curate.data.files import FILE_TYPES, file_type, rows_of_file
from curate.data.records import row_in_file
from curate.errors import UsageError, ValidationError, did_you_mean, listed, nearest
from curate.models.naming import step_in_name

PLAIN = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"  # a number as programs write it
LIKE_A_NUMBER = r"^[\s$€£+-]*\d[\d.,_'\s]*%?$"  # 1,000 or 85% or 1.000,5
WHOLE_FLOAT = r"^-?(?:0|[1-9]\d*)\.0+$"
GROUPED = r"^\d{1,3}(?:[,._' ]\d{3})+$"


@dataclass(frozen=True)
class Table:
    """A file and its columns. shown: what errors call it. names: of all its columns; frame: those that were asked for. lines: of the file,
    from 1, on which its rows begin; none where rows are no lines.
    """

    path: Path
    shown: str
    names: list[str]
    frame: pl.DataFrame
    lines: Sequence[int | None] = ()

    def at(self, index: int) -> str:
        """Where a row stands, for people: its line in a text file, else its number from 1."""
        return f"{self.shown}, {row_in_file(index, self.lines[index] if self.lines else None)}"

    def refuse(self, bad: np.ndarray, column: str, expected: str) -> None:
        """ValidationError about the first cell that is wrong, if one is."""
        if bad.any():
            index, n = int(np.flatnonzero(bad)[0]), int(bad.sum())
            counted = f" {n:,} of {len(bad):,} rows are like this." if n > 1 else ""
            raise ValidationError(
                f"{self.at(index)}: {column!r} is {self._cell(column, index)}, expected {expected}.{counted}"
            )

    def _cell(self, column: str, index: int) -> str:
        """A cell as it stands in the file, with its type where the file has types."""
        value = self.frame[column][index]
        if value is None:
            return "empty"
        if file_type(self.path) in (".csv", ".tsv"):
            return str(value) if str(value).strip() == value else repr(value)
        return f"{value!r} ({type(value).__name__})"


def read_table(path: Path, columns: Mapping[str, str]) -> Table:
    """Read the columns of a file that `wanted` (ours -> theirs) names. UsageError: no such file, type or column; ValidationError: not readable."""
    shown = path.as_posix()
    if not path.is_file():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, names)
        raise UsageError(
            f"{shown}: no such file." + (f" Did you mean {path.with_name(near).as_posix()}?" if near else "")
        )
    kind = file_type(path)
    if not kind:
        raise UsageError(f"{shown}: expected {', '.join(FILE_TYPES)} (all but parquet also .gz).")
    picked = set(columns.values())
    lines: list[int | None] = []
    names, frame = _parquet(path, picked) if kind == ".parquet" else _text(path, picked, lines)
    for ours, theirs in columns.items():
        if theirs not in names:
            raise UsageError(_no_column(shown, ours, theirs, names))
    if columns and not len(frame):
        raise ValidationError(f"{shown}: no rows in this file.")
    return Table(path, shown, names, frame, lines)


def _no_column(shown: str, ours: str, theirs: str, names: list[str]) -> str:
    hint = did_you_mean(
        theirs, names, f"It has: {listed(names) or 'none'}.", show=lambda column: f"{ours}={column}", sentence=True
    )
    mark = next((m for m in (";", "\t", "|") if len(names) == 1 and theirs in names[0].split(m)), None)
    if mark:
        name = "tabs" if mark == "\t" else mark
        hint = f"Its cells are separated by {name}: write it with commas (and decimal points), or as .tsv with tabs."
    return f"{shown}: no column {theirs!r} (wanted for {ours}). {hint}"


def _parquet(path: Path, columns: Collection[str]) -> tuple[list[str], pl.DataFrame]:
    try:
        names = list(pl.read_parquet_schema(path))
        frame = pl.read_parquet(path, columns=[n for n in names if n in columns] or names[:1])
    except (pl.exceptions.PolarsError, OSError) as error:
        what = (str(error).splitlines() or ["it is empty"])[0]
        raise ValidationError(f"{path.as_posix()}: not readable as parquet ({what}).") from None
    columns_read: list[pl.Series] = []
    for column in frame.iter_columns():
        dtype: Any = column.dtype
        if dtype in (pl.Categorical, pl.Enum):
            column = column.cast(pl.String)
        elif dtype.is_nested() or dtype == pl.Binary or dtype == pl.Object:
            column = pl.Series(
                column.name,
                [None if v is None else json.dumps(v, default=str) for v in column.to_list()],
                dtype=pl.String,
            )
        elif dtype.is_decimal():
            column = column.cast(pl.Float64)
        elif dtype.is_temporal():
            column = column.cast(pl.String)
        columns_read.append(_without_blanks(column))
    return names, pl.DataFrame(columns_read)


def _text(path: Path, asked: Collection[str], lines: list[int | None]) -> tuple[list[str], pl.DataFrame]:
    """The rows of a text file: of csv every cell is text, of json each has the type it was written with. lines: is filled."""
    shown = path.as_posix()
    names: dict[str, None] = {}
    columns: dict[str, list[Any]] = {name: [] for name in asked}
    n = 0
    for index, line, row in rows_of_file(path, shown):
        lines.append(line)
        if not isinstance(row, dict):
            _, value, expected = row
            raise ValidationError(f"{shown}, {row_in_file(index, line)}: {value}, expected {expected}.")
        names.update(dict.fromkeys(row))
        for name, values in columns.items():
            values.append(row.get(name))
        n += 1
    if not n:
        raise ValidationError(f"{shown}: no rows in this file.")
    return list(names), pl.DataFrame(
        [_without_blanks(_series(name, values)) for name, values in columns.items() if name in names]
    )


def _series(name: str, values: list[Any]) -> pl.Series:
    """Values as JSON has them: of one type as they are, of several as text."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {bool} and kinds:
        return pl.Series(name, values, dtype=pl.Boolean)
    try:
        if kinds <= {int} and kinds:
            return pl.Series(name, values, dtype=pl.Int64)
        if kinds <= {int, float} and kinds:
            return pl.Series(name, values, dtype=pl.Float64)
    except (OverflowError, TypeError, pl.exceptions.PolarsError):
        pass  # whole numbers beyond 64 bits: text
    text = [v if isinstance(v, str) or v is None else json.dumps(v, ensure_ascii=False) for v in values]
    return pl.Series(name, text, dtype=pl.String)


def _without_blanks(column: pl.Series) -> pl.Series:
    """Blank text is an empty cell."""
    if column.dtype != pl.String:
        return column
    return (
        column.to_frame()
        .select(pl.when(pl.col(column.name).str.strip_chars() != "").then(pl.col(column.name)))
        .to_series()
    )


def text_of(column: pl.Series) -> pl.Series:
    """A column as text, NULL where empty: whole numbers without a point, whatever they were kept as (7.0 in a column of numbers is 7)."""
    if column.dtype.is_float():
        column = column.fill_nan(None)
        if bool((column.drop_nulls() % 1 == 0).all()) and bool((column.drop_nulls().abs() < 2**63).all()):
            column = column.cast(pl.Int64)
    text = column.cast(pl.String)
    if column.dtype == pl.String and len(known := text.drop_nulls()):
        text = text.str.strip_chars()
        if bool(known.str.strip_chars().str.contains(r"^-?(?:0|[1-9]\d*)(?:\.0+)?$").all()):
            text = text.str.replace(r"\.0+$", "")
    return text


def numbers(table: Table, column: str, *, why: str = "") -> np.ndarray:
    """(lines,) float64, NaN for what is unknown. Raises ValidationError naming the first cell that is no number."""
    series = table.frame[column]
    if series.dtype == pl.String:
        numeric, bad = _parsed(series)
        hint = ""
        if bad.any() and re.match(LIKE_A_NUMBER, str(series[int(np.flatnonzero(bad)[0])])):
            hint = " as programs write it (1000.5, without separators or signs)"
        table.refuse(bad, column, f"a number{hint}{why}")
        values = numeric
    else:
        values = series.cast(pl.Float64).fill_null(float("nan")).to_numpy().copy()
    values[~np.isfinite(values)] = np.nan
    return values


def _parsed(series: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Text as numbers, and which cells are none. true and false are 1 and 0; NaN and infinities, however written, are unknown."""
    lowered = series.str.strip_chars().str.to_lowercase()
    unknown = lowered.is_null() | lowered.str.contains(r"^[+-]?(nan|inf|infinity)$").fill_null(True)
    lowered = lowered.replace({"true": "1", "false": "0"})
    good = lowered.str.contains(PLAIN).fill_null(False)
    numeric = pl.select(pl.when(good).then(lowered)).to_series().cast(pl.Float64, strict=False)
    values: np.ndarray = numeric.fill_null(float("nan")).to_numpy().copy()
    return values, (~good & ~unknown).to_numpy()


def values_of(table: Table, column: str, ours: str, *, as_text: bool) -> np.ndarray:
    """A column of the user's: numbers, true and false (masked where unknown), or text (None where unknown). A column that is partly numbers
    and partly text is an error, unless it is said to be text.
    """
    series = table.frame[column]
    if as_text:
        return np.array(text_of(series).to_list(), dtype=object)
    if series.dtype == pl.Boolean:
        return np.ma.MaskedArray(series.fill_null(False).to_numpy(), series.is_null().to_numpy())
    if series.dtype == pl.String:
        stripped = series.str.strip_chars()
        known = stripped.drop_nulls()
        if len(known) and bool(known.str.to_lowercase().is_in(["true", "false"]).all()):
            truth = (stripped.str.to_lowercase() == "true").fill_null(False)
            return np.ma.MaskedArray(truth.to_numpy(), stripped.is_null().to_numpy())
        _, bad = _parsed(series)
        like = known.str.contains(LIKE_A_NUMBER)
        if len(known) and int(bad.sum()) == len(known) and not bool(like.any()):
            return np.array(stripped.to_list(), dtype=object)
        return numbers(table, column, why=f". If this column is text, say `--text {ours}`")
    return numbers(table, column)


def steps_of(table: Table, column: str) -> np.ndarray:
    """(lines,) int64: 9, 9.0 and checkpoint-9 are step 9. Raises ValidationError for a cell that tells no step."""
    given = table.frame[column]
    text = given.str.strip_chars() if given.dtype == pl.String else text_of(given)
    table.refuse(text.is_null().to_numpy(), column, "a step, such as 400 or checkpoint-400")
    of = {value: step_of(value) for value in text.unique().to_list()}
    steps = [of[value] for value in text.to_list()]
    table.refuse(
        np.array([s is None for s in steps]),
        column,
        "a step, such as 400 or checkpoint-400 (whole, 0 or more, without separators)",
    )
    return np.array(steps, np.int64)


def step_of(text: str) -> int | None:
    """The step that a cell tells, None for none."""
    if re.fullmatch(r"\d{1,18}", text):
        return int(text)
    if re.match(WHOLE_FLOAT, text) and not text.startswith("-") and not re.match(GROUPED, text):
        return int(text.partition(".")[0])
    return step_in_name(text)
