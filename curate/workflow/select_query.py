"""What a selection asks of the store: for every row that could be selected the values that its rules use, in one query.

Every column of the query is one of ours, named so that no rule of the user's can mean it, with the recipe's key that it comes from: where the query
fails its columns are asked one by one, and the message names the key that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np

from curate.errors import UsageError
from curate.store.conjuncts import Conjunct, as_number
from curate.store.expressions import check_expression, order_keys
from curate.store.sql import literal, quote
from curate.workflow.decide import Candidates, Compared
from curate.workflow.select_checks import RANDOM, check_numbers, check_random, check_worst, rule_error
from curate.workflow.spec import SelectSpec

if TYPE_CHECKING:
    from curate.store import Store

TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "completion_tokens")
ASKED = "what curate asks: "  # before the names of its own columns of a query
TIMES = quote(f"{ASKED}times read")


class Asked(NamedTuple):
    """A column of the query. key: of the recipe."""

    sql: str
    key: str


class SelectQuery:
    """The query of one selection. UsageError for a rule that cannot be asked, and for tokens that nobody counted."""

    def __init__(
        self,
        store: Store,
        spec: SelectSpec,
        recipe: str | None,
        worst: Mapping[str, str],
        null_is_known: Mapping[str, str],
    ):
        self.store, self.spec, self.recipe = store, spec, recipe
        frame = self.frame = store.frame(recipe=recipe)
        check_random(spec, frame)
        check_numbers(store, spec, recipe)
        for name in spec.drop_worst:
            check_worst(name, worst, frame.columns)
        self.where = self._checked(spec.where, "select.where")
        self.group = self._checked(spec.group, "select.per")
        keys = order_keys(spec.order_by) if spec.order_by else []
        self.order_by = [expression for expression, _ in keys]  # as the recipe writes it
        self.keys = [(self._order_key(expression), direction) for expression, direction in keys]
        self.known_as = {name: sql for name, sql in null_is_known.items() if self._can_ask(sql)}
        self.tokens = [name for name in TOKENS if name in frame.columns]
        self.needs_tokens = spec.counts_tokens or spec.control == "length_matched"
        if self.needs_tokens and not self.tokens:
            key = "select.keep.tokens" if spec.counts_tokens else "select.control"
            instead = "keep rows or a share." if spec.counts_tokens else "take `control: random`."
            raise UsageError(
                f"{key}: no token counts are measured for these rows. Measure them with `curate measure RECIPE`, or {instead}"
            )

    def candidates(self, sources: Sequence[str] | None) -> Candidates:
        """The rows that occur in these sources for training (all sources, if None), in the order they were read in."""
        self._table = self._training_rows(sources)
        parts = self.store.conjuncts(self.spec.where) if self.spec.where else []
        try:
            rows = self._ask(self.columns() | self._of_parts(parts))
        except UsageError as problem:  # of a part with a window of its own, say, the whole of `where` is the reason
            parts, rows = [], self._ask_each(self.columns(), problem)
        return self._candidates(rows, self._compared(parts, rows))

    # ---- the rules as SQL ----------------------------------------------------------------------------------------------------------------

    def _checked(self, text: str | None, key: str, *, is_order: bool = False) -> str | None:
        """The user's SQL as it is to be asked."""
        if text is None:
            return None
        check_expression(text, key)
        return self.store.check_sql(text, key, recipe=self.recipe, is_order=is_order)

    def _order_key(self, text: str) -> str:
        if text.lower() == RANDOM:
            return f"md5(scored.row_id || {literal(f' {self.spec.seed}')})"
        return self._checked(text, "select.order_by", is_order=True) or text

    def _can_ask(self, condition: str) -> bool:
        """The condition may name a score that this recipe does not have: then nothing excuses the NULL."""
        try:
            self.store.sql(f"SELECT {condition} FROM scored LIMIT 0", recipe=self.recipe)
        except UsageError:
            return False
        return True

    # ---- the columns of the query --------------------------------------------------------------------------------------------------------

    def columns(self) -> dict[str, Asked]:
        """Everything that is asked, by alias."""
        asked = {"row_id": Asked("scored.row_id", "select"), "weight": Asked(f'"training rows".{TIMES}', "select")}
        if self.spec.exclude:
            asked["held"] = Asked(HELD, "select.exclude")
        if self.where is not None:
            asked["passed"] = Asked(f"((\n{self.where}\n)::BOOLEAN)::DOUBLE", "select.where")
        asked |= self._of_drop_worst() | self._of_order_by()
        if self.group is not None:
            asked["group"] = Asked(f"(\n{self.group}\n)::VARCHAR", "select.per")
        if self.needs_tokens:
            asked["tokens"] = Asked(self._token_counts(), "select.keep.tokens")
        return asked

    def _of_drop_worst(self) -> dict[str, Asked]:
        asked = {}
        for name in self.spec.drop_worst:
            asked[f"worst {name}"] = Asked(f"{quote(name)}::DOUBLE", f"select.drop_worst.{name}")
            if name in self.known_as:
                asked[f"excused {name}"] = Asked(f"coalesce(({self.known_as[name]}), false)", "null_is_known")
        return asked

    def _of_order_by(self) -> dict[str, Asked]:
        """The row's place in the order, and for every key of it whether the row lacks it."""
        if not self.keys:
            return {}
        known = [_known(sql, self._type_of(sql)) for sql, _ in self.keys]
        order = ", ".join(f"{sql} {direction}" for sql, (_, direction) in zip(known, self.keys, strict=True))
        asked = {"order": Asked(f"row_number() OVER (ORDER BY {order}, scored.row_id)", "select.order_by")}
        for number, (sql, written) in enumerate(zip(known, self.order_by, strict=True)):
            excuse = f"AND NOT coalesce(({self.known_as[written]}), false)" if written in self.known_as else ""
            asked[f"gap {number}"] = Asked(f"({sql} IS NULL {excuse})", "select.order_by")
        return asked

    def _token_counts(self) -> str:
        """The tokens of a row, by its kind: a side that was not measured is no zero, but makes the sum unknown."""
        pair, example = self._sum(TOKENS[:3]), self._sum((TOKENS[0], TOKENS[3]))
        return f"(CASE scored.kind WHEN 'preference' THEN {pair} ELSE {example} END)::DOUBLE"

    def _sum(self, names: Sequence[str]) -> str:
        return " + ".join(f"scored.{name}" if name in self.tokens else "NULL" for name in names)

    # ---- asking it -----------------------------------------------------------------------------------------------------------------------

    def _training_rows(self, sources: Sequence[str] | None) -> str:
        """A FROM of the rows that occur in the sources for training, with how often they do."""
        of = f"AND o.source IN ({', '.join(map(literal, sources)) or 'NULL'})" if sources is not None else ""
        train = f"SELECT o.row_id, count(*)::DOUBLE AS {TIMES} FROM occurrences o WHERE o.role = 'train' {of} GROUP BY o.row_id"
        return f'scored JOIN ({train}) AS "training rows" USING (row_id)'

    def _ask(self, asked: Mapping[str, Asked]) -> Any:
        """A polars frame with these columns."""
        # DuckDB lets an expression name an earlier alias: none of ours may be a name that a rule could use for a column
        asked = {**asked, "position": Asked("scored.position", "select")}
        picked = ", ".join(f"{one.sql} AS {quote(ASKED + alias)}" for alias, one in asked.items())
        rows = self.store.sql(
            f"SELECT {picked} FROM {self._table}", recipe=self.recipe, names_columns=self._names_columns
        )
        return rows.rename({name: name.removeprefix(ASKED) for name in rows.columns}).sort("position")

    @property
    def _names_columns(self) -> bool:
        """Whether the rules name every column that they read: no subquery, no star, nothing that stands for a whole row."""
        rules = [self.spec.where, self.spec.group, *self.order_by]
        text = " ".join(rule.lower() for rule in rules if rule)
        return not re.search(r"\*|#|\b(?:select|from|table|columns)\b|\bscored\b(?!\s*\.)", text)

    def _ask_each(self, asked: Mapping[str, Asked], problem: UsageError) -> Any:
        """As `_ask`, after a query that failed with this problem; where this fails too, UsageError with the recipe's key that is wrong."""
        try:
            try:
                return self._ask(asked)
            except UsageError as error:
                problem = error
            for alias, one in asked.items():
                try:
                    self._ask({alias: one})
                except UsageError as error:
                    rule = self._rule(one.key)
                    raise (
                        rule_error(one.key, error, rule, self.frame.columns)
                        if rule
                        else UsageError(f"{one.key}: {error}")
                    ) from None
        except duckdb.TransactionException:  # a value that cannot be cast has ended it: no more can be asked
            rules = [key for key in ("where", "order_by", "per") if getattr(self.spec, key) is not None]
            raise UsageError(f"{', '.join(f'select.{key}' for key in rules)}: {problem}") from None
        raise problem

    def _rule(self, key: str) -> str | None:
        """A rule of the recipe as it is written."""
        return {
            "select.where": self.spec.where,
            "select.order_by": self.spec.order_by,
            "select.per": self.spec.group,
        }.get(key)

    def _of_parts(self, parts: Sequence[Conjunct]) -> dict[str, Asked]:
        """For every part of `where` whether it is false, the row's number and the bound."""
        asked: dict[str, Asked] = {}
        for i, part in enumerate(parts):
            asked[f"false {i}"] = Asked(f"(\n{part.text}\n)::BOOLEAN = false", "select.where")
            for name, sql in (("value", part.value), ("cut", part.cut)):
                asked[f"{name} {i}"] = Asked(as_number(sql, self._type_of(sql)), "select.where")
        return asked

    def _compared(self, parts: Sequence[Conjunct], rows: Any) -> list[Compared] | None:
        """For every row the parts of `where` that are false, with the row's number and the bound. None where parts say no more."""
        return [
            Compared(
                part.text,
                rows[f"false {i}"].fill_null(False).to_numpy(),
                _masked(rows[f"value {i}"]),
                _masked(rows[f"cut {i}"]),
            )
            for i, part in enumerate(parts)
        ] or None

    def _type_of(self, sql: str) -> str:
        """The SQL type of an expression over `scored`, "" where it cannot be asked by itself."""
        try:
            kinds = self.store.sql(
                f"SELECT typeof(v) FROM (SELECT any_value(\n{sql}\n) AS v FROM (SELECT * FROM scored LIMIT 0) AS scored)",
                recipe=self.recipe,
            )
        except UsageError:
            return ""
        return str(kinds.item())

    # ---- what came back ------------------------------------------------------------------------------------------------------------------

    def _candidates(self, rows: Any, compared: list[Compared] | None) -> Candidates:
        n, spec = len(rows), self.spec
        weight = rows["weight"].to_numpy().astype(np.float64)
        return Candidates(
            row_ids=rows["row_id"].to_list(),
            passed=_number(rows["passed"]) if self.where is not None else np.ones(n),
            scores={name: _number(rows[f"worst {name}"]) for name in spec.drop_worst},
            order=rows["order"].to_numpy().astype(np.int64) if self.keys else np.arange(n),
            order_unknown=self._first_gaps(rows),
            groups=rows["group"].to_list() if self.group is not None else [None] * n,
            tokens=_number(rows["tokens"]) if self.needs_tokens else np.zeros(n),
            weight=weight if spec.duplicates == "as_found" else np.ones(n),
            excused={name: rows[f"excused {name}"].to_numpy() for name in spec.drop_worst if name in self.known_as},
            held=rows["held"].to_list() if spec.exclude else None,
            compared=compared,
        )

    def _first_gaps(self, rows: Any) -> list[str | None]:
        """For every row the first key of order_by that it lacks."""
        gaps: list[str | None] = [None] * len(rows)
        for number, written in enumerate(self.order_by):
            for i in np.flatnonzero(rows[f"gap {number}"].to_numpy()):
                gaps[i] = gaps[i] or written
        return gaps


