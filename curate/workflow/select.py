"""Selection: which rows are kept, and for every row why.

    exclude  →  where  →  drop_worst  →  order_by  →  keep (in every group of `per`)

- `exclude: heldout` drops the rows whose prompt is in the recipe's held-out set (see `same_prompt`).
- `where` is SQL over any column of the view `scored`; a row stays where it is true.
- `drop_worst: {flip_loss: 0.05}` drops that share of the rows that `where` left, from the end that the score itself declares as its worst.
  Several scores each take their share of the same rows; a row in two shares is dropped once.
- `order_by` ranks what is left (the order the rows were read in, if not given; `random`: by a hash of row id and seed). Ties go by row id, so
  that a selection repeats.
- `keep: {share | rows | tokens}` takes the first of that order, in every group of `per` on its own; tokens stops before the budget is passed.
- A share of n rows is n·share rounded to the nearest whole number, halves up.
- `duplicates: once` counts a row once however often it occurs; `as_found` counts it as often as it occurs, in shares and budgets too.
- `unknown`: a row where a value that a rule above uses is NULL (or NaN) although it should not be: an error, or the row is kept through that
  step (ranked last), or dropped. A NULL that no rule uses drops nothing.

A recipe's SQL sees the views of the recipe, as `curate sql STORE --recipe NAME` does: its training rows and its held-out rows. Only training
rows are decided on (docs/selection.md).

`curate.workflow.decide` is the pure part: arrays in, decisions out. `select` asks the store for the arrays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from curate.errors import UsageError, did_you_mean, nearest
from curate.store.decisions import Decisions, Reason
from curate.store.expressions import check_expression, order_keys
from curate.store.sql import literal, quote
from curate.workflow.control import control_of
from curate.workflow.decide import Candidates, decide, whole
from curate.workflow.spec import SelectSpec, check_groups

if TYPE_CHECKING:
    from curate.store import Store
    from curate.store.misread import Frame

__all__ = [
    "Candidates",
    "Decisions",
    "Reason",
    "SelectSpec",
    "check_select",
    "check_worst",
    "decide",
    "select",
    "select_with_control",
    "whole",
]

TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "completion_tokens")
RANDOM = "random"  # the word in order_by
ASKED = "what curate asks: "  # before the names of its own columns of a query
TIMES = quote(f"{ASKED}times read")


def select(store: Store, spec: SelectSpec, **known: Any) -> Decisions:
    """Decide on every row that occurs in the (recipe's) sources for training; `select_with_control` without the control."""
    return select_with_control(store, spec, **known)[0]


def select_with_control(
    store: Store,
    spec: SelectSpec,
    *,
    worst: Mapping[str, str],
    recipe: str | None = None,
    sources: Sequence[str] | None = None,
    null_is_known: Mapping[str, str] | None = None,
) -> tuple[Decisions, Decisions | None]:
    """Decide on every row that occurs in `sources` (all, if None) for training, and draw the control that the spec asks for.

    worst: score name -> "high" | "low" | "none", as the scores declare it. null_is_known: column -> SQL that is true where its NULL is a value
    and not a gap, such as {"first_learned_step": "never_learned"}; one that cannot be asked here is left out.
    Raises UsageError for a condition that is not SQL, names no column (the nearest is named) or could be misread, for drop_worst of a score
    without a worst end; ValidationError where `unknown: error` meets an unknown value.
    """
    worst = {**worst, **spec.worst}
    question = _Question(store, spec, recipe, worst, null_is_known or {})
    rows = question.ask(sources)
    decisions = decide(rows, spec, worst)
    return decisions, control_of(rows, spec, decisions) if spec.control else None


def check_select(
    store: Store, spec: SelectSpec, *, worst: Mapping[str, str], planned: Sequence[str], recipe: str | None = None
) -> Frame:
    """Say what is wrong with a selection before anything is measured for it. planned: the columns that measuring and scoring will add.

    Returns what `scored` will look like. Raises UsageError as `select` does.
    """
    worst = {**worst, **spec.worst}
    frame = store.frame(recipe=recipe, planned=planned)
    check_numbers(store, spec, recipe)
    for name in spec.drop_worst:
        check_worst(name, worst, frame.columns)
    asked = [("select.where", spec.where, "::BOOLEAN"), ("select.per", spec.group, "::VARCHAR")]
    for key, expression, _ in asked:
        if expression is not None:
            check_expression(expression, key)
    asked += (
        [("select.order_by", e, "") for e, _ in order_keys(spec.order_by) if e.lower() != RANDOM]
        if spec.order_by
        else []
    )
    for key, expression, cast in asked:
        if expression is None:
            continue
        meant = store.check_sql(expression, key, recipe=recipe, planned=planned, is_order=not cast)
        try:
            store.sql(f"SELECT (\n{meant}\n){cast} FROM {frame.text} LIMIT 0", recipe=recipe)
        except UsageError as error:
            typed = re.match(r"no column '([^']+)'", str(error))
            near = nearest(typed[1], frame.columns) if typed else None
            raise UsageError(
                f"{key}: " + (f"no column {typed[1]!r}; did you mean {near!r}?" if typed and near else str(error))
            ) from None
    _check_groups_ahead(store, spec, frame, planned, recipe)
    _check_random(spec, frame)
    return frame


def _check_groups_ahead(
    store: Store, spec: SelectSpec, frame: Frame, planned: Sequence[str], recipe: str | None
) -> None:
    """A group of `per` that no row is of is said before anything is measured, where groups do not depend on what will be."""
    if spec.group is None or not spec.budgets or any(name.lower() in spec.group.lower() for name in planned):
        return
    found = store.sql(
        f"SELECT DISTINCT (\n{spec.group}\n)::VARCHAR AS g FROM {frame.text} WHERE role = 'train'", recipe=recipe
    )
    if len(found):
        check_groups(spec, found["g"].to_list())


def _check_random(spec: SelectSpec, frame: Frame) -> None:
    """`random` in order_by is the word for a random order, unless the user has a column of that name."""
    keys = [e.lower() for e, _ in order_keys(spec.order_by)] if spec.order_by else []
    if RANDOM in keys and RANDOM in (name.lower() for name in frame.columns):
        raise UsageError(
            "select.order_by: 'random' is a column of yours, and the word for a random order. Write `scored.random` for your column; for a random "
            "order give the column another name."
        )


class _Question:
    """What a selection asks of the store: one query, and one by one only to say which key of the recipe is wrong."""

    def __init__(
        self,
        store: Store,
        spec: SelectSpec,
        recipe: str | None,
        worst: Mapping[str, str],
        null_is_known: Mapping[str, str],
    ):
        self.store, self.spec, self.recipe = store, spec, recipe
        self.frame = store.frame(recipe=recipe)
        _check_random(spec, self.frame)
        check_numbers(store, spec, recipe)
        for name in spec.drop_worst:
            check_worst(name, worst, self.frame.columns)
        self.where = self._meant(spec.where, "select.where")
        self.group = self._meant(spec.group, "select.per")
        keys = order_keys(spec.order_by) if spec.order_by else []
        self.keys = [(self._order_key(expression), direction) for expression, direction in keys]
        self.written = [expression for expression, _ in keys]
        self.known_as = {name: sql for name, sql in null_is_known.items() if self._can_ask(sql)}
        self.tokens = [n for n in TOKENS if n in self.frame.columns]
        needs = (
            "select.keep.tokens" if spec.counts_tokens else "select.control" if spec.control == "length_matched" else ""
        )
        if needs and not self.tokens:
            raise UsageError(
                f"{needs}: no token counts are measured for these rows. Measure them with `curate measure RECIPE`, or "
                + ("keep rows or a share." if spec.counts_tokens else "take `control: random`.")
            )
        self.needs_tokens = bool(needs)

    def _meant(self, text: str | None, key: str, *, is_order: bool = False) -> str | None:
        if text is None:
            return None
        check_expression(text, key)
        return self.store.check_sql(text, key, recipe=self.recipe, is_order=is_order)

    def _order_key(self, text: str) -> str:
        if text.lower() == RANDOM:
            return f"md5(scored.row_id || {literal(f' {self.spec.seed}')})"
        return self._meant(text, "select.order_by", is_order=True) or text

    def _can_ask(self, condition: str) -> bool:
        """The condition may name a score that this recipe does not have: then nothing excuses the NULL."""
        try:
            self.store.sql(f"SELECT {condition} FROM scored LIMIT 0", recipe=self.recipe)
        except UsageError:
            return False
        return True

    def columns(self) -> dict[str, tuple[str, str]]:
        """alias -> (SQL, the recipe's key that it comes from)."""
        asked = {"row_id": ("scored.row_id", "select"), "weight": (f'"training rows".{TIMES}', "select")}
        if self.spec.exclude:
            asked["held"] = (HELD, "select.exclude")
        if self.where is not None:
            asked["passed"] = (f"((\n{self.where}\n)::BOOLEAN)::DOUBLE", "select.where")
        for name in self.spec.drop_worst:
            asked[f"worst {name}"] = (f"{quote(name)}::DOUBLE", f"select.drop_worst.{name}")
            if name in self.known_as:
                asked[f"excused {name}"] = (f"coalesce(({self.known_as[name]}), false)", "null_is_known")
        if self.keys:
            order = ", ".join(f"{_known(e)} {direction} NULLS LAST" for e, direction in self.keys)
            asked["order"] = (f"row_number() OVER (ORDER BY {order}, scored.row_id)", "select.order_by")
        for i, ((expression, _), written) in enumerate(zip(self.keys, self.written, strict=True)):
            excuse = f"AND NOT coalesce(({self.known_as[written]}), false)" if written in self.known_as else ""
            asked[f"gap {i}"] = (f"({_known(expression)} IS NULL {excuse})", "select.order_by")
        if self.group is not None:
            asked["group"] = (f"(\n{self.group}\n)::VARCHAR", "select.per")
        if self.needs_tokens:
            # a side that was not measured is no zero: what a row of its kind must have
            needed = f"CASE scored.kind WHEN 'preference' THEN {self._sum(TOKENS[:3])} ELSE {self._sum((TOKENS[0], TOKENS[3]))} END"
            asked["tokens"] = (f"({needed})::DOUBLE", "select.keep.tokens")
        return asked

    def _sum(self, wanted: Sequence[str]) -> str:
        return " + ".join(f"scored.{n}" if n in self.tokens else "NULL" for n in wanted)

    def ask(self, sources: Sequence[str] | None) -> Candidates:
        of = f"AND o.source IN ({', '.join(map(literal, sources)) or 'NULL'})" if sources is not None else ""
        train = f"SELECT o.row_id, count(*)::DOUBLE AS {TIMES} FROM occurrences o WHERE o.role = 'train' {of} GROUP BY o.row_id"
        table = f'scored JOIN ({train}) AS "training rows" USING (row_id) ORDER BY scored.position'

        def found(wanted: Mapping[str, tuple[str, str]]) -> Any:
            # DuckDB lets an expression name an earlier alias: none of ours may be a name that a rule could use for a column
            picked = ", ".join(f"{text} AS {quote(ASKED + alias)}" for alias, (text, _) in wanted.items())
            lines = self.store.sql(f"SELECT {picked} FROM {table}", recipe=self.recipe)
            return lines.rename({name: name.removeprefix(ASKED) for name in lines.columns})

        asked = self.columns()
        try:
            base = found(asked)
        except UsageError as problem:
            for alias, one in asked.items():
                try:
                    found({alias: one})
                except UsageError as error:
                    raise UsageError(f"{one[1]}: {error}") from None
                except duckdb.TransactionException:  # a value that cannot be cast has ended it: no more can be asked
                    rules = [key for key in ("where", "order_by", "per") if getattr(self.spec, key) is not None]
                    raise UsageError(f"{', '.join(f'select.{key}' for key in rules)}: {problem}") from None
            raise
        return self._candidates(base, self._compared(found, len(base)))

    def _candidates(self, base: Any, compared: list[Any] | None) -> Candidates:
        n, spec = len(base), self.spec
        order_unknown: list[str | None] = [None] * n
        for k, written in enumerate(self.written):
            for i in np.flatnonzero(base[f"gap {k}"].to_numpy()):
                order_unknown[i] = order_unknown[i] or written
        weight = base["weight"].to_numpy().astype(np.float64)
        return Candidates(
            row_ids=base["row_id"].to_list(),
            passed=_number(base["passed"]) if self.where is not None else np.ones(n),
            scores={name: _number(base[f"worst {name}"]) for name in spec.drop_worst},
            order=base["order"].to_numpy().astype(np.int64) if self.keys else np.arange(n),
            order_unknown=order_unknown,
            groups=base["group"].to_list() if self.group is not None else [None] * n,
            tokens=_number(base["tokens"]) if self.needs_tokens else np.zeros(n),
            weight=weight if spec.duplicates == "as_found" else np.ones(n),
            excused={name: base[f"excused {name}"].to_numpy() for name in spec.drop_worst if name in self.known_as},
            held=base["held"].to_list() if spec.exclude else None,
            compared=compared,
        )

    def _compared(self, found: Any, n: int) -> list[Any] | None:
        """For every row the first part of `where` that is false, with the row's number and the bound. None where parts say no more."""
        parts = self.store.conjuncts(self.spec.where) if self.spec.where else []
        asked: dict[str, tuple[str, str]] = {}
        for i, part in enumerate(parts):
            asked[f"false {i}"] = (f"(\n{part.text}\n)::BOOLEAN = false", "select.where")
            asked[f"value {i}"], asked[f"cut {i}"] = (part.value, "select.where"), (part.cut, "select.where")
        if not parts:
            return None
        try:
            lines = found(asked)
        except UsageError:  # a window of its own, say: then the whole of `where` is the reason
            return None
        compared: list[Any] = [None] * n
        for i, part in enumerate(parts):
            false, value, cut = (lines[f"{what} {i}"].to_list() for what in ("false", "value", "cut"))
            for k in range(n):
                if false[k] and compared[k] is None:
                    compared[k] = (part.text, value[k], cut[k])
        return compared


def check_worst(name: str, worst: Mapping[str, str], available: Sequence[str]) -> None:
    """drop_worst takes a score that says which end is bad, or a column of which the recipe or its import says so, and that is there."""
    say = f"`drop_worst: {{{name}: {{share: 0.1, worst: low}}}}` (or high)"
    if name not in worst:
        if name in available:
            raise UsageError(f"select.drop_worst: which end of {name!r} is bad? It is no score, so say it: {say}.")
        hint = did_you_mean(name, [*worst, *available], f"this recipe has {', '.join(worst) or 'none'}.", cutoff=0.5)
        raise UsageError(f"select.drop_worst: {name!r} is not a score of this recipe; {hint}")
    if worst[name] not in ("high", "low"):
        raise UsageError(
            f"select.drop_worst: neither end of {name!r} is bad in itself. "
            f"Use `where` with a bound of your own, or `order_by` and `keep`, or say which is bad for you: {say}."
        )
    if name not in available:
        hint = did_you_mean(name, available, cutoff=0.5, sentence=True, before=" ")
        raise UsageError(
            f"select.drop_worst: no column {name!r} is there yet.{hint} `curate score RECIPE` computes the recipe's scores."
        )


def check_numbers(store: Store, spec: SelectSpec, recipe: str | None) -> None:
    """UsageError where drop_worst names text, which has no bad end."""
    kinds = store.sql("SELECT * FROM scored LIMIT 0", recipe=recipe).schema if spec.drop_worst else {}
    for name in spec.drop_worst:
        if name in spec.worst:  # a column, which curate and the user may both have
            store.check_sql(quote(name), f"select.drop_worst.{name}", recipe=recipe)
        if str(kinds.get(name)) == "String":
            told = store.numbers_in(name, recipe=recipe)
            if told is not None:
                raise UsageError(
                    f"select.drop_worst: {name!r} is text, and {told.how_many} of its values are numbers. drop_worst takes a column of numbers: "
                    "write them without quotes (and commas) in the source, or select by the cast instead, with a bound: "
                    f"`where: {told.cast} >= …`, or by rank: `order_by: {told.cast} desc` (asc where high is bad) and "
                    f"`keep: {{share: {1 - spec.drop_worst[name]:g}}}`."
                )
            raise UsageError(
                f"select.drop_worst: {name!r} is text, which has no high and no low end. Use `where`, such as `where: {name} <> '…'`."
            )


def same_prompt(table: str) -> str:
    """SQL for what makes two prompts the same: the text of all turns but the system's, whatever the white space. Text and one user turn are alike."""
    turns = f'from_json({table}.prompt, \'[{{"role": "VARCHAR", "content": "VARCHAR"}}]\')'
    said = f"list_transform(list_filter({turns}, lambda turn: turn.role <> 'system'), lambda turn: turn.content)"
    text = f"CASE WHEN {table}.style = 'conversational' THEN array_to_string({said}, ' ') ELSE {table}.prompt END"
    return f"nullif(trim(regexp_replace({text}, '\\s+', ' ', 'g')), '')"  # an empty prompt is nobody's


_HELDOUT = "(SELECT o.row_id FROM occurrences o WHERE o.role = 'heldout')"
HELD = (
    f"CASE WHEN scored.row_id IN {_HELDOUT} THEN 'row' "
    f"WHEN {same_prompt('scored')} IN (SELECT {same_prompt('r')} FROM rows r WHERE r.row_id IN {_HELDOUT}) THEN 'prompt' END"
)


def _known(expression: str) -> str:
    """The value, NULL for NaN, which DuckDB would rank first."""
    value = f"(\n{expression}\n)"
    return f"(CASE WHEN typeof({value}) IN ('DOUBLE', 'FLOAT') AND {value}::VARCHAR = 'nan' THEN NULL ELSE {value} END)"


def _number(column: Any) -> np.ndarray:
    """A polars column as float64, NULL as NaN."""
    values: np.ndarray = column.cast(float).fill_null(float("nan")).to_numpy()
    return values
