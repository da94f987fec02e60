"""A control beside a selection: as much as was kept, drawn from the same candidates, so that what a selection brings can be told from what any
rows of that number (and length) bring.
"""

from __future__ import annotations

import hashlib

import numpy as np

from curate.store.decisions import Decisions
from curate.workflow.decide import Candidates, after_where, coded, tokens_of
from curate.workflow.spec import SelectSpec

STRATA = 10  # classes of length, of equal numbers of candidates


def control_of(rows: Candidates, spec: SelectSpec, decisions: Decisions) -> Decisions:
    """Draw, from the rows that `exclude` and `where` leave (`random_of_all`: `exclude` alone), as many as the selection keeps: in every group of
    `per`, and with `length_matched` in every class of token length. By a hash of row id and seed, so that it can be repeated. Kept rows may be
    drawn too.

    Where the selection keeps tokens, so many tokens are drawn (`length_matched`: so many rows of each length, which comes to the same).
    """
    deciding = after_where(rows, spec)
    order = np.argsort([hashlib.md5(f"{row_id} control {spec.seed}".encode()).hexdigest() for row_id in rows.row_ids])
    cells = _cells(rows, spec, deciding.left)
    by_tokens = spec.counts_tokens and spec.control != "length_matched"
    drawn, rank = np.zeros(deciding.n, bool), np.zeros(deciding.n, np.int64)
    for cell in sorted(set(cells[deciding.left].tolist())):
        index = order[(deciding.left & (cells == cell))[order]]
        kept = np.flatnonzero(decisions.kept & (cells == cell))
        cost = np.cumsum(tokens_of(rows, index) if by_tokens else rows.weight[index])
        most = tokens_of(rows, kept).sum() if by_tokens else rows.weight[kept].sum()
        drawn[index[cost <= most]] = True
    rank[order[drawn[order]]] = np.arange(1, int(drawn.sum()) + 1)
    how = "at random, matched in length" if spec.control == "length_matched" else "at random"
    for which, reason in ((drawn, "control: drawn"), (~drawn, "control: not among those drawn")):
        deciding.reasons.set(deciding.left & which, "control", f"{reason} {how} (seed {spec.seed})")
    deciding.notes.clear()  # the selection's own say it
    names = np.array([deciding.names[g] for g in rows.groups], object)
    by_group = {name: int((drawn & (names == name)).sum()) for name in deciding.names.values()}
    missing = int(decisions.kept.sum() - drawn.sum())
    if missing and not by_tokens:
        deciding.notes.append(
            f"control: {int(drawn.sum()):,} rows could be drawn for {int(decisions.kept.sum()):,} kept ones."
        )
    both = int((drawn & decisions.kept).sum())
    if 2 * both > drawn.sum():
        deciding.notes.append(
            f"control: {both:,} of its {int(drawn.sum()):,} rows are the selection's own, so it tells little: there are few other candidates."
        )
    return deciding.decisions(drawn, rank, by_group)


def _cells(rows: Candidates, spec: SelectSpec, left: np.ndarray) -> np.ndarray:
    """(rows,) a number for each group of `per` and class of length; rows of unknown length are a class of their own."""
    groups = coded(rows.groups)[0].astype(int)
    if spec.control != "length_matched":
        return groups
    known = rows.tokens[left & ~np.isnan(rows.tokens)]
    edges = np.unique(np.quantile(known, np.arange(1, STRATA) / STRATA)) if len(known) else np.zeros(0)
    classes = np.where(np.isnan(rows.tokens), STRATA, np.digitize(np.nan_to_num(rows.tokens), edges))
    return groups * (STRATA + 1) + classes.astype(int)
