"""Decisions from arrays: which rows are kept, and for every row why. The pure part of selecting (select_query.py asks the store for the arrays).

exclude  →  where  →  drop_worst  →  order_by  →  keep (in every group of `per`)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curate.errors import ValidationError
from curate.store.decisions import Decisions, Reasons
from curate.workflow.spec import Budget, SelectSpec, budget_of, check_groups, group_names

EXCLUDED = {"row": "the same row is in the held-out set", "prompt": "its prompt is in the held-out set"}


@dataclass(frozen=True)
class Compared:
    """A part of `where`. text: as the user wrote it. false: (rows,) bool. value, cut: (rows,) the row's number and the bound, masked where none."""

    text: str
    false: np.ndarray
    value: np.ma.MaskedArray
    cut: np.ma.MaskedArray


@dataclass(frozen=True)
class Candidates:
    """The arrays that `decide` works on, all (rows,).

    passed: 1 / 0 / NaN for `where`. scores: the ones drop_worst names. order: position in the order of `order_by`, ties by row id.
    order_unknown: an order_by expression that is NULL although it should not be, or None. groups: text, None for "no group". tokens: of the
    row. weight: how many rows this one counts for. excused: score -> bool, where its NULL is a value (such as first_learned_step of a row
    never learned). held: "row" or "prompt" where that is in the held-out set, else None. compared: of `where` the
    parts that AND joins, in their order.
    """

    row_ids: list[str]
    passed: np.ndarray
    scores: dict[str, np.ndarray]
    order: np.ndarray
    order_unknown: list[str | None]
    groups: list[str | None]
    tokens: np.ndarray
    weight: np.ndarray
    excused: dict[str, np.ndarray] = field(default_factory=dict)
    held: list[str | None] | None = None
    compared: list[Compared] | None = None


def whole(x: float) -> int:
    """The nearest whole number, halves up; a hair below a half counts as the half (0.3 · 5 is 1.5 however it was computed)."""
    return math.floor(x + 0.5 + 1e-9)


def decide(rows: Candidates, spec: SelectSpec, worst: Mapping[str, str]) -> Decisions:
    """The decisions for arrays. Raises ValidationError for `unknown: error`, UsageError for a group without a share."""
    deciding = _Deciding(rows, spec)
    deciding.exclude()
    deciding.where()
    deciding.drop_worst(worst)
    deciding.unknown()
    return deciding.keep()


def after_where(rows: Candidates, spec: SelectSpec) -> _Deciding:
    """The rows that `exclude` and `where` leave, and why not the others: what a control is drawn from (random_of_all: what `exclude` leaves)."""
    deciding = _Deciding(rows, spec)
    deciding.exclude()
    if spec.control != "random_of_all":
        deciding.where()
    return deciding


def coded(groups: Sequence[str | None]) -> tuple[np.ndarray, list[str | None]]:
    """(rows,) a number for each row's group, and the groups by number, in the order of their first rows."""
    if len(groups) and groups.count(None) == len(groups):
        return np.zeros(len(groups), np.int32), [None]
    encoded = pa.array(groups, pa.string()).dictionary_encode("encode")
    return encoded.indices.to_numpy(), encoded.dictionary.to_pylist()


def grouped(rows: Candidates, left: np.ndarray) -> dict[str | None, np.ndarray]:
    """group -> its rows that are left, in the order of `order_by`."""
    index = np.flatnonzero(left)
    index = index[np.argsort(rows.order[index], kind="stable")]
    codes, names = coded(rows.groups)
    _, first, of = np.unique(codes[index], return_index=True, return_inverse=True)
    by_group = (
        np.split(index[np.argsort(of, kind="stable")], np.cumsum(np.bincount(of, minlength=len(first)))[:-1])
        if len(index)
        else []
    )
    return {names[codes[index[first[i]]]]: by_group[i] for i in np.argsort(first)}


def tokens_of(rows: Candidates, index: np.ndarray) -> np.ndarray:
    """The tokens that these rows count for; unknown ones count none."""
    return np.nan_to_num(rows.tokens[index]) * rows.weight[index]


