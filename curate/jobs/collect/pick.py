"""The next rows of a round: the ones of a pool that are like the hard rows, and nothing that is known already.

    like states          each hard row in turn takes the pool row nearest to it (cosine of the last prompt tokens' states, about the
                         pool's mean) that is still free, so that the new rows are spread as the hard ones are
    like group:COLUMN    a column's values as often as among the hard rows
    like module:function the user's own: (hard, pool, take, seed) -> indices of pool rows

Source of the idea: Kang et al. 2024, arXiv:2411.07681, Algorithm 1: collect from the distribution of the rows with a low
pre-memorization accuracy.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.rows import Example, Text, text_of

PoolFunction = Callable[[list[dict[str, Any]], list[dict[str, Any]], int, int], Iterable[int]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that may be trained on next, with the user's other columns."""

    row: Example
    columns: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """One object: prompt, completion, answer (left out where None), and the other columns."""
        texts = {"prompt": self.row.prompt, "completion": self.row.completion, "answer": self.row.answer}
        as_lists = {k: list(v) if isinstance(v, tuple) else v for k, v in texts.items() if v is not None}
        return {**self.columns, **as_lists}


def normalised(text: Text | None) -> str:
    """A text as near-duplicates share it: letters and digits only, without case, accents' forms, punctuation and runs of spaces."""
    if text is None:
        return ""
    joined = text if isinstance(text, str) else "\n".join(text_of(message) for message in text)
    joined = unicodedata.normalize("NFKC", joined).casefold()
    # signs that carry the meaning of a problem are words too: 3 - 2 is not 3 + 2
    return " ".join(re.findall(r"[^\W_]+|[-−+*/=<>^%]", joined))


class Known:
    """Rows that may not be collected again: by content id, and by a prompt that reads the same (`normalised`).

    Held-out rows belong here: training on them would make every number about them worthless.
    """

    def __init__(self, rows: Iterable[Example] = ()) -> None:
        self._ids: set[str] = set()
        self._prompts: set[str] = set()
        for row in rows:
            self.add(row)

    def add(self, row: Example) -> None:
        self._ids.add(row.row_id)
        self._prompts.add(normalised(row.prompt))

    def has_prompt(self, prompt: Text) -> bool:
        return normalised(prompt) in self._prompts

    def refusal(self, row: Example) -> str | None:
        """Why a row may not be collected, in words that follow a number; None where it may."""
        if row.completion is None or not normalised(row.completion):
            return "without a completion"
        if row.row_id in self._ids:
            return "known"
        return "with a known prompt" if self.has_prompt(row.prompt) else None


def fresh(candidates: Sequence[Candidate], known: Iterable[Example]) -> tuple[list[Candidate], dict[str, int]]:
    """The candidates that are new among the known rows and each other, in order, and why the others are not: {reason: how many}."""
    seen, kept = Known(known), []
    why: Counter[str] = Counter()
    for candidate in candidates:
        refused = seen.refusal(candidate.row)
        if refused:
            why[refused] += 1
        else:
            kept.append(candidate)
            seen.add(candidate.row)
    return kept, dict(+why)


def nearest(hard: np.ndarray, pool: np.ndarray, take: int, *, seed: int) -> list[int]:
    """Indices of `take` pool rows (fewer where there are not so many), each the nearest free one to the hard row whose turn it is.

    hard (H, d), pool (P, d): states; a row with NaN takes nobody and is taken by nobody. Cosine about the pool's mean. The hard rows'
    order is drawn from `seed`, anew in every turn of all of them.
    """
    hard, pool = (np.asarray(x, dtype=np.float64) for x in (hard, pool))
    here = np.flatnonzero(np.isfinite(pool).all(1))
    asking = hard[np.isfinite(hard).all(1)]
    if not len(here) or not len(asking):
        return []
    centre = pool[here].mean(0)
    asking, unit = _unit(asking - centre).astype(np.float32), _unit(pool[here] - centre).astype(np.float32)
    rng = np.random.default_rng(seed)
    free = np.ones(len(here), dtype=bool)
    taken: list[int] = []
    while len(taken) < min(take, len(here)):
        for h in rng.permutation(len(asking)):
            if len(taken) == min(take, len(here)):
                break
            likeness = np.where(free, unit @ asking[h], -np.inf)  # (P,)
            best = int(likeness.argmax())
            free[best] = False
            taken.append(int(here[best]))
    return taken


def by_group(hard: Sequence[Any], pool: Sequence[Any], take: int, *, seed: int) -> list[int]:
    """Indices of `take` pool rows whose groups are as frequent as among the hard rows; which of a group, is drawn from `seed`.

    What a group lacks is taken from the hard rows' other groups in their shares; fewer than `take` where all of them are used up.
    """
    rng = np.random.default_rng(seed)
    free: dict[Any, list[int]] = {}
    for at in rng.permutation(len(pool)):
        free.setdefault(pool[at], []).append(int(at))
    hard_counts = Counter(group for group in hard if group in free)
    given: Counter[Any] = Counter()
    taken: list[int] = []
    while len(taken) < take:
        open_groups = [group for group in hard_counts if free[group]]
        if not open_groups:
            break
        # the group that is furthest behind its share (Sainte-Laguë's rule), the first one among equals
        group = max(open_groups, key=lambda g: hard_counts[g] / (2 * given[g] + 1))
        taken.append(free[group].pop())
        given[group] += 1
    return taken


def by_function(
    function: PoolFunction, hard: Sequence[Candidate], pool: Sequence[Candidate], take: int, *, seed: int, name: str
) -> list[int]:
    """What a function of the user's own picks. UsageError where it returns anything but at most `take` different indices of the pool."""
    returned = function([row.to_dict() for row in hard], [row.to_dict() for row in pool], take, seed)
    try:
        picked = [int(at) for at in returned]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: wanted indices of pool rows, found {returned!r}.") from error
    wrong = [at for at in picked if not 0 <= at < len(pool)]
    if wrong or len(set(picked)) < len(picked) or len(picked) > take:
        what = f"{wrong[0]}" if wrong else f"{len(picked)} indices, {len(set(picked))} of them different"
        raise UsageError(f"{name}: wanted at most {take} different indices from 0 to {len(pool) - 1}, found {what}.")
    return picked


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30))
