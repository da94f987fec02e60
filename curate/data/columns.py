"""The recipe's `columns: {ours: theirs}`: which of the user's columns is what the formats call prompt, chosen, completion, ...

`theirs` is a column's name, or a template over several: `prompt: "{Body} {Question}"`, `prompt: "Question: {question}\\nAnswer:"`.
A column named plainly is used up; columns of a template stay among the user's other columns.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterable, Mapping
from typing import Any

from curate.data.formats import KNOWN_COLUMNS
from curate.errors import UsageError


class Columns:
    """Renames a raw row's columns; without a mapping the row passes as it is."""

    def __init__(self, mapping: Mapping[str, str] | None) -> None:
        self.plain: dict[str, str] = {}  # theirs -> ours
        self.templates: dict[str, tuple[str, tuple[str, ...]]] = {}  # ours -> (template, fields)
        for ours, theirs in (mapping or {}).items():
            if ours not in KNOWN_COLUMNS:
                near = difflib.get_close_matches(ours, KNOWN_COLUMNS, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise UsageError(
                    f"source.columns.{ours}: not a column that a format knows: {', '.join(KNOWN_COLUMNS)}.{hint}"
                )
            if "{" in theirs:
                self.templates[ours] = (theirs, template_fields(ours, theirs))
            elif theirs in self.plain:
                raise UsageError(f"source.columns: '{theirs}' is named twice, for {self.plain[theirs]} and for {ours}.")
            else:
                self.plain[theirs] = ours
        self.ours = frozenset(mapping or ())
        self.spent = frozenset(
            field for _, fields in self.templates.values() for field in fields
        )  # part of a text already
        self.theirs = {ours: theirs for theirs, ours in self.plain.items()}

    def check(self, names: Iterable[str], source: str) -> None:
        """UsageError where a named column is not in the source."""
        present = list(names)
        wanted = [
            *self.plain.items(),
            *((field, ours) for ours, (_, fields) in self.templates.items() for field in fields),
        ]
        for theirs, ours in wanted:
            if theirs not in present:
                near = difflib.get_close_matches(theirs, present, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise UsageError(
                    f"source.columns.{ours}: {source} has no column '{theirs}', it has {', '.join(present)}.{hint}"
                )

    def apply(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The row under our names. A column of theirs that has our name and is not meant is kept as source_<name>."""
        if not self.plain and not self.templates:
            return raw
        mapped = {}
        taken = set(self.theirs) | set(self.templates)
        for name, value in raw.items():
            if name in self.plain:
                mapped[self.plain[name]] = value
            else:
                mapped[f"source_{name}" if name in taken else name] = value
        for ours, (template, fields) in self.templates.items():
            values = {field: raw.get(field) for field in fields}
            if all(isinstance(value, (str, int, float)) and not isinstance(value, bool) for value in values.values()):
                mapped[ours] = template.format_map(values)
            else:  # the first that is no text is what the row is told off for
                mapped[ours] = next(
                    v for v in values.values() if not isinstance(v, (str, int, float)) or isinstance(v, bool)
                )
        return mapped

    def renamed(self, names: Iterable[str]) -> set[str]:
        """Columns of theirs that have one of our names and are not meant by it."""
        return {name for name in names if name not in self.plain and name in {*self.theirs, *self.templates}}

    def named(self, ours: str) -> str:
        """What the file calls one of our columns."""
        return self.theirs.get(ours, ours)


def template_fields(ours: str, template: str) -> tuple[str, ...]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UsageError(
            f"source.columns.{ours}: {template!r} is not a template ({error}). Write it like '{{Body}} {{Question}}'."
        ) from error
    if not fields or any(not field or not field.replace("_", "").isalnum() for field in fields):
        raise UsageError(
            f"source.columns.{ours}: {template!r} has to name columns in braces, like '{{Body}} {{Question}}'."
        )
    return tuple(dict.fromkeys(fields))
