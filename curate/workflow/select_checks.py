"""What is wrong with a recipe's `select`: said before anything is measured for it, and once more when rows are selected."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from curate.errors import UsageError, did_you_mean
from curate.scores import SCORES
from curate.store.expressions import check_expression, order_keys
from curate.store.sql import quote
from curate.workflow.spec import SelectSpec, check_groups

if TYPE_CHECKING:
    from curate.store import Store
    from curate.store.misread import Frame

RANDOM = "random"  # the word in order_by


def check_select(
    store: Store, spec: SelectSpec, *, worst: Mapping[str, str], planned: Collection[str], recipe: str | None = None
) -> Frame:
    """Say what is wrong with a selection before anything is measured for it. planned: the columns that measuring and scoring will add.

    Returns what `scored` will look like. Raises UsageError as `select` does.
    """
    frame = store.frame(recipe=recipe, planned=planned)
    check_numbers(store, spec, recipe)
    for name in spec.drop_worst:
        check_worst(name, {**worst, **spec.worst}, frame.columns)
    rules = [("select.where", spec.where, "::BOOLEAN"), ("select.per", spec.group, "::VARCHAR")]
    asked = [(key, expression, cast) for key, expression, cast in rules if expression is not None]
    for key, expression, _ in asked:
        check_expression(expression, key)
    keys = order_keys(spec.order_by) if spec.order_by else []
    asked += [("select.order_by", expression, "") for expression, _ in keys if expression.lower() != RANDOM]
    for key, expression, cast in asked:
        meant = store.check_sql(expression, key, recipe=recipe, planned=planned, is_order=not cast)
        # asked of one row whose values are all unknown: what no row could answer ('abc' as a number) is told apart without reading any
        nothing = f"(SELECT 1) AS one LEFT JOIN (SELECT * FROM {frame.text} LIMIT 0) AS scored ON true"
        try:
            store.sql(f"SELECT (\n{meant}\n){cast}, scored.row_id FROM {nothing}", recipe=recipe)
        except UsageError as error:
            raise rule_error(key, error, expression, frame.columns) from None
    _check_groups_ahead(store, spec, frame, planned, recipe)
    check_random(spec, frame)
    return frame


def rule_error(key: str, error: UsageError, expression: str, columns: Sequence[str]) -> UsageError:
    """What is wrong with a rule: a column that is not there, with the nearest that is, or will be; else the rule as the recipe has it, and why."""
    message = re.sub(r"\s*\bLINE \d+: .*$", "", str(error), flags=re.DOTALL)
    if message.startswith(key):
        return error
    if missing := re.match(r"no column '([^']+)'", message):
        near = did_you_mean(missing[1], columns, message[missing.end() :], before="; ")
        return UsageError(f"{key}: {_not_there(missing[1]) or f'no column {missing[1]!r}{near}'}")
    if message.startswith("Parser Error"):
        return UsageError(f"{key}: this is not one whole SQL expression: {shortened(expression)}")
    if "GROUP BY clause" in message or "aggregates" in message:
        message = "an aggregate has one value for all rows, and a rule one for each. Write `(SELECT … FROM scored)` or `… OVER ()`."
    return UsageError(f"{key}: {shortened(expression)}: {message}")


def shortened(expression: str) -> str:
    """An expression on one line, as far as a message shows it."""
    text = " ".join(expression.split())
    return text if len(text) <= 160 else f"{text[:160]}…"


def _not_there(name: str) -> str:
    """What to do for a score of curate's that the recipe does not ask for; "" for any other name."""
    return f"the score {name!r} is not among the recipe's `scores`; add it there." if name in SCORES else ""


def _check_groups_ahead(
    store: Store, spec: SelectSpec, frame: Frame, planned: Collection[str], recipe: str | None
) -> None:
    """A group of `per` that no row is of is said before anything is measured, where groups do not depend on what will be."""
    if spec.group is None or not spec.budgets or any(name.lower() in spec.group.lower() for name in planned):
        return
    groups = store.sql(
        f"SELECT DISTINCT (\n{spec.group}\n)::VARCHAR AS g FROM {frame.text} WHERE role = 'train'", recipe=recipe
    )
    if len(groups):
        check_groups(spec, groups["g"].to_list())


def check_random(spec: SelectSpec, frame: Frame) -> None:
    """`random` in order_by is the word for a random order, unless the user has a column of that name."""
    keys = [e.lower() for e, _ in order_keys(spec.order_by)] if spec.order_by else []
    if RANDOM in keys and RANDOM in (name.lower() for name in frame.columns):
        raise UsageError(
            "select.order_by: 'random' is a column of yours, and the word for a random order. Write `scored.random` for your column; for a random "
            "order give the column another name."
        )


def check_worst(name: str, worst: Mapping[str, str], available: Sequence[str]) -> None:
    """drop_worst takes a score that says which end is bad, or a column of which the recipe or its import says so, and that is there."""
    say = f"`drop_worst: {{{name}: {{share: 0.1, worst: low}}}}` (or high)"
    if name not in worst:
        if name in available:
            raise UsageError(f"select.drop_worst: which end of {name!r} is bad? It is no score, so say it: {say}.")
        if message := _not_there(name):
            raise UsageError(f"select.drop_worst: {message}")
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
            numbers = store.numbers_in(name, recipe=recipe)
            if numbers is not None:
                raise UsageError(
                    f"select.drop_worst: {name!r} is text, and {numbers.how_many} of its values are numbers. drop_worst takes a column of numbers: "
                    "write them without quotes (and commas) in the source, or select by the cast instead, with a bound: "
                    f"`where: {numbers.cast} >= …`, or by rank: `order_by: {numbers.cast} desc` (asc where high is bad) and "
                    f"`keep: {{share: {1 - spec.drop_worst[name]:g}}}`."
                )
            raise UsageError(
                f"select.drop_worst: {name!r} is text, which has no high and no low end. Use `where`, such as `where: {name} <> '…'`."
            )
