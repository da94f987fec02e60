"""Before anything is sampled: the grader is tried, and every row's reference is graded by itself.

    cannot be read        the grader reads nothing to compare with out of the answer: accuracy is unknown (NULL)
    wrong by itself       a text that says just the reference is graded wrong, so that no answer ever can be right
    solution is wrong     the row's own completion is graded wrong against the row's answer: who answers as it was trained to is wrong

Each is counted and said, with examples, in `plan` and in `run`. Where no row can be right, sampling is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from curate.errors import UsageError
from curate.plan.row_names import named_rows
from curate.rows import Example, Row, text_of
from curate.store.openings import kept_open

if TYPE_CHECKING:
    from curate.measurements.grading_contract import Grader
    from curate.plan.plan import Plan
    from curate.recipe.load import Loaded
    from curate.store import Store

GRADED = ("accuracy", "n_correct", "perturbed_accuracy")
PATIENCE = 20.0  # seconds that the check may take: graders of users' own, and math on texts, may be slow
TRIED = 8  # rows that a grader of the user's own is tried on
MADE = ("", "I do not know.")  # what models say too
CHANGE = "Another grader: `--set sampling.grader=…` (gsm8k, number, math, choice, exact, {regex: …}); another column: `source.columns: {answer: …}`."


@dataclass
class Findings:
    """How many rows of each kind, with the first examples."""

    rows: int = 0
    stopped: bool = False  # before all were looked at
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    named: Callable[[Row], str] = field(default=lambda row: f"row {row.row_id[:8]}")

    def add(self, kind: str, row: Example) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < 3:
            shown.append(f"{self.named(row)} with {_short(row.answer or '')}")

    def examples_of(self, kind: str) -> str:
        return ", ".join(self.examples[kind])


def check_references(loaded: Loaded, store: Store, plan: Plan) -> list[str]:
    """What is said of the references of the rows that a plan samples. Raises UsageError for a grader that does not work, and where no row can
    be right.
    """
    from curate.measurements.grading import grader

    tasks = [t for step in plan.steps if step.reads == "sample" and step.missing for t in step.tasks]
    if loaded.recipe.kind != "sft" or not any(name in t.measurement.columns for t in tasks for name in GRADED):
        return []
    sampled = (rows for step in plan.steps if step.reads == "sample" for _, rows, _ in step.blocks)
    blocks = {id(rows): rows for rows in sampled}.values()  # checkpoints that miss the same rows share the lists
    row_ids = list(dict.fromkeys(row_id for rows in blocks for row_id in rows))
    needed = {want.need(text)[1] for want in plan.wanted for text in want.score.needs}
    chosen = grader(loaded.recipe.sampling.grader, folder=loaded.folder, named=named_rows(store, loaded))
    try:
        with kept_open(False):  # graders may be slow
            if not chosen.needs_answer:
                _try(chosen, store, row_ids)
            findings = _graded_by_themselves(chosen, store.iter_rows(row_ids))
    finally:
        chosen.close()
    return _say(findings, chosen, needed=bool(needed & set(GRADED)))


def _try(chosen: Grader, store: Store, row_ids: Sequence[str]) -> None:
    """A grader of the user's own on a few rows: on answers that are kept, on what the rows themselves say, and on what models say too."""
    tried = 0
    for row_id, row in zip(row_ids, store.iter_rows(row_ids), strict=True):
        if not isinstance(row, Example) or row.answer is None:
            continue
        for text in (solution_of(row) or row.answer, *_answers(store, row_id), *MADE):
            chosen.grade(text, row.answer, row)
        tried += 1
        if tried == TRIED:
            return


def _answers(store: Store, row_id: str) -> list[str]:
    """A few answers to a row that are kept, whatever they were sampled for."""
    texts = store.sql("SELECT text FROM data.samples WHERE row_id = ? AND text IS NOT NULL LIMIT 3", [row_id])
    return list(texts["text"])


def _graded_by_themselves(chosen: Grader, rows: Iterable[Row | None]) -> Findings:
    findings = Findings(named=chosen.named)
    started = time.monotonic()
    for row in rows:
        if time.monotonic() - started > PATIENCE:
            findings.stopped = True
            break
        if not isinstance(row, Example):
            continue
        findings.rows += 1
        solution = solution_of(row)
        if row.answer is None or not row.answer.strip():
            findings.add("none", row)
        elif not chosen.readable(row.answer, row):
            findings.add("unreadable", row)
        elif (
            chosen.needs_answer
            and not chosen.knows_itself(row.answer, row)
            and not (solution is not None and chosen.grade(solution, row.answer, row))
        ):
            findings.add("wrong", row)
        elif solution is not None and not chosen.grade(solution, row.answer, row):
            findings.add("solution", row)
    return findings


def solution_of(row: Example) -> str | None:
    """The text of a row's own completion."""
    if row.completion is None or row.label is False:
        return None
    return row.completion if isinstance(row.completion, str) else text_of(row.completion[-1])


def _say(findings: Findings, chosen: Grader, *, needed: bool) -> list[str]:
    n, counts = findings.rows, findings.counts
    of_rows = f"of the first {n:,} rows" if findings.stopped else f"of {n:,} rows"
    lost = {kind: counts.get(kind, 0) for kind in ("none", "unreadable", "wrong")}
    texts = {
        "none": "have no answer to compare with: they are sampled and not graded, their accuracy is NULL",
        "unreadable": f"have an answer that grader {chosen.name} cannot read: they are sampled and not graded, their accuracy is NULL",
        "wrong": f"have a reference that grader {chosen.name} grades wrong by itself: no answer to them can be right",
    }
    if needed and n and sum(lost.values()) == n:
        parts = "; ".join(f"{k:,} {texts[kind].split(':')[0]}" for kind, k in lost.items() if k)
        shown = (
            next(findings.examples_of(kind) for kind, k in lost.items() if k and kind != "none")
            if n > lost["none"]
            else ""
        )
        raise UsageError(
            f"No row can be graded, so nothing is sampled: {of_rows} {parts}{f' ({shown})' if shown else ''}. {CHANGE}"
        )
    notes = []
    for kind, k in lost.items():
        if k:
            examples = f" ({findings.examples_of(kind)})" if kind != "none" else ""
            notes.append(f"{k:,} {of_rows} {texts[kind]}{examples}. {CHANGE if kind != 'none' else ''}".strip())
    if k := counts.get("solution", 0):
        notes.append(
            f"{k:,} {of_rows} have a reference solution that is graded wrong by grader {chosen.name}: a model that answers as it does would be wrong "
            f"({findings.examples_of('solution')}). {CHANGE}"
        )
    return notes


def _short(text: str, width: int = 40) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= width else text[: width - 1] + "…")
