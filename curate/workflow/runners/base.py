"""What every runner is: rows of one step in, columns out, with one engine open for a whole series of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.console import Progress
from curate.plan.embeddings import check_ids, embedding_rows
from curate.plan.step import Step
from curate.rows import Row
from curate.workflow.encodings import Encodings

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.plan.step import Task
    from curate.recipe.load import Loaded


TEXT = np.dtypes.StringDType(na_object=None)  # text even where all of it is NULL


class Runner:
    """One kind of pass with its engine. run() -> (columns, measurement -> samples a row or None, tokens it cost)."""

    reads = ""
    extra_columns: tuple[str, ...] = ()
    checkpoints: Sequence[Checkpoint] = ()  # all that are to come
    tasks: Sequence[Task] = ()  # what the rows of the next run() miss
    chat = False  # whether rows of plain text are rendered as messages
    embeddings: int | None = None  # rows of the embedding table
    starting = 0.0  # seconds of it that went into starting an engine

    def __init__(self, loaded: Loaded, progress: Progress):
        self.loaded, self.recipe, self.progress = loaded, loaded.recipe, progress
        self.encodings = Encodings()
        self._tokenizers: dict[str, Any] = {}
        self._tokenizer_id = ""

    def use(self, step: Step) -> None:
        """Get ready for a step's checkpoint."""
        self.tokenizer = self._tokenizer(step)
        self.chat = bool(step.tasks[0].measured.params.get("chat"))  # as its values are known
        counts_only = self.tokenizer is None or step.reads == "tokens"  # no model of ours is run on the ids
        self.embeddings = None if counts_only else embedding_rows(step.checkpoint)

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, list[Any]] | None, int]:
        raise AssertionError(self.reads)

    def notes(self) -> list[str]:
        return []

    def close(self) -> None:
        pass

    def _tokenizer(self, step: Step) -> Any:
        from curate.passes.tokenizer import load_tokenizer

        if not Path(step.checkpoint.home).is_dir():
            return None
        self._tokenizer_id = str(
            step.tasks[0].measured.params["tokenizer"]
        )  # checkpoints have the same one, most often
        if self._tokenizer_id not in self._tokenizers:
            self._tokenizers = {self._tokenizer_id: load_tokenizer(step.checkpoint.tokenizer)}
        return self._tokenizers[self._tokenizer_id]

    def _limits(self) -> Any:
        from curate.passes.tokens import Limits

        tokens = self.recipe.tokens
        return Limits(tokens.max_length, tokens.truncation, self.chat, tokens.turns)

    def _encode(self, rows: list[Row]) -> list[Any]:
        from curate.passes.tokens import encode

        limits = self._limits()
        how = (self._tokenizer_id, limits)
        encodings = [self.encodings.of(how, row.row_id, partial(encode, row, self.tokenizer, limits)) for row in rows]
        if self.embeddings is not None:
            check_ids(encodings, self.embeddings, self.tokenizer)
        return encodings
