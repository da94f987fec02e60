"""Selection: which rows are kept, and for every row why.

    where  →  drop_worst  →  order_by  →  keep (in every group of `per`)

- `where` is SQL over any column of the view `scored`; a row stays where it is true.
- `drop_worst: {flip_loss: 0.05}` drops that share of the rows that `where` left, from the end that the score itself declares as its worst.
  Several scores each take their share of the same rows; a row in two shares is dropped once.
- `order_by` ranks what is left (the order the rows were read in, if not given). Ties go by row id, so that a selection repeats.
- `keep: {share | rows | tokens}` takes the first of that order, in every group of `per` on its own; tokens stops before the budget is passed.
- A share of n rows is n·share rounded to the nearest whole number, halves up.
- `duplicates: once` counts a row once however often it occurs; `as_found` counts it as often as it occurs, in shares and budgets too.
- `unknown`: a row where a value that a rule above uses is NULL although it should not be: an error, or the row is kept through that step (ranked
  last), or dropped. A NULL that no rule uses drops nothing.

`decide` is the pure part: arrays in, decisions out. `select` asks the store for the arrays.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curate.errors import UsageError, ValidationError
from curate.storage.expressions import check_expression, order_keys

if TYPE_CHECKING:
    from curate.store import Store

TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "completion_tokens")


@dataclass(frozen=True)
class SelectSpec:
    """A recipe's `select`. keep: {"share": .8} | {"rows": n} | {"tokens": n}. per: a column, or {column: {group: share}}. worst: column of
    drop_worst -> the end that the recipe itself calls bad.
    """

    where: str | None = None
    drop_worst: Mapping[str, float] = field(default_factory=dict)
    order_by: str | None = None
    keep: Mapping[str, float] | None = None
    per: str | Mapping[str, Mapping[str, float]] | None = None
    duplicates: Literal["once", "as_found"] = "once"
    unknown: Literal["error", "keep", "drop"] = "error"
    worst: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Decisions:
    """What was decided, aligned to row_ids. rank: 1 is first in its group, 0 for a row dropped before ranking. counts: by step."""

    row_ids: list[str]
    kept: np.ndarray  # (rows,) bool
    rank: np.ndarray  # (rows,) int64
    reasons: list[str]
    counts: dict[str, Any]


@dataclass(frozen=True)
class Candidates:
    """The arrays that `decide` works on, all (rows,).

    passed: 1 / 0 / NaN for `where`. scores: the ones drop_worst names. order: position in the order of `order_by`, ties by row id.
    order_unknown: an order_by expression that is NULL although it should not be, or None. groups: text, None for "no group". tokens: of the
    row. weight: how many rows this one counts for. excused: score -> bool, where its NULL is a value (such as first_learned_step of a row
    never learned).
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


