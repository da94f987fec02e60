"""The recipe's `columns: {ours: theirs}`: which of the user's columns is what the formats call prompt, chosen, completion, ...

`theirs` is a column's name, or a template over several: `prompt: "{Body} {Question}"`, `prompt: "Question: {question}\\nAnswer:"`.
A column named plainly is used up; columns of a template stay among the user's other columns.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from typing import Any

from curate.data.formats import KNOWN_COLUMNS
from curate.errors import UsageError, ValidationError, did_you_mean, listed

UNNAMED = "unnamed"  # what a column without a name is called here


class Columns:
    """Renames a raw row's columns; without a mapping the row passes as it is."""

    def __init__(self, mapping: Mapping[str, str] | None) -> None:
        self.plain: dict[str, str] = {}  # theirs -> ours
        self.templates: dict[str, tuple[str, tuple[str, ...]]] = {}  # ours -> (template, fields)
        for ours, theirs in (mapping or {}).items():
            if ours not in KNOWN_COLUMNS:
                hint = did_you_mean(ours, KNOWN_COLUMNS, sentence=True, before=" ")
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
        self.moved: dict[
            str, str
        ] = {}  # theirs that have one of our names and are not meant by it -> what they are called here
        self.has_unnamed = False
        self.seen: set[str] = set()  # every name of theirs so far

    def check(self, names: Iterable[str], source: str) -> None:
        """UsageError where a named column is not in the source. Settles what a column is called whose name is ours here."""
        present = list(names)
        missing = [
            *self.plain.items(),
            *((field, ours) for ours, (_, fields) in self.templates.items() for field in fields),
        ]
        for theirs, ours in missing:
            if theirs not in present:
                hint = did_you_mean(theirs, present, sentence=True, before=" ")
                raise UsageError(
                    f"source.columns.{ours}: {source} has no column '{theirs}', it has {listed(present)}.{hint}"
                )
        self._settle(present, source)

    def _settle(self, names: Iterable[str], where: str) -> None:
        """What columns are called whose names are ours here. ValidationError where a column has a name that another one was given before."""
        new = [name for name in names if name not in self.seen]
        if not new:
            return
        self.seen.update(new)
        given = {called: name for name, called in self.moved.items()}
        taken = {*self.theirs, *self.templates}
        for name in new:
            if name in taken and name not in self.plain:
                self.moved[name] = free_name(name, {*self.seen, *self.moved.values(), *taken})
            if name in given:
                raise ValidationError(
                    f"{where} has a column '{name}', which is what the column '{given[name]}' is called here, since `columns` calls another one "
                    f"{given[name]}, and the rows before had no '{name}'. Rename one of the two in the source, or leave it out."
                )

    def apply(self, raw: dict[str, Any], where: str = "a later row") -> dict[str, Any]:
        """The row under our names. A column of theirs that has our name and is not meant is kept as source_<name>, or the next free name."""
        if "" in raw and UNNAMED not in raw:  # the index of a data frame that was written as csv
            self.has_unnamed = True
            raw = {name or UNNAMED: value for name, value in raw.items()}
        if not self.plain and not self.templates:
            return raw
        mapped = {}
        self._settle(raw, where)
        for name, value in raw.items():
            if name in self.plain:
                mapped[self.plain[name]] = value
            else:
                mapped[self.moved.get(name, name)] = value
        for ours, (template, fields) in self.templates.items():
            values = {field: raw.get(field) for field in fields}
            if all(isinstance(value, (str, int, float)) and not isinstance(value, bool) for value in values.values()):
                mapped[ours] = template.format_map(values)
            else:  # the first that is no text is what the row is told off for
                mapped[ours] = next(
                    v for v in values.values() if not isinstance(v, (str, int, float)) or isinstance(v, bool)
                )
        return mapped

    def named(self, ours: str) -> str:
        """What the file calls one of our columns."""
        return self.theirs.get(ours, ours)


def free_name(name: str, taken: Iterable[str]) -> str:
    """source_<name>, or source_source_<name>, …: the first that is not taken."""
    known, new = set(taken), f"source_{name}"
    while new in known:
        new = f"source_{new}"
    return new


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
