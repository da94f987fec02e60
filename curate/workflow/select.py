"""Selection: which rows are kept, and for every row why.

    exclude  →  where  →  drop_worst  →  order_by  →  keep (in every group of `per`)

- `exclude: heldout` drops the rows whose prompt is in the recipe's held-out set (see `same_prompt` in select_query.py).
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

decide.py is the pure part: arrays in, decisions out. select_query.py asks the store for the arrays, spec.py reads the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curate.store.decisions import Decisions, Reason
from curate.store.openings import kept_open
from curate.workflow.control import control_of
from curate.workflow.decide import Candidates, decide, whole
from curate.workflow.select_checks import check_select, check_worst
from curate.workflow.select_query import SelectQuery
from curate.workflow.spec import SelectSpec

if TYPE_CHECKING:
    from curate.store import Store

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


def select(store: Store, spec: SelectSpec, **known: Any) -> Decisions:
    """Decide on every row that occurs in the (recipe's) sources for training; `select_with_control` without the control."""
    return select_with_control(store, spec, **known)[0]


@kept_open()  # one opening for all that is asked
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
    query = SelectQuery(store, spec, recipe, worst, null_is_known or {})
    rows = query.candidates(sources)
    decisions = decide(rows, spec, worst)
    return decisions, control_of(rows, spec, decisions) if spec.control else None