def select(
    store: Store,
    spec: SelectSpec,
    *,
    worst: Mapping[str, str],
    recipe: str | None = None,
    sources: Sequence[str] | None = None,
    null_is_known: Mapping[str, str] | None = None,
) -> Decisions:
    """Decide on every row that occurs in the (recipe's) sources for training.

    worst: score name -> "high" | "low" | "none", as the scores declare it. null_is_known: column -> SQL that is true where its NULL is a value
    and not a gap, such as {"first_learned_step": "never_learned"}; one that
    cannot be asked here is left out. Raises UsageError for a condition that is not SQL or names no column (the
    nearest is named), for drop_worst of a score without a worst end; ValidationError where `unknown: error` meets an unknown value.
    """
    known_as = {}
    for column, condition in (null_is_known or {}).items():
        try:  # the condition may name a score that this recipe does not have: then nothing excuses the NULL
            store.sql(f"SELECT {condition} FROM scored LIMIT 0", recipe=recipe, source=sources)
            known_as[column] = condition
        except UsageError:
            continue
    worst = {**worst, **spec.worst}
    schema = store.sql("SELECT * FROM scored LIMIT 0", recipe=recipe, source=sources).schema
    available = list(schema)
    check_numbers(spec, {name: str(kind) for name, kind in schema.items()})
    if spec.where is not None:
        check_expression(spec.where, "select.where")
    keys = order_keys(spec.order_by) if spec.order_by else []
    for name in spec.drop_worst:
        check_worst(name, worst, available)
    group = spec.per if isinstance(spec.per, str) else next(iter(spec.per), None) if spec.per else None
    if group is not None:
        check_expression(group, "select.per")
    tokens = [n for n in TOKENS if n in available]
    if spec.keep and "tokens" in spec.keep and not tokens:
        raise UsageError(
            "select.keep.tokens: no token counts are measured for these rows. "
            "Measure them with `curate measure RECIPE`, or keep rows or a share."
        )

    # alias -> (SQL, the recipe's key that it comes from): asked in one query, and one by one only to say which of them is wrong
    asked: dict[str, tuple[str, str]] = {"row_id": ("row_id", "select"), "weight": ("n_occurrences::DOUBLE", "select")}
    if spec.where is not None:
        asked["passed"] = (f"((\n{spec.where}\n)::BOOLEAN)::DOUBLE", "select.where")
    for name in spec.drop_worst:
        asked[f"worst {name}"] = (f"{_quoted(name)}::DOUBLE", f"select.drop_worst.{name}")
        if name in known_as:
            asked[f"excused {name}"] = (f"coalesce(({known_as[name]}), false)", "null_is_known")
    if keys:
        asked["order"] = (
            f"row_number() OVER (ORDER BY {', '.join(_ordered(*key) for key in keys)}, row_id)",
            "select.order_by",
        )
    for i, (expression, _) in enumerate(keys):
        excuse = f"AND NOT coalesce(({known_as[expression]}), false)" if expression in known_as else ""
        asked[f"gap {i}"] = (f"((\n{expression}\n) IS NULL {excuse})", "select.order_by")
    if group is not None:
        asked["group"] = (f"(\n{group}\n)::VARCHAR", "select.per")
    if spec.keep and "tokens" in spec.keep:
        # a side that was not measured is no zero: what a row of its kind must have
        needed = f"CASE kind WHEN 'preference' THEN {_sum(tokens, TOKENS[:3])} ELSE {_sum(tokens, (TOKENS[0], TOKENS[3]))} END"
        asked["tokens"] = (f"({needed})::DOUBLE", "select.keep.tokens")

    def ask(wanted: Mapping[str, tuple[str, str]]) -> Any:
        picked = ", ".join(f"{text} AS {_quoted(alias)}" for alias, (text, _) in wanted.items())
        return store.sql(
            f"SELECT {picked} FROM scored WHERE role = 'train' ORDER BY position", recipe=recipe, source=sources
        )

    try:
        base = ask(asked)
    except UsageError:
        for alias, one in asked.items():
            try:
                ask({alias: one})
            except UsageError as error:
                raise UsageError(f"{one[1]}: {error}") from None
        raise
    n = len(base)
    row_ids = base["row_id"].to_list()
    passed = _number(base["passed"]) if spec.where is not None else np.ones(n)
    scores = {name: _number(base[f"worst {name}"]) for name in spec.drop_worst}
    excused = {name: base[f"excused {name}"].to_numpy() for name in spec.drop_worst if name in known_as}
    order = base["order"].to_numpy().astype(np.int64) if keys else np.arange(n)
    order_unknown: list[str | None] = [None] * n
    for k, (expression, _) in enumerate(keys):
        for i in np.flatnonzero(base[f"gap {k}"].to_numpy()):
            order_unknown[i] = order_unknown[i] or expression
    groups = base["group"].to_list() if group is not None else [None] * n
    counts = _number(base["tokens"]) if "tokens" in asked else np.zeros(n)
    weight = base["weight"].to_numpy().astype(np.float64) if spec.duplicates == "as_found" else np.ones(n)
    return decide(
        Candidates(row_ids, passed, scores, order, order_unknown, groups, counts, weight, excused), spec, worst
    )


def check_select(
    store: Store, spec: SelectSpec, *, worst: Mapping[str, str], planned: Sequence[str], recipe: str | None = None
) -> list[str]:
    """Say what is wrong with a selection before anything is measured for it. planned: the columns that measuring and scoring will add.

    Returns every column that `scored` will have. Raises UsageError as `select` does.
    """
    worst = {**worst, **spec.worst}
    schema = store.sql("SELECT * FROM scored LIMIT 0", recipe=recipe).schema
    have = list(schema)
    check_numbers(spec, {name: str(kind) for name, kind in schema.items()})
    known = {name.lower() for name in have}
    coming = [name for name in dict.fromkeys(planned) if name.lower() not in known]
    for name in spec.drop_worst:
        check_worst(name, worst, [*have, *coming])
    group = spec.per if isinstance(spec.per, str) else next(iter(spec.per), None) if spec.per else None
    asked = [("select.where", spec.where, "BOOLEAN"), ("select.per", group, "VARCHAR")]
    for key, expression, _ in asked:
        if expression is not None:
            check_expression(expression, key)
    asked += [("select.order_by", e, "") for e, _ in order_keys(spec.order_by)] if spec.order_by else []
    empty = "".join(f", NULL::DOUBLE AS {_quoted(name)}" for name in coming)
    for key, expression, kind in asked:
        if expression is not None:
            cast = f"::{kind}" if kind else ""
            try:
                store.sql(
                    f"SELECT (\n{expression}\n){cast} FROM (SELECT *{empty} FROM scored LIMIT 0) AS scored",
                    recipe=recipe,
                )
            except UsageError as error:
                typed = re.match(r"no column '([^']+)'", str(error))
                near = difflib.get_close_matches(typed[1], [*coming, *have], 1) if typed else []
                raise UsageError(
                    f"{key}: "
                    + (f"no column {typed[1]!r}; did you mean {near[0]!r}?" if typed and near else str(error))
                ) from None
    return [*have, *coming]


