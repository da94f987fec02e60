"""The rows that a recipe names as `targets`: what must survive, or what must get better; as one group or by the values of a column of theirs (`per`).

A target's mean gradient is named target.NAME, that of one of its groups target.NAME:GROUP.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from curate.console import cell
from curate.data.sections import open_rows
from curate.errors import UsageError, did_you_mean
from curate.plan.kept import Kept
from curate.rows import Row, content_id

if TYPE_CHECKING:
    from curate.data import Reading
    from curate.data.records import Record
    from curate.data.sources import Digest
    from curate.passes.contract import Measurement
    from curate.plan.step import RequestedScore
    from curate.recipe.load import Loaded
    from curate.recipe.sources import Target

MOST_GROUPS = 100  # each is a column of the store, and a gradient on the disk


def split(target: str) -> tuple[str, str]:
    """("NAME", "GROUP") of target.NAME:GROUP, ("NAME", "") of target.NAME."""
    name, _, group = target.removeprefix("target.").partition(":")
    return name, group


class Targets:
    """The targets of one recipe; each is read once."""

    def __init__(self, loaded: Loaded, kept: Kept | None = None, digest_of: Digest | None = None):
        self.loaded, self.kept, self.digest_of = loaded, kept or Kept(), digest_of
        self._identities: dict[str, str] = {}
        self._rows: dict[str, dict[str, list[Row]]] = {}

    def named(self, name: str) -> Target:
        """A target of the recipe. UsageError naming the nearest."""
        targets = self.loaded.recipe.targets
        if name in targets:
            return targets[name]
        hint = did_you_mean(name, targets, f"there are: {', '.join(targets) or 'none'}.")
        raise UsageError(
            f"{self.loaded.path or 'recipe'}: influence on {name!r}: the recipe's `targets` name no such rows; {hint} "
            f"`targets: {{{name}: {{path: …, of: chosen}}}}` adds them."
        )

    def identity(self, name: str) -> str:
        """A hash of the target's rows and of its settings but `per`: groups of the same rows are other columns, not other rows."""
        if name not in self._identities:
            target = self.named(name)
            question = f"target {target.path}"
            sources = self.kept.ask(question, lambda: [info.fingerprint for info in self._reading(name).sources])
            settings = target.model_dump(exclude={"path", "per"})
            if "on_bad_row" in target.inherited:  # values of rows that are good do not depend on it
                settings["on_bad_row"] = "error"
            self._identities[name] = content_id(sources, settings)
        return self._identities[name]

    def rows(self, name: str) -> dict[str, list[Row]]:
        """A target's rows by group; a target without groups has all of them under "". A group is spelt as in the names of columns. Bad rows are
        treated as the target's `on_bad_row` says.

        UsageError for a row without a group, for two groups that would be spelt alike, and for more than MOST_GROUPS.
        """
        if name not in self._rows:
            target, where = self.named(name), f"targets.{name}"
            by_group: dict[str, list[Row]] = {}
            spelt: dict[str, str] = {}  # group -> the column's own value
            records = self._reading(name).good(
                target.on_bad_row, setting=where, target=str(self.loaded.path or target.path)
            )
            for record in islice(records, target.limit):
                value = "" if target.per is None else _value(record, target.per, where)
                group = re.sub(r"\W", "_", value).lower()
                if spelt.setdefault(group, value) != value:
                    raise UsageError(
                        f"{where}.per: {spelt[group]!r} and {value!r} would both be the column …__{group}. Rename one."
                    )
                assert record.row is not None
                by_group.setdefault(group, []).append(record.row)
            if len(by_group) > MOST_GROUPS:
                raise UsageError(
                    f"{where}.per: {target.per} has {len(by_group):,} values; a number is kept for every row, checkpoint and group, of at most "
                    f"{MOST_GROUPS} groups. Name a coarser column; `curate.passes.gradients.influence.cross_products` compares single rows."
                )
            self._rows[name] = by_group
        return self._rows[name]

    def groups(self, name: str) -> list[str]:
        """A target's groups, sorted; [] where it has none."""
        if self.named(name).per is None:
            return []
        question = f"groups of target {self.identity(name)} by {self.named(name).per}"
        return self.kept.ask(question, lambda: sorted(self.rows(name)))

    def gradients(self, target: str) -> list[str]:
        """The names of the mean gradients that a cosine with target.NAME needs: one for each of its groups, or its own where it has none."""
        return [f"{target}:{group}" for group in self.groups(split(target)[0])] or [target]

    def in_groups(self, measurement: Measurement) -> Measurement:
        """The measurement with a column for each group, where it is a cosine with a target that has groups; else as it is."""
        about = measurement.direction
        groups = self.groups(split(about.of)[0]) if about is not None and about.cosine else []
        if not groups:
            return measurement
        ((column, unit),) = measurement.columns.items()
        return replace(measurement, columns={f"{column}__{group}": unit for group in groups})

    def over_groups(self, want: RequestedScore) -> RequestedScore:
        """The score with a need for each group, where its target has groups: it reads the columns of all of them, and may give a group's name as
        its value. UsageError where its function takes a single column.
        """
        if not any("{target}" in text for text in want.score.needs):
            return want
        name = str(want.params["target"])
        groups = self.groups(name)
        named = tuple(groups or [name]) if want.score.names == ("{target}",) else want.score.names
        if not groups:
            return replace(want, score=replace(want.score, names=named))
        if all(p.kind != p.VAR_POSITIONAL for p in inspect.signature(want.score.function).parameters.values()):
            raise UsageError(
                f"{self.loaded.path or 'recipe'}: scores: {want.score.name} takes the mean gradient of a whole target, but targets.{name} has groups "
                f"(per: {self.named(name).per}). Take influence_cosine, or leave `per` out."
            )
        needs = tuple(f"{text}__{group}" for text in want.score.needs for group in groups)
        return replace(want, score=replace(want.score, needs=needs, names=named))

    def _reading(self, name: str) -> Reading:
        target = self.named(name)
        return open_rows(self.loaded, target, f"targets.{name}", kind=target.kind, digest_of=self.digest_of)


def _value(record: Record, per: str, where: str) -> str:
    """The group of a target's row. UsageError where it has none."""
    from curate.data.records import row_in_file

    value = record.columns.get(per)
    if value is None or not re.search(r"\w", str(value)):
        what = f"found {cell(value)}"
        if per not in record.columns:
            what = "found none" + did_you_mean(per, record.columns, before="; ")
        raise UsageError(
            f"{record.source}, {row_in_file(record.index, record.line)}: {where}.per: wanted a group's name in the column {per!r}, {what}"
        )
    return str(value)
