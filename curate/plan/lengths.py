"""How many tokens rows have: counted where the tokens pass has been over them, else estimated from their characters.

    estimate    characters / (characters per token of SAMPLE rows, by the tokenizer's own tokenizer.json), cut as `tokens` says

A row that cannot be measured is told apart: the count says so, or, of an estimate, that truncation leaves nothing of its response.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.recipe.load import Loaded
    from curate.store import Store

CHARACTERS_PER_TOKEN = 3.6  # where there is no tokenizer to ask
SAMPLE = 64  # rows
EXCERPT = 4000  # characters of each


@dataclass(frozen=True)
class Lengths:
    """(rows,) tokens after truncation: of the prompt, of the prompt with all responses, with its longest one; and whether anything can be measured.

    row_ids: the rows, those with text. counted: (rows,) False where the numbers are estimates.
    """

    row_ids: list[str]
    prompt: np.ndarray
    whole: np.ndarray
    longest: np.ndarray
    measurable: np.ndarray
    counted: np.ndarray

    @cached_property
    def _at(self) -> dict[str, int]:
        return {row_id: i for i, row_id in enumerate(self.row_ids)}

    def indices(self, row_ids: Iterable[str]) -> np.ndarray:
        """(rows,) int: where these rows stand here."""
        return np.array([self._at[row_id] for row_id in row_ids], int)

    @property
    def about(self) -> str:
        """How a sentence about these lengths begins: empty, or that they are estimates."""
        return "" if self.counted.all() else "By their characters about "


class RowLengths:
    """The lengths of the rows of some sources, tokenizer by tokenizer. counts: fingerprint of a tokenizer -> of its token counts."""

    def __init__(self, loaded: Loaded, store: Store, sources: list[str], counts: Mapping[str, str]):
        self.kind, self.limits, self.store, self.sources = loaded.recipe.kind, loaded.recipe.tokens, store, sources
        self.counts = counts
        self._known: dict[str, Lengths] = {}

    def of(self, tokenizer: str, checkpoint: Checkpoint) -> Lengths:
        """tokenizer: its fingerprint. checkpoint: whose tokenizer it is."""
        if tokenizer not in self._known:
            self._known[tokenizer] = self._lengths(self.counts.get(tokenizer), Path(checkpoint.tokenizer))
        return self._known[tokenizer]

    def forget(self) -> None:
        """Lengths are read anew from here on: rows were counted meanwhile."""
        self._known.clear()

    def _lengths(self, counts: str | None, folder: Path) -> Lengths:
        texts = self.store.sql(
            "SELECT row_id, coalesce(length(prompt), 0) AS prompt, length(chosen) AS chosen, length(rejected) AS rejected, "
            "length(completion) AS completion FROM rows WHERE prompt IS NOT NULL AND kind = ? ORDER BY position",
            [self.kind],
            source=self.sources or None,
        )
        row_ids = texts["row_id"].to_list()
        sides = ("chosen", "rejected") if self.kind == "preference" else ("completion",)
        counted = np.zeros(len(row_ids), bool)
        columns: dict[str, np.ndarray] = {}
        problems = np.zeros(len(row_ids), bool)
        if counts is not None:
            columns = self.store.columns(counts, ["prompt_tokens", *(f"{side}_tokens" for side in sides)], row_ids)
            counted = ~np.isnan(columns["prompt_tokens"])
            problems = np.array([p is not None for p in self.store.texts(counts, "token_problem", row_ids)], bool)
        prompt = texts["prompt"].to_numpy().astype(float)
        responses = np.stack([texts[side].cast(float).to_numpy() for side in sides], 1)  # (rows, sides), NaN: none
        if not counted.all():
            per_token = characters_per_token(folder, self._sample())
            prompt, responses = prompt / per_token, responses / per_token
        prompt, responses, measurable = truncated(prompt, responses, self.limits.max_length, self.limits.truncation)
        if counted.any():
            own = np.stack([columns[f"{side}_tokens"] for side in sides], 1)
            prompt = np.where(counted, columns["prompt_tokens"], prompt)
            responses = np.where(counted[:, None], own, responses)
            measurable = np.where(counted, ~problems, measurable)
        return Lengths(
            row_ids, prompt, prompt + responses.sum(1), prompt + responses.max(1, initial=0), measurable, counted
        )

    def _sample(self) -> list[str]:
        texts = self.store.sql(
            f"SELECT concat(prompt, chosen, rejected, completion)[:{EXCERPT}] AS text FROM rows WHERE prompt IS NOT NULL AND kind = ? "
            f"ORDER BY row_id LIMIT {SAMPLE}",
            [self.kind],
            source=self.sources or None,
        )
        return texts["text"].to_list()


def truncated(
    prompt: np.ndarray, responses: np.ndarray, limit: int | None, policy: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `max_length` leaves of (rows,) and (rows, sides) tokens, 0 for a missing response, and (rows,) whether the row can be measured."""
    measurable = ~np.isnan(responses).any(1)
    responses = np.nan_to_num(responses)
    if limit is None:
        return prompt, responses, measurable
    fits = prompt + responses.max(1, initial=0) <= limit
    if policy == "keep_end":
        responses = np.minimum(responses, limit)
        return np.minimum(prompt, limit - responses.max(1, initial=0)), responses, measurable
    measurable &= fits if policy == "drop" else prompt < limit
    return np.minimum(prompt, limit), np.minimum(responses, np.maximum(limit - prompt, 0)[:, None]), measurable


def characters_per_token(folder: Path, texts: Sequence[str]) -> float:
    """Of these texts, by the tokenizer.json of a folder; CHARACTERS_PER_TOKEN where there is none, or nothing to count."""
    from tokenizers import Tokenizer

    try:
        tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises nothing narrower; whoever needs the tokenizer says what is wrong with it
        return CHARACTERS_PER_TOKEN
    tokenizer.no_truncation()
    tokenizer.no_padding()
    n = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False))
    return sum(map(len, texts)) / n if n else CHARACTERS_PER_TOKEN