def decide(rows: Candidates, spec: SelectSpec, worst: Mapping[str, str]) -> Decisions:
    """The decisions for arrays. Raises ValidationError for `unknown: error`, UsageError for a group without a share."""
    n = len(rows.row_ids)
    reasons = [""] * n
    left = np.ones(n, bool)

    def drop(which: np.ndarray, why: Callable[[int], str]) -> None:
        for i in np.flatnonzero(which & left):
            reasons[i] = why(int(i))
        left[which] = False

    def settle(gaps: np.ndarray, what: Callable[[int], str]) -> None:
        """Rows with a gap: refused or dropped, as the spec says; kept ones pass."""
        gaps = gaps & left
        if not gaps.any() or spec.unknown == "keep":
            return
        if spec.unknown == "error":
            first = int(np.flatnonzero(gaps)[0])
            raise ValidationError(
                f"select: {what(first)} for {int(gaps.sum()):,} of {n:,} rows (the first: row {rows.row_ids[first]}). "
                "Say what to do with them: `--set select.unknown=drop` or `--set select.unknown=keep`."
            )
        drop(gaps, what)

    if spec.where is not None:
        where = " ".join(spec.where.split())
        settle(np.isnan(rows.passed), lambda i: f"where: {where} is unknown")
        drop(rows.passed == 0, lambda i: f"where: {where} is false")
    after_where = left.copy()
    candidates = rows.weight[after_where].sum()
    for name in spec.drop_worst:
        gaps = np.isnan(rows.scores[name]) & ~rows.excused.get(name, np.zeros(n, bool))
        settle(gaps, lambda i, name=name: f"{name} is unknown")  # type: ignore[misc]
    for name, share in spec.drop_worst.items():
        values = rows.scores[name]
        known = after_where & ~np.isnan(values)
        sign = -1.0 if worst[name] == "high" else 1.0
        by_badness = sorted(np.flatnonzero(known).tolist(), key=lambda i: (sign * values[i], rows.row_ids[i]))
        most = whole(share * candidates)
        taken = np.cumsum(rows.weight[by_badness]) <= most
        bad = np.zeros(n, bool)
        bad[np.asarray(by_badness, int)[taken]] = True
        percent = f"{share * 100:.4g}%"
        drop(bad, lambda i, name=name, percent=percent, v=values: f"worst {percent} by {name}: {v[i]:.6g}")  # type: ignore[misc]
    settle(np.array([u is not None for u in rows.order_unknown], bool), lambda i: f"{rows.order_unknown[i]} is unknown")
    counting = bool(spec.keep and "tokens" in spec.keep)
    if counting:
        settle(np.isnan(rows.tokens), lambda i: "its number of tokens is unknown")

    rank = np.zeros(n, np.int64)
    kept = np.zeros(n, bool)
    shares = next(iter(spec.per.values())) if isinstance(spec.per, Mapping) else None
    column = spec.per if isinstance(spec.per, str) else next(iter(spec.per)) if spec.per else None
    members: dict[str | None, list[int]] = {}
    for i in np.flatnonzero(left)[np.argsort(rows.order[left], kind="stable")]:
        members.setdefault(rows.groups[i], []).append(int(i))
    if shares is not None:
        _check_groups(shares, set(rows.groups), column or "", spec)
    by_group: dict[str, int] = {}
    for group, ordered in members.items():
        index = np.asarray(ordered)
        cost = np.cumsum(
            np.where(np.isnan(rows.tokens[index]), 0, rows.tokens[index]) * rows.weight[index]
            if counting
            else rows.weight[index]
        )
        keep = {"share": shares[str(group)]} if shares is not None and str(group) in shares else spec.keep
        kind, amount = next(iter(keep.items())) if keep else ("share", 1.0)
        budget: float = whole(amount * cost[-1]) if kind == "share" else amount
        chosen = cost <= budget
        n_kept = int(chosen.sum())
        rank[index] = np.arange(1, len(index) + 1)
        kept[index] = chosen
        where_from = f" of {column} {group if group is not None else 'NULL'}" if column else ""
        by_group[str(group)] = n_kept
        limit = f"{kind} {amount:.4g}" if kind == "share" else f"{int(amount):,} {kind}"
        how = f" by {' '.join(spec.order_by.split())}" if spec.order_by else " in the order read"
        for place, i in enumerate(ordered, start=1):
            if chosen[place - 1]:
                reasons[i] = f"kept: rank {place:,} of {len(ordered):,}{where_from}{how}"
            elif kind == "tokens":
                reasons[i] = (
                    f"beyond keep {limit}{where_from}: rank {place:,} ends at token {int(cost[place - 1]):,}, {n_kept:,} are kept"
                )
            else:
                reasons[i] = f"beyond keep {limit}{where_from}: rank {place:,}, {n_kept:,} are kept"
    counts = {
        "rows": n,
        "kept": int(kept.sum()),
        "dropped": int(n - kept.sum()),
        "dropped_by": dict(
            Counter(_step(r) for r, k in zip(reasons, kept.tolist(), strict=True) if not k).most_common()
        ),
    }
    if column:
        counts["kept_per_group"] = by_group
    return Decisions(list(rows.row_ids), kept, rank, reasons, counts)


