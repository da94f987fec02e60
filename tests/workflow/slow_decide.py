"""Decisions row by row, as they were made before they were made by arrays (`curate.workflow.decide`): the oracle that those are compared with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curate.errors import ValidationError
from curate.store.decisions import Decisions, Reason
from curate.workflow.spec import Budget, SelectSpec, budget_of, check_groups, group_names

EXCLUDED = {"row": "the same row is in the held-out set", "prompt": "its prompt is in the held-out set"}


@dataclass(frozen=True)
class Candidates:
    """The arrays that `decide` works on, all (rows,).

    passed: 1 / 0 / NaN for `where`. scores: the ones drop_worst names. order: position in the order of `order_by`, ties by row id.
    order_unknown: an order_by expression that is NULL although it should not be, or None. groups: text, None for "no group". tokens: of the
    row. weight: how many rows this one counts for. excused: score -> bool, where its NULL is a value (such as first_learned_step of a row
    never learned). held: "row" or "prompt" where that is in the held-out set, else None. compared: of the part of `where` that is false, its
    text with the row's value and the bound, or None.
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
    compared: list[tuple[str, float | None, float | None] | None] | None = None


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
    """The rows that `exclude` and `where` leave, and why not the others: what a control is drawn from."""
    deciding = _Deciding(rows, spec)
    deciding.exclude()
    deciding.where()
    return deciding


def grouped(rows: Candidates, left: np.ndarray) -> dict[str | None, np.ndarray]:
    """group -> its rows that are left, in the order of `order_by`."""
    members: dict[str | None, list[int]] = {}
    for i in np.flatnonzero(left)[np.argsort(rows.order[left], kind="stable")]:
        members.setdefault(rows.groups[i], []).append(int(i))
    return {group: np.asarray(index, int) for group, index in members.items()}


def tokens_of(rows: Candidates, index: np.ndarray) -> np.ndarray:
    """The tokens that these rows count for; unknown ones count none."""
    return np.nan_to_num(rows.tokens[index]) * rows.weight[index]


class _Deciding:
    """The rows that are left so far, and the reasons of the others."""

    def __init__(self, rows: Candidates, spec: SelectSpec):
        self.rows, self.spec = rows, spec
        self.n = len(rows.row_ids)
        self.left = np.ones(self.n, bool)
        self.reasons: list[Reason | None] = [None] * self.n
        self.notes: list[str] = []
        self.names = group_names(spec, rows.groups)

    def drop(self, which: np.ndarray, why: Callable[[int], Reason]) -> int:
        """Drop these of the rows that are left; returns how many."""
        dropped = np.flatnonzero(which & self.left)
        for i in dropped:
            self.reasons[i] = why(int(i))
        self.left[which] = False
        return len(dropped)

    def settle(self, gaps: np.ndarray, what: Callable[[int], str], more: str = "") -> None:
        """Rows with a gap: refused or dropped, as the spec says; kept ones pass."""
        gaps = gaps & self.left
        if not gaps.any() or self.spec.unknown == "keep":
            return
        if self.spec.unknown == "error":
            first = int(np.flatnonzero(gaps)[0])
            raise ValidationError(
                f"select: {what(first)} for {int(gaps.sum()):,} of {self.n:,} rows (the first: row {self.rows.row_ids[first]}).{more} "
                "Say what to do with them: `--set select.unknown=drop` or `--set select.unknown=keep`."
            )
        self.drop(gaps, lambda i: Reason("unknown", what(i)))

    def exclude(self) -> None:
        held = self.rows.held
        if held is None:
            return
        which = np.array([h is not None for h in held], bool)
        if not self.drop(which, lambda i: Reason("exclude", f"exclude: {EXCLUDED[held[i] or 'row']}")):
            self.notes.append("exclude: heldout drops no row: no prompt of the held-out set is among these rows.")

    def where(self) -> None:
        if self.spec.where is None:
            return
        text = " ".join(self.spec.where.split())
        before = int(self.left.sum())
        null = " A NULL in the list of a NOT IN makes it unknown for every row." if "not in" in text.lower() else ""
        self.settle(np.isnan(self.rows.passed), lambda i: f"where: {text} is unknown", null)
        compared = self.rows.compared

        def why(i: int) -> Reason:
            part = compared[i] if compared else None
            return Reason("where", f"where: {part[0] if part else text} is false", *(part[1:] if part else ()))

        dropped = self.drop(self.rows.passed == 0, why)
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
            self.settle(gaps, lambda i, name=name: f"{name} is unknown")  # type: ignore[misc]
        for name, share in self.spec.drop_worst.items():
            values = self.rows.scores[name]
            sign = -1.0 if worst[name] == "high" else 1.0
            known = np.flatnonzero(after & ~np.isnan(values)).tolist()
            by_badness = np.asarray(sorted(known, key=lambda i: (sign * values[i], self.rows.row_ids[i])), int)
            taken = by_badness[np.cumsum(self.rows.weight[by_badness]) <= whole(share * candidates)]
            bad = np.zeros(self.n, bool)
            bad[taken] = True
            cut = float(values[taken[-1]]) if len(taken) else None
            text = f"worst {share * 100:.4g}% by {name}"
            self.drop(bad, lambda i, t=text, v=values, c=cut: Reason("drop_worst", t, float(v[i]), c))  # type: ignore[misc]
            if share and candidates and not len(taken):
                self.notes.append(
                    f"drop_worst: {share * 100:.4g}% of {candidates:,.0f} rows by {name} is not one row: it drops none."
                )

    def unknown(self) -> None:
        """What ranking and counting need and do not have."""
        order_unknown = self.rows.order_unknown
        gaps = np.array([u is not None for u in order_unknown], bool)
        self.settle(gaps, lambda i: f"{order_unknown[i]} is unknown")
        if self.spec.counts_tokens:
            self.settle(np.isnan(self.rows.tokens), lambda i: "its number of tokens is unknown")

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
        reasons = [reason or Reason("keep", "kept: no rule drops it") for reason in self.reasons]
        counts: dict[str, Any] = {
            "rows": self.n,
            "kept": int(kept.sum()),
            "dropped": int(self.n - kept.sum()),
            "dropped_by": dict(
                Counter(r.rule for r, k in zip(reasons, kept.tolist(), strict=True) if not k).most_common()
            ),
        }
        if self.spec.group:
            counts["kept_per_group"] = dict(by_group)
        if self.spec.counts_tokens:
            counts["tokens_kept"] = int(tokens_of(self.rows, np.flatnonzero(kept)).sum())
            if self.spec.group:
                names = np.array([self.names[g] for g in self.rows.groups], object)
                counts["tokens_per_group"] = {
                    g: int(tokens_of(self.rows, np.flatnonzero(kept & (names == g))).sum()) for g in by_group
                }
        if self.n and not kept.any():
            self.notes.append(f"none of {self.n:,} rows is kept.")
        if self.notes:
            counts["notes"] = list(dict.fromkeys(self.notes))
        return Decisions(list(self.rows.row_ids), kept, rank, reasons, counts)

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
        for place, i in enumerate(index.tolist()):
            if place < n_kept:
                text = "kept: no rule drops it" if everything else f"kept: within keep {limit}{of}{by}"
            else:
                text = f"beyond keep {limit}{of}{by}"
            self.reasons[i] = Reason("keep", text, *(() if everything else (float(cost[place]), float(most))))
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
