"""Rows as tokens, kept from pass to pass and from checkpoint to checkpoint: a row is encoded once for every tokenizer, template and limit.

What is kept is bounded: once LIMIT bytes of it are there, further rows are encoded each time that they are needed. Passes go through the rows in
the same order, so the first ones to come are the best to keep; the least recently used would always be the next one needed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

Found = TypeVar("Found")
LIMIT = 512 * 2**20
OVERHEAD = 600  # bytes of an encoded text beside its tokens


class Encodings:
    """Encoded rows, by how they are encoded and their ids. limit: bytes, about, of what is kept."""

    def __init__(self, limit: int = LIMIT):
        self.left = limit
        self._kept: dict[tuple[Hashable, str], Any] = {}

    def of(self, how: Hashable, row_id: str, encode: Callable[[], Found]) -> Found:
        """how: everything that decides the tokens beside the row itself."""
        key = (how, row_id)
        if key in self._kept:
            kept: Found = self._kept[key]
            return kept
        encoding = encode()
        size = _size(encoding)
        if size <= self.left:
            self.left -= size
            self._kept[key] = encoding
        return encoding


def _size(encoding: Any) -> int:
    """Bytes of an Encoded, an EncodedPair or PromptTokens, about."""
    if encoding is None:
        return OVERHEAD
    if hasattr(encoding, "chosen"):
        return _size(encoding.chosen) + _size(encoding.rejected)
    if isinstance(encoding.ids, np.ndarray):
        return OVERHEAD + int(encoding.ids.nbytes)
    return OVERHEAD + 36 * len(encoding.ids) + 4 * len(encoding.text)
