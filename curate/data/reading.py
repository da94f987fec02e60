"""Reading a source: its format told from its first rows, then records streamed one after another, bad ones with what is wrong.

`read` opens, `Reading` iterates (again from the start each time), `Reading.good` holds the policy for bad rows, `load` is a list of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from curate.data.columns import Columns
from curate.data.formats import FORMATS, PREFERENCE, Layout, layouts
from curate.data.records import Defect, Problem, Record, SourceInfo, bad_rows_error
from curate.data.sources import Source, find_sources
from curate.data.texts import jsonable
from curate.errors import CurateError, UsageError, ValidationError
from curate.rows import Row

Kind = Literal["preference", "sft"]
Paths = str | Path | Sequence[str | Path | dict[str, Any]]
HEAD = 200  # rows that a format is told from


class Reading:
    """Records of one or more sources, in order. Memory does not grow with their size.

    kind, format, prompt_column ("" where the prompt is no column): as found in the first source; the others are told on their
    own, and have to be of the same kind.
    sources: name and fingerprint of each. `len` is unknown: rows are counted by reading them.
    """

    def __init__(
        self, sources: list[Source], *, kind: Kind | None, format: str, columns: Mapping[str, str] | None
    ) -> None:
        self._sources = sources
        self._columns = Columns(columns)
        self._asked = format
        self._told: dict[str, tuple[Layout, frozenset[str]]] = {}
        first = next((layout for source in sources if (layout := self._layout(source, kind))), None)
        if first is None:
            names = ", ".join(source.name for source in sources)
            raise ValidationError(f"{names}: no rows at all. Is it the right file, and was it written to its end?")
        self.kind: Kind = "preference" if first.kind == "preference" else "sft"
        self.format = first.format
        self.prompt_column = first.prompt
        self.sources = [SourceInfo(source.name, source.fingerprint(), source.path) for source in sources]

    def _layout(self, source: Source, kind: str | None) -> Layout | None:
        """How this source's rows are laid out; None where it has none."""
        if source.name not in self._told:
            head = [row for _, row in islice(source.rows(), HEAD)]
            if not head:
                return None
            raw_rows = [row for row in head if isinstance(row, dict)]
            if not raw_rows:
                broken = next(row for row in head if not isinstance(row, dict))
                what = problem_defect(broken, source.name, 0)
                raise ValidationError(f"{what}\n  None of the first {len(head)} rows can be read.")
            self._columns.check(dict.fromkeys(name for row in raw_rows for name in row), source.name)
            mapped = [self._columns.apply(row) for row in raw_rows]
            layout = choose_layout(source.name, mapped, kind=kind, format=self._asked, named=self._columns.ours)
            self._told[source.name] = layout, number_columns(raw_rows) if source.is_text_table else frozenset()
        return self._told[source.name][0]

    def __iter__(self) -> Iterator[Record]:
        for source in self._sources:
            layout = self._layout(source, self.kind)
            if layout is None:
                continue
            numbers = self._told[source.name][1]
            for index, raw in source.rows():
                yield self._record(source.name, index, raw, layout, numbers)

    def _record(
        self, name: str, index: int, raw: dict[str, Any] | Problem, layout: Layout, numbers: frozenset[str]
    ) -> Record:
        if not isinstance(raw, dict):
            return Record(name, index, None, {}, (problem_defect(raw, name, index),))
        mapped = self._columns.apply(raw)
        problems: list[Problem] = []
        row = layout.convert(mapped, layout, problems)
        columns = {key: jsonable(value) for key, value in mapped.items() if key not in layout.uses}
        for column in numbers & columns.keys():
            columns[column] = number(columns[column])
        if problems:
            named = ((self._columns.named(column), found, expected) for column, found, expected in problems)
            return Record(
                name,
                index,
                None,
                columns,
                tuple(problem_defect(problem, name, index) for problem in dict.fromkeys(named)),
            )
        return Record(name, index, row, columns)

    def good(
        self,
        on_bad_row: Literal["error", "drop"] = "error",
        *,
        bad: list[Record] | None = None,
        setting: str = "source",
        target: str | None = None,
    ) -> Iterator[Record]:
        """The records that have a row, in order; every other one is appended to `bad` if given.

        "error": from the first bad row on nothing more is given; the rest is read to count them, then ValidationError is raised.
        "drop": bad rows are left out. Either way ValidationError when not one row is good.
        setting, target: the recipe's section and what to give `curate validate`, for the message.
        """
        defects: list[Defect] = []
        n_rows = n_bad = 0
        for record in self:
            n_rows += 1
            if record.row is None:
                n_bad += 1
                defects.extend(record.defects)
                if bad is not None:
                    bad.append(record)
            elif on_bad_row == "drop" or not n_bad:
                yield record
        if n_bad and (on_bad_row == "error" or n_bad == n_rows):
            raise bad_rows_error(defects, n_bad, n_rows, setting=setting, target=target or defects[0].file)