class _Deciding:
    """The rows that are left so far, and the reasons of the others."""

    def __init__(self, rows: Candidates, spec: SelectSpec):
        self.rows, self.spec = rows, spec
        self.n = len(rows.row_ids)
        self.left = np.ones(self.n, bool)
        self.reasons = Reasons(self.n, ("keep", "kept: no rule drops it"))
        self.notes: list[str] = []
        self.names = group_names(spec, rows.groups)

    def drop(self, which: np.ndarray, rule: str, text: str, value: Any = None, cut: Any = None) -> int:
        """Drop these of the rows that are left; returns how many. value, cut: (rows,), or one for all, or None."""
        dropped = np.flatnonzero(which & self.left)
        own = (given[dropped] if isinstance(given, np.ndarray) else given for given in (value, cut))
        self.reasons.set(dropped, rule, text, *own)
        self.left[dropped] = False
        return len(dropped)

    def settle(self, gaps: np.ndarray, what: str, more: str = "") -> None:
        """Rows with a gap: refused or dropped, as the spec says; kept ones pass. what: it lacks, in words."""
        gaps = gaps & self.left
        if not gaps.any() or self.spec.unknown == "keep":
            return
        if self.spec.unknown == "error":
            row = int(np.flatnonzero(gaps)[0])
            raise ValidationError(
                f"select: {what} for {int(gaps.sum()):,} of {self.n:,} rows (the first: row {self.rows.row_ids[row]}).{more} "
                "Say what to do with them: `--set select.unknown=drop` or `--set select.unknown=keep`."
            )
        self.drop(gaps, "unknown", what)

    def exclude(self) -> None:
        held = self.rows.held
        if held is None:
            return
        dropped = 0
        for what, reason in EXCLUDED.items():
            dropped += self.drop(np.array([h == what for h in held], bool), "exclude", f"exclude: {reason}")
        if not dropped:
            self.notes.append("exclude: heldout drops no row: no prompt of the held-out set is among these rows.")

    def where(self) -> None:
        if self.spec.where is None:
            return
        text = " ".join(self.spec.where.split())
        before = int(self.left.sum())
        null = " A NULL in the list of a NOT IN makes it unknown for every row." if "not in" in text.lower() else ""
        self.settle(np.isnan(self.rows.passed), f"where: {text} is unknown", null)
        false = self.left & (self.rows.passed == 0)
        dropped = self.drop(false, "where", f"where: {text} is false")
        for part in reversed(self.rows.compared or ()):  # the first that is false is the reason
            rows = np.flatnonzero(false & part.false)
            self.reasons.set(rows, "where", f"where: {part.text} is false")
            self.reasons.note_numbers(rows, part.value[rows], part.cut[rows])
        if before and not self.left.any():
            self.notes.append(f"where: {text} is true for none of {before:,} rows: nothing is left to select from.")
        elif before and not dropped and not np.isnan(self.rows.passed).any():
            self.notes.append(f"where: {text} is true for all {before:,} rows: it drops none.")

    def drop_worst(self, worst: Mapping[str, str]) -> None:
        """Every score takes its share of the rows that `where` left."""
        after = self.left.copy()
        candidates = self.rows.weight[after].sum()
        for name in self.spec.drop_worst:
            gaps = np.isnan(self.rows.scores[name]) & ~self.rows.excused.get(name, np.zeros(self.n, bool))
            self.settle(gaps, f"{name} is unknown")
        for name, share in self.spec.drop_worst.items():
            values = self.rows.scores[name]
            taken = self._worst(
                after & ~np.isnan(values), -values if worst[name] == "high" else values, whole(share * candidates)
            )
            bad = np.zeros(self.n, bool)
            bad[taken] = True
            cut = float(values[taken[-1]]) if len(taken) else None
            self.drop(bad, "drop_worst", f"worst {share * 100:.4g}% by {name}", values, cut)
            if share and candidates and not len(taken):
                self.notes.append(
                    f"drop_worst: {share * 100:.4g}% of {candidates:,.0f} rows by {name} is not one row: it drops none."
                )

    def _worst(self, known: np.ndarray, values: np.ndarray, most: float) -> np.ndarray:
        """The known rows of the lowest values that count for `most` rows together, ties by row id; the last one has the highest."""
        index = np.flatnonzero(known)
        index = index[np.argsort(values[index], kind="stable")]
        counted = np.cumsum(self.rows.weight[index])
        place = int(np.searchsorted(counted, most, side="right"))
        if place < len(index):  # among the rows of the value at which it ends those with the first ids are taken
            ordered = values[index]
            start, end = (int(np.searchsorted(ordered, ordered[place], side=side)) for side in ("left", "right"))
            index[start:end] = sorted(index[start:end].tolist(), key=lambda i: self.rows.row_ids[i])
            counted = np.cumsum(self.rows.weight[index])
            place = int(np.searchsorted(counted, most, side="right"))
        return index[:place]

    def unknown(self) -> None:
        """What ranking and counting need and do not have."""
        lacking = self.rows.order_unknown
        gaps = np.array([what is not None for what in lacking], bool)
        first = np.flatnonzero(gaps & self.left)
        for what in dict.fromkeys(lacking[i] for i in first.tolist()):
            if self.spec.unknown == "error":
                self.settle(gaps, f"{what} is unknown")
            self.settle(np.array([one == what for one in lacking], bool), f"{what} is unknown")
        if self.spec.counts_tokens:
            self.settle(np.isnan(self.rows.tokens), "its number of tokens is unknown")

    def keep(self) -> Decisions:
        rows, spec = self.rows, self.spec
        rank, kept = np.zeros(self.n, np.int64), np.zeros(self.n, bool)
        members = grouped(rows, self.left)
        self._check_groups(members)
        by_group: dict[str, int] = {}
        for group, index in members.items():
            name = self.names[group]
            budget = spec.budgets.get(name, budget_of(spec.keep))
            n_kept = self._keep_of(group, index, budget)
            rank[index] = np.arange(1, len(index) + 1)
            kept[index[:n_kept]] = True
            by_group[name] = n_kept
        return self.decisions(kept, rank, by_group)

    def decisions(self, kept: np.ndarray, rank: np.ndarray, by_group: Mapping[str, int]) -> Decisions:
        """What was decided, with what is counted of it."""
        counts: dict[str, Any] = {
            "rows": self.n,
            "kept": int(kept.sum()),
            "dropped": int(self.n - kept.sum()),
            "dropped_by": self._dropped_by(kept),
        }
        if self.spec.group:
            counts["kept_per_group"] = dict(by_group)
        if self.spec.counts_tokens:
            counts["tokens_kept"] = int(tokens_of(self.rows, np.flatnonzero(kept)).sum())
            if self.spec.group:
                codes, groups = coded(self.rows.groups)
                index = np.flatnonzero(kept)
                sums = np.bincount(codes[index], tokens_of(self.rows, index), len(groups))
                tokens = {self.names[group]: int(total) for group, total in zip(groups, sums, strict=True)}
                counts["tokens_per_group"] = {name: tokens[name] for name in by_group}
        if self.n and not kept.any():
            self.notes.append(f"none of {self.n:,} rows is kept.")
        if self.notes:
            counts["notes"] = list(dict.fromkeys(self.notes))
        return Decisions(self.rows.row_ids, kept, rank, self.reasons, counts)

    def _dropped_by(self, kept: np.ndarray) -> dict[str, int]:
        """rule -> how many rows it dropped, the most first; of as many that of the first row first."""
        codes, first, counts = np.unique(self.reasons.codes[~kept], return_index=True, return_counts=True)
        dropped: Counter[str] = Counter()
        for i in np.argsort(first):
            dropped[self.reasons.kinds[codes[i]][0]] += int(counts[i])
        return dict(dropped.most_common())

    def _keep_of(self, group: str | None, index: np.ndarray, budget: Budget) -> int:
        """How many of a group's rows, in order, its budget takes. Notes their reasons."""
        kind, amount = budget
        cost = np.cumsum(tokens_of(self.rows, index) if kind == "tokens" else self.rows.weight[index])
        most: float = whole(amount * cost[-1]) if kind == "share" else amount
        n_kept = int((cost <= most).sum())
        of = f" of {self.spec.group} {self.names[group]}" if self.spec.group else ""
        limit = f"{kind} {amount:.4g}" if kind == "share" else f"{int(amount):,} {kind}"
        everything = kind == "share" and amount == 1
        by = self._by()
        text = "kept: no rule drops it" if everything else f"kept: within keep {limit}{of}{by}"
        for rows, reason, counted in (
            (index[:n_kept], text, cost[:n_kept]),
            (index[n_kept:], f"beyond keep {limit}{of}{by}", cost[n_kept:]),
        ):
            self.reasons.set(rows, "keep", reason, *(() if everything else (counted, float(most))))
        name = f"{self.spec.group} {self.names[group]}: " if self.spec.group else ""
        if not n_kept and amount:
            why = f"; its first row has {cost[0]:,.0f} tokens" if kind == "tokens" else ""
            self.notes.append(f"keep: {name}{limit} keeps none of {len(index):,} rows{why}.")
        elif kind != "share" and cost[-1] < most:
            self.notes.append(
                f"keep: {name}{limit} is more than there is ({cost[-1]:,.0f} {kind} left): all of it is kept."
            )
        return n_kept

    def _by(self) -> str:
        order = " ".join((self.spec.order_by or "").split())
        if not order:
            return " in the order read"
        if order.lower() == "random":
            return f" in random order (seed {self.spec.seed})"
        return f" by {order}"

    def _check_groups(self, members: Mapping[str | None, np.ndarray]) -> None:
        """Every named group is there, and every group that is there has a budget. What is empty is noted."""
        column = self.spec.group
        if column is None:
            return
        check_groups(self.spec, self.rows.groups)
        count = Counter(self.rows.groups)
        for group in sorted(set(self.rows.groups) - set(members), key=str):
            name = self.names[group]
            self.notes.append(
                f"per: no row of {column} {name} is left to keep any of: the rules before drop all {count[group]:,}."
            )
        if count[None]:
            self.notes.append(
                f"per: {column} is NULL for {count[None]:,} rows: they are a group of their own, `{self.names[None]}`."
            )