def same_prompt(table: str) -> str:
    """SQL for what makes two prompts the same: the text of all turns but the system's, whatever the white space. Text and one user turn are alike."""
    turns = f'from_json({table}.prompt, \'[{{"role": "VARCHAR", "content": "VARCHAR"}}]\')'
    texts = f"list_transform(list_filter({turns}, lambda turn: turn.role <> 'system'), lambda turn: turn.content)"
    text = f"CASE WHEN {table}.style = 'conversational' THEN array_to_string({texts}, ' ') ELSE {table}.prompt END"
    return f"nullif(trim(regexp_replace({text}, '\\s+', ' ', 'g')), '')"  # an empty prompt is nobody's


_HELDOUT = "(SELECT o.row_id FROM occurrences o WHERE o.role = 'heldout')"
HELD = (
    f"CASE WHEN scored.row_id IN {_HELDOUT} THEN 'row' "
    f"WHEN {same_prompt('scored')} IN (SELECT {same_prompt('r')} FROM rows r WHERE r.row_id IN {_HELDOUT}) THEN 'prompt' END"
)


def _known(expression: str, type_name: str) -> str:
    """The value, NULL for NaN, which DuckDB would rank first. type_name: its SQL type, "" where that is not known."""
    value = f"(\n{expression}\n)"
    if type_name:
        return f"(CASE WHEN isnan({value}) THEN NULL ELSE {value} END)" if type_name in ("DOUBLE", "FLOAT") else value
    return f"(CASE WHEN typeof({value}) IN ('DOUBLE', 'FLOAT') AND {value}::VARCHAR = 'nan' THEN NULL ELSE {value} END)"


def _masked(column: Any) -> np.ma.MaskedArray:
    """A polars column as float64, masked where it is NULL."""
    return np.ma.MaskedArray(column.cast(float).fill_null(0.0).to_numpy(), column.is_null().to_numpy())


def _number(column: Any) -> np.ndarray:
    """A polars column as float64, NULL as NaN."""
    values: np.ndarray = column.cast(float).fill_null(float("nan")).to_numpy()
    return values
