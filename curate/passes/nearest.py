"""The nearest other training examples of a row, by the words of their prompts: BM25.

    score(q, d) = Σ_w n_q(w) · idf(w) · n_d(w)·(k1 + 1) / (n_d(w) + k1·(1 − b + b·|d|/mean |d|)),   idf(w) = ln(1 + (N − n(w) + ½)/(n(w) + ½))

k1 = 1.5, b = 0.75, words are runs of letters and digits in lower case. No model is needed, and the same rows have the same neighbours.
Source: Robertson & Zaragoza 2009, doi:10.1561/1500000019, with Lucene's idf (never negative).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from curate.rows import Example, Text, content_id, text_of

COUNT = 3  # neighbours put before a row
K1, B = 1.5, 0.75


def pool_fingerprint(row_ids: Sequence[str]) -> str:
    """What a row's neighbours depend on besides the row: the rows to choose from, and how."""
    return content_id("bm25", K1, B, COUNT, sorted(row_ids))


class Neighbours:
    """Rows to choose neighbours from, indexed once. Rows without a completion are none."""

    def __init__(self, row_ids: Sequence[str], rows: Sequence[Any]):
        known = [(i, row) for i, row in zip(row_ids, rows, strict=True) if isinstance(row, Example) and row.completion]
        known.sort(key=lambda pair: pair[0])  # of equally near ones the lower id, wherever it stands in the file
        self.row_ids = [row_id for row_id, _ in known]
        self.rows = [row for _, row in known]
        self._at = {row_id: i for i, row_id in enumerate(self.row_ids)}
        counts = [Counter(words(row.prompt)) for row in self.rows]
        lengths = np.array([sum(c.values()) for c in counts], dtype=np.float64)
        mean = lengths.mean() if len(lengths) and lengths.any() else 1.0
        occurrences: dict[str, tuple[list[int], list[int]]] = {}
        for i, of_row in enumerate(counts):
            for word, n in of_row.items():
                at, times = occurrences.setdefault(word, ([], []))
                at.append(i)
                times.append(n)
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, (at, times) in occurrences.items():
            where, often = np.array(at), np.array(times, dtype=np.float64)
            idf = np.log1p((len(counts) - len(at) + 0.5) / (len(at) + 0.5))
            self._weights[word] = where, idf * often * (K1 + 1) / (often + K1 * (1 - B + B * lengths[where] / mean))

    def nearest(self, row_id: str, row: Example, *, count: int = COUNT) -> list[Example]:
        """At most `count` other rows that share a word with the row's prompt, the nearest first."""
        score = np.zeros(len(self.rows))
        for word, n in Counter(words(row.prompt)).items():
            if word in self._weights:
                at, weight = self._weights[word]
                score[at] += n * weight
        if row_id in self._at:
            score[self._at[row_id]] = 0.0
        order = np.argsort(-score, kind="stable")[:count]
        return [self.rows[i] for i in order if score[i] > 0]


def words(prompt: Text) -> list[str]:
    """The words of a prompt; of messages the user's and the assistant's, since a system message is every row's."""
    text = prompt if isinstance(prompt, str) else "\n".join(text_of(m) for m in prompt if m["role"] != "system")
    return re.findall(r"\w+", text.lower())
