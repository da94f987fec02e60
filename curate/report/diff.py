"""Two selections side by side: which rows both keep, which one only, and which rule of the other dropped those."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from curate.console import table
from curate.errors import UsageError
from curate.store import Store

DECIDED = """
    WITH a AS (FROM selections WHERE selection = $a), b AS (FROM selections WHERE selection = $b), decided AS (
        SELECT row_id, a.row_id IS NOT NULL AS in_a, b.row_id IS NOT NULL AS in_b, coalesce(a.kept, false) AS a, coalesce(b.kept, false) AS b,
            a.rule AS rule_a, b.rule AS rule_b, a.reason AS reason_a, b.reason AS reason_b, a.rank AS rank_a, b.rank AS rank_b
        FROM a FULL JOIN b USING (row_id))
"""
COUNTS = """
    SELECT count(*) FILTER (a AND b) AS both, count(*) FILTER (a AND NOT b) AS only_a, count(*) FILTER (b AND NOT a) AS only_b,
        count(*) FILTER (NOT a AND NOT b) AS neither, count(*) FILTER (NOT in_b) AS unknown_to_b, count(*) FILTER (NOT in_a) AS unknown_to_a
    FROM decided
"""


@dataclass(frozen=True)
class Difference:
    """What tells two selections apart.

    by_rule: {"rule", "reason", "kept_by", "rows"}, the rule of the other selection that dropped the rows that one keeps. rows: some of those.
    """

    a: str
    b: str
    counts: dict[str, int]
    by_rule: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    def text(self) -> str:
        c = self.counts
        lines = [
            table(
                [
                    (f"kept by {self.a}", c["both"], c["only_a"]),
                    (f"not by {self.a}", c["only_b"], c["neither"]),
                ],
                head=("rows", f"kept by {self.b}", f"not by {self.b}"),
            )
        ]
        for other, name in (("unknown_to_b", self.b), ("unknown_to_a", self.a)):
            if c[other]:
                lines += [
                    "",
                    f"{c[other]:,} rows are none that {name!r} decided on: it is counted as not keeping them.",
                ]
        if self.by_rule:
            rows = [(r["kept_by"], r["rule"] or "-", r["reason"] or "-", r["rows"]) for r in self.by_rule]
            lines += ["", table(rows, head=("kept by", "dropped by", "because", "rows"), longest=60)]
        if self.rows:
            some = [(r["row_id"], r["kept_by"], r["reason"] or "-", r["prompt"]) for r in self.rows]
            lines += ["", table(some, head=("row", "kept by", "the other says", "prompt"), longest=40)]
        else:
            lines += ["", "Both keep the same rows."]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(store: Store, a: str, b: str, *, rows: int = 5) -> Difference:
    """Compare two selections of a store. rows: how many rows of each side to show. Raises UsageError naming the selections that there are."""
    for name in (a, b):
        store.selection(name)
    if a == b:
        raise UsageError(f"{a!r} is one selection; name two. `curate status {store.folder}` lists them.")
    names = {"a": a, "b": b}

    def asked(text: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = store.sql(DECIDED + text, names).to_dicts()
        return rows

    one_only = (
        "SELECT row_id, $a AS kept_by, rule_b AS rule, reason_b AS reason, rank_a AS rank FROM decided WHERE a AND NOT b UNION ALL "
        "SELECT row_id, $b, rule_a, reason_a, rank_b FROM decided WHERE b AND NOT a"
    )
    by_rule = asked(
        f"SELECT kept_by, rule, reason, count(*) AS rows FROM ({one_only}) GROUP BY ALL ORDER BY kept_by, rows DESC, rule, reason"
    )
    some = asked(
        f"SELECT d.row_id, kept_by, rule, reason, r.prompt FROM ({one_only}) d JOIN data.rows r USING (row_id) "
        f"QUALIFY row_number() OVER (PARTITION BY kept_by ORDER BY rank, r.position) <= {int(rows)} ORDER BY kept_by, rank, r.position"
    )
    return Difference(a, b, asked(COUNTS)[0], by_rule, some)