def read(
    path: Paths,
    *,
    kind: Kind | None = None,
    split: str = "train",
    revision: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    base: Path | None = None,
    setting: str = "source",
) -> Reading:
    """Opens a source, or several: a file, folder, glob, hub id, or a list of them (see `sources`), in a format of `FORMATS`; or rows in memory,
    a `datasets.Dataset`, a list of dicts, a data frame.

    kind: None takes what the format says, preference first. columns: ours: theirs, a name or a template (see `columns`).
    base: the folder relative paths start from. setting: the recipe's key of these rows, for messages. Fingerprints are taken here, the
    rows are read when the reading is iterated.
    Errors: ValidationError for what is missing, empty, unreadable or of another kind; UsageError for a format or column that is not known.
    """
    try:
        if format != "auto" and format not in FORMATS:
            import difflib

            near = difflib.get_close_matches(format, FORMATS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"source.format: '{format}' is not a format: auto, {', '.join(FORMATS)}.{hint}")
        return Reading(
            find_sources(path, split=split, revision=revision, base=base), kind=kind, format=format, columns=columns
        )
    except CurateError as error:
        if setting == "source":
            raise
        text = re.sub(r"(?<![\w./])source\.(?=(?:columns|format|path)\b)", f"{setting}.", str(error))
        raise type(error)(text if text.startswith(setting) else f"{setting}: {text}") from None


def load(
    path: Paths,
    *,
    kind: Kind | None = None,
    split: str = "train",
    revision: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["error", "drop"] = "error",
) -> list[Row]:
    """Every row of a source, duplicates as found. ValidationError on bad rows unless `on_bad_row="drop"`. Arguments as in `read`."""
    reading = read(path, kind=kind, split=split, revision=revision, format=format, columns=columns)
    return [record.row for record in reading.good(on_bad_row) if record.row is not None]


def problem_defect(problem: Problem, name: str, index: int) -> Defect:
    return Defect(name, index, *problem)


def choose_layout(
    source: str, head: list[dict[str, Any]], *, kind: str | None, format: str, named: frozenset[str] = frozenset()
) -> Layout:
    """The layout of a source's rows, of the kind and format that were asked for. ValidationError says what is missing."""
    names = list(dict.fromkeys(name for row in head for name in row))
    possible = layouts(names, head, named)
    fitting = [layout for layout in possible if kind in (None, layout.kind)]
    if format != "auto":
        same = (format, f"{format}_preference")
        if same_format := [layout for layout in fitting if layout.format in same]:
            return same_format[0]
        raise ValidationError(
            f"{source}: not in format '{format}' ({FORMATS[format]}){f' as kind {kind}' if kind else ''}; its columns are "
            f"{', '.join(names)}.{f' It looks like {possible[0].format}.' if possible else ''} Leave `format: auto`, or map columns "
            "with `--set source.columns.<ours>=<theirs>`."
        )
    if fitting:
        return fitting[0]
    if any(layout.format == "kto" for layout in possible):
        raise ValidationError(
            f"{source}: unpaired preferences (KTO: one reply and a label a row), which make no pairs; kind: preference needs chosen "
            "and rejected replies to the same prompt. What can be measured on them is each reply's likelihood: `--set kind=sft` "
            "(target_logp, target_nll)."
        )
    if possible and possible[0].format in PREFERENCE:
        raise ValidationError(
            f"{source}: preference pairs ({possible[0].format}), but kind: sft was asked for. Use kind: preference, or train on the chosen "
            "replies alone with `--set source.columns.completion=chosen`."
        )
    if possible:
        raise ValidationError(
            f"{source}: SFT examples ({possible[0].format}; columns {', '.join(names)}), but kind: preference needs 'chosen' and "
            "'rejected'. Use kind: sft, or name the columns with `--set source.columns.chosen=...` and `--set source.columns.rejected=...`."
        )
    hint = ""
    if {"prompt", "chosen"} <= set(names) and kind != "preference":
        hint = " To train on the chosen replies: `--set kind=sft --set source.columns.completion=chosen`."
    elif {"chosen", "rejected"} <= set(names):
        hint = " 'chosen' and 'rejected' are texts without turns, so the prompt has to be a column of its own."
    listing = "\n".join(f"    {name:20} {what}" for name, what in FORMATS.items())
    raise ValidationError(
        f"{source}: no known format has the columns {', '.join(names)}.{hint} Name them with `--set source.columns.<ours>=<theirs>`. "
        f"Formats:\n{listing}"
    )


def number_columns(head: list[dict[str, Any]]) -> frozenset[str]:
    """Columns of a text table whose filled cells are all numbers (written as Python writes them, so that 007 stays text)."""
    filled = {name: [row[name] for row in head if row.get(name)] for name in head[0]}
    return frozenset(
        name for name, cells in filled.items() if cells and not any(isinstance(number(cell), str) for cell in cells)
    )


def number(cell: Any) -> Any:
    """A text cell as the number it spells, None where it is empty, else as it is."""
    if not isinstance(cell, str):
        return cell
    if not cell:
        return None
    try:
        whole = int(cell)
        return whole if str(whole) == cell else cell
    except ValueError:
        pass
    try:
        return float(cell) if cell.strip()[-1:].isdigit() and not cell.startswith("0" * 2) and "_" not in cell else cell
    except ValueError:
        return cell
