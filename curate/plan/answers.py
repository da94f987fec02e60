"""Sampled answers are kept: another grader, another threshold of it, or another number of samples asks no model for them again.

    an answer's identity = everything that its measurement's fingerprint covers, without the grader, the number of samples, and what tells its
                           thinking apart (of answers that were not told apart yet, or by the same tags)

A row's k-th answer has a seed of its own, of the row and of k. So of more answers than before only the further ones are drawn, independent of
those that are there; of fewer the first count; and a grader, which changes no answer, is read over what is kept. Answers to perturbations of a
row are kept the same way, those of one perturbation after those of the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curate.rows import content_id
from curate.store import Measured, Store

if TYPE_CHECKING:
    from curate.passes.sampling.types import Sample
    from curate.plan.step import Block, Task

NOT_OF_ANSWERS = ("grader", "samples", "thinking", "unfinished")


def answers_id(measured: Measured) -> str:
    """What the answers of a sampling measurement depend on: equal for records whose answers can stand for each other's."""
    params = {key: value for key, value in measured.params.items() if key not in NOT_OF_ANSWERS}
    settled = json.loads(json.dumps(params, default=str))  # as the store gives them back
    return content_id(measured.measurement, measured.model_fingerprint, measured.engine, settled)


@dataclass(frozen=True)
class Donor:
    """Where a row's answers are. n: how many there are, 0 where it is known that none can be drawn (no room after the prompt). each: how many
    to a prompt, which a row has one of or one a perturbation.
    """

    fingerprint: str
    n: int
    each: int

    def lacking(self, samples: int, *, greedy: bool) -> int:
        """How many answers to a prompt have to be drawn. Greedy ones are all the same."""
        return 0 if greedy or not self.n else max(samples - self.each, 0)


@dataclass(frozen=True)
class Need:
    """What a sampling step takes and what it draws. answers: kept ones that it takes. graded: rows that need no other. draws: at most so many."""

    answers: int
    graded: int
    draws: int


class KeptAnswers:
    """The answers of a store, found by what they depend on."""

    def __init__(self, store: Store):
        self.store = store
        self._samples_of: dict[str, dict[str, int]] = {}  # identity -> fingerprint -> samples asked for
        self._tags: dict[str, Any] = {}  # fingerprint -> the tags that its answers' thinking was told apart by
        for record in store.measured(reads="sample"):
            samples_of = self._samples_of.setdefault(answers_id(record), {})
            samples_of[record.fingerprint] = _most(record.params.get("samples"))
            self._tags[record.fingerprint] = record.params.get("thinking")

    def of(self, task: Task, row_ids: Sequence[str]) -> dict[str, Donor]:
        """row id -> where most of its answers are; rows without any are left out."""
        known = self._samples_of.get(answers_id(task.measured), {})
        alike = (None, task.measured.params.get("thinking"))
        others = {one: n for one, n in known.items() if one != task.fingerprint and self._tags[one] in alike}
        if not others or not row_ids:
            return {}
        donors: dict[str, Donor] = {}
        perturbed = task.measurement.perturbed
        for fingerprint, samples in sorted(others.items(), key=lambda item: item[1]):  # the most asked for wins
            for row_id, n in self.store.n_answers(fingerprint, row_ids).items():
                if not n and perturbed:
                    continue  # of a version that did not keep them
                if row_id not in donors or n >= donors[row_id].n:
                    donors[row_id] = Donor(fingerprint, n, samples if perturbed else n)
        return donors

    def take(self, task: Task, row_ids: Sequence[str]) -> list[list[Sample | None] | None]:
        """Every row's kept answers, in their order; None where there are none, [] where it is known that none can be drawn."""
        from curate.passes.sampling.types import Sample

        donors = self.of(task, row_ids)
        by_donor: dict[str, list[str]] = {}
        for row_id, donor in donors.items():
            by_donor.setdefault(donor.fingerprint, []).append(row_id)
        texts: dict[str, list[Sample | None]] = {}
        for fingerprint, ids in by_donor.items():
            for row_id, kept in zip(ids, self.store.samples(fingerprint, ids), strict=True):
                texts[row_id] = [
                    None
                    if s["text"] is None
                    else Sample(s["text"], s["n_tokens"], s["logp"], bool(s["finished"]), s["reasoning"])
                    for s in kept
                ]
        return [texts.get(row_id) for row_id in row_ids]

    def need(self, blocks: Sequence[Block], *, samples: int, greedy: bool) -> Need:
        """What a step of these blocks takes and draws. A row's perturbations count as one, how many there are is not known here."""
        rows: dict[str, list[str]] = {}
        tasks: dict[str, Task] = {}
        for _, row_ids, missed in blocks:
            for task in missed:
                tasks[task.fingerprint] = task
                rows.setdefault(task.fingerprint, []).extend(row_ids)
        answers = draws = 0
        to_draw: set[str] = set()
        for fingerprint, task in tasks.items():
            donors = self.of(task, rows[fingerprint])
            if not donors:
                draws += samples * len(rows[fingerprint])
                to_draw.update(rows[fingerprint])
                continue
            for row_id in rows[fingerprint]:
                donor = donors.get(row_id)
                lacking = samples if donor is None else donor.lacking(samples, greedy=greedy)
                draws += lacking
                if donor is not None and donor.n:
                    answers += donor.n * min(samples, donor.each) // donor.each
                if lacking:
                    to_draw.add(row_id)
        every = set().union(*rows.values())
        return Need(answers, len(every - to_draw), draws)


def _most(samples: Any) -> int:
    """How many samples a row of a measurement has at most: a number, or `from` and `to`."""
    return int((samples.get("to") if isinstance(samples, dict) else samples) or 0)


def by_prompt(kept: Sequence[Sample | None] | None, prompts: int) -> list[list[Sample] | None]:
    """A row's kept answers by its prompts (itself, or its perturbations); None for each where they are not of so many prompts."""
    if kept is None or not prompts or len(kept) % prompts:
        return [None] * prompts
    each = len(kept) // prompts
    return [[s for s in kept[i * each : (i + 1) * each] if s is not None] for i in range(prompts)]


def padded(answers: Sequence[Sequence[Any]], each: int) -> list[Any]:
    """The answers to a row's prompts in one list, as `by_prompt` reads it: `each` of every prompt, lines without a text where there are fewer."""
    return [one for own in answers for one in (*own, *[{}] * (each - len(own)))]
