"""A row's sampled answers with their grades, as `curate explain` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curate.store import Store

FEW = 4  # answers
WIDTH = 68  # characters of each


def answers_of(store: Store, row_id: str, recipe: str | None) -> list[dict[str, Any]]:
    """The row's answers by the recipe's grader, those of the last checkpoint first, with the columns of the view `samples`."""
    return store.sql(
        "SELECT run, checkpoint, step, sample, text, correct, n_tokens, finished, reasoning, outcome FROM samples WHERE row_id = ? "
        "ORDER BY step DESC NULLS LAST, run, checkpoint, sample",
        [row_id],
        recipe=recipe,
    ).to_dicts()


def answers_text(answers: Sequence[dict[str, Any]], *, every: bool) -> list[str]:
    """Lines of text: a few answers of the last checkpoint in one line each, or all of them in full."""
    if not answers:
        return []
    first = answers[0]["checkpoint"]
    shown = list(answers) if every else [a for a in answers if a["checkpoint"] == first][:FEW]
    right = sum(bool(a["correct"]) for a in answers if a["checkpoint"] == first)
    graded_count = sum(a["checkpoint"] == first for a in answers)
    graded = f"{right} of {graded_count} right" if answers[0]["correct"] is not None else f"{graded_count}, not graded"
    lines = ["", f"answers of {first or 'the model'}: {graded}"]
    checkpoint, width = first, 10 if any(answer["outcome"] == "unfinished" for answer in shown) else 5
    for answer in shown:
        if answer["checkpoint"] != checkpoint:
            checkpoint = answer["checkpoint"]
            lines.append(f"answers of {checkpoint}:")
        grade = answer["outcome"] or ("-" if answer["correct"] is None else "wrong")
        thought = str(answer["reasoning"] or "").strip()
        cut = "" if answer["finished"] else " (cut)"
        text = str(answer["text"] or "").strip()
        if thought and (every or not text):
            text = f"[thinks: {thought}] {text}".strip()
        lines.append(f"  {grade:{width}}  {text if every else _short(text)}{cut}")
    if len(shown) < len(answers):
        lines.append(f"  {len(answers) - len(shown):,} more answers: --all")
    return lines


def _short(text: str) -> str:
    """The beginning and the end, where the answer stands, in one line."""
    text = text.replace("\n", "\\n") or "(empty)"
    half = (WIDTH - 3) // 2
    return text if len(text) <= WIDTH else f"{text[:half]} … {text[-half:]}"
