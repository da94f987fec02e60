"""Where a prompt leaves the model: the final state of its last token, the one that predicts the first token of a response.

    h_i = the state after the final norm at position start − 1       (rows, d)

What rows are like is told from these states (curate/jobs/collect/pick.py). They know the demo's eight kinds of problem apart: the base's nearest
neighbours are of the same kind four times in five.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from curate.passes.batch import Batch
from curate.passes.contract import Measurement
from curate.passes.forward import measure
from curate.passes.loading.adapter_config import tokenizer_folder
from curate.passes.loading.model import Model
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import Limits, encode
from curate.rows import Example, Pair


def prompt_states(
    model: Model, rows: Sequence[Example | Pair], *, limits: Limits = Limits(), token_budget: int = 16384
) -> np.ndarray:
    """(rows, d) float32: the state of each prompt's last token. The responses are not run.

    NaN where a prompt cannot be encoded or is cut by `limits`. Raises ModelError as `passes.forward.measure` does.
    """
    tokenizer = load_tokenizer(tokenizer_folder(model.path, model.base))
    encoded = [encode(Example(row.prompt, template_args=row.template_args), tokenizer, limits) for row in rows]
    out = np.full((len(rows), model.head.weight.shape[1]), np.nan, dtype=np.float32)

    def last_states(batch: Batch) -> dict[str, np.ndarray]:
        for at, row in enumerate(batch.rows):
            stop = len(batch.encoded[at].ids)  # type: ignore[union-attr]
            out[row] = batch.completion.states_of(at, stop - 1, stop)[0].float().cpu().numpy()
        return {}

    reading = Measurement("prompt_states", "forward", "sft", {}, 1, last_states, prompt_only=True)
    measure(model, encoded, [reading], token_budget=token_budget)
    return out