def whole(x: float) -> int:
    """The nearest whole number, halves up; a hair below a half counts as the half (0.3 · 5 is 1.5 however it was computed)."""
    return math.floor(x + 0.5 + 1e-9)


def check_worst(name: str, worst: Mapping[str, str], available: Sequence[str]) -> None:
    """drop_worst takes a score that says which end is bad, or a column of which the recipe or its import says so, and that is there."""
    say = f"`drop_worst: {{{name}: {{share: 0.1, worst: low}}}}` (or high)"
    if name not in worst:
        if name in available:
            raise UsageError(f"select.drop_worst: which end of {name!r} is bad? It is no score, so say it: {say}.")
        near = difflib.get_close_matches(name, [*worst, *available], 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"this recipe has {', '.join(worst) or 'none'}."
        raise UsageError(f"select.drop_worst: {name!r} is not a score of this recipe; {hint}")
    if worst[name] not in ("high", "low"):
        raise UsageError(
            f"select.drop_worst: neither end of {name!r} is bad in itself. "
            f"Use `where` with a bound of your own, or `order_by` and `keep`, or say which is bad for you: {say}."
        )
    if name not in available:
        raise UsageError(f"select.drop_worst: {name!r} has not been computed yet. Run `curate score RECIPE` first.")


def check_numbers(spec: SelectSpec, kinds: Mapping[str, str]) -> None:
    """UsageError where drop_worst names text, which has no bad end."""
    for name in spec.drop_worst:
        if kinds.get(name) == "String":
            raise UsageError(
                f"select.drop_worst: {name!r} is text, which has no high and no low end. Use `where`, such as `where: {name} <> '…'`."
            )


def _check_groups(shares: Mapping[str, float], found: set[str | None], column: str, spec: SelectSpec) -> None:
    names = {str(g) for g in found}
    strange = sorted(set(shares) - names)
    if strange:
        raise UsageError(
            f"select.per.{column}: no row has {column} = {strange[0]!r}; found {', '.join(sorted(names)) or 'no rows'}."
        )
    without = sorted(names - set(shares))
    if without and not spec.keep:
        raise UsageError(
            f"select.per.{column}: no share for {without[0]!r}; give it one, or `keep` for all that are not named."
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _ordered(expression: str, direction: str) -> str:
    return f"(\n{expression}\n) {direction} NULLS LAST"


def _sum(available: Sequence[str], wanted: Sequence[str]) -> str:
    return " + ".join(n if n in available else "NULL" for n in wanted)


def _number(column: Any) -> np.ndarray:
    """A polars column as float64, NULL as NaN."""
    values: np.ndarray = column.cast(float).fill_null(float("nan")).to_numpy()
    return values


def _step(reason: str) -> str:
    """The step that dropped a row, for counting: the reason without its numbers."""
    for word in ("where", "worst", "beyond keep"):
        if reason.startswith(word):
            return (
                "unknown"
                if reason.endswith("is unknown")
                else {"where": "where", "worst": "drop_worst", "beyond keep": "keep"}[word]
            )
    return "unknown"
