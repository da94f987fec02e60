"""Answers that were cut at `max_new_tokens`, checkpoint by checkpoint, as `curate summary` shows them."""

from __future__ import annotations

from typing import Any

from curate.console import table
from curate.store import Store


def cut_answers(store: Store, recipe: str | None) -> list[dict[str, Any]]:
    """A dict for every checkpoint with answers that were cut: run, checkpoint, step, answers, cut, unfinished (cut before they gave an answer), share
    (of the answers, unfinished; both None of answers that an earlier curate graded, which did not tell those apart), and least, median, most: how
    many tokens the unfinished ones had (None where the engine does not say).
    """
    unfinished = "FILTER (outcome = 'unfinished')"
    count = f"CASE WHEN count(*) FILTER (outcome IS NULL AND correct IS NOT NULL) = 0 THEN count(*) {unfinished} END"
    return store.sql(
        "SELECT run, checkpoint, step, count(*) AS answers, count(*) FILTER (NOT finished) AS cut, "
        f"{count} AS unfinished, {count} / count(*) AS share, "
        f"min(n_tokens) {unfinished} AS least, median(n_tokens) {unfinished} AS median, max(n_tokens) {unfinished} AS most "
        "FROM samples GROUP BY ALL HAVING cut > 0 ORDER BY run, step NULLS FIRST, checkpoint",
        recipe=recipe,
    ).to_dicts()


def cut_lines(found: list[dict[str, Any]]) -> list[str]:
    """A table of them, under a heading that says what counts as unfinished."""
    rows = [
        (
            line["run"] or None,
            line["checkpoint"] or None,
            line["answers"],
            line["cut"],
            line["unfinished"],
            "-" if line["share"] is None else f"{line['share']:.1%}",
            _length(line),
        )
        for line in found
    ]
    head = ("run", "checkpoint", "answers", "cut", "unfinished", "share", "unfinished after tokens")
    unknown = ["- of answers that an earlier curate graded: it did not tell those apart."] * any(
        line["unfinished"] is None for line in found
    )
    used = [i for i in range(len(head)) if i > 1 or any(row[i] is not None for row in rows)]
    return [
        "Answers cut at max_new_tokens; unfinished are those cut before they gave an answer, such as in their thinking:",
        table([[row[i] for i in used] for row in rows], head=[head[i] for i in used]),
        *unknown,
    ]


def _length(line: dict[str, Any]) -> str:
    if line["median"] is None:
        return "-"
    least, most = line["least"], line["most"]
    return f"{least:,}" if least == most else f"{least:,} to {most:,}, median {line['median']:,.0f}"
