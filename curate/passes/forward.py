"""The forward pass: rows in, one float64 column per measured number out. Everything that can be read off one pass is
read off it.

    rows -> items (the sequences to run) -> groups (shared prefix once) -> batches of at most `token_budget` tokens
         -> final states of every token -> head statistics at the positions that predict a response token ->
         measurements

Packed layout (passes/kernels/attention.py, passes/bundles.py): a pair costs one encoding of its prompt and one of each response; SFT rows that
share a prompt share it too. Padded layout: one sequence per line, sorted by length, padded on the right; for models
that the packed layout does not suit, and as its oracle. Neither layout changes a number by more than rounding, nor
does the order or the company of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.batch import Batch, write_columns
from curate.passes.bundles import (
    NO_LIMIT,
    Bundle,
    batch_rows,
    bundle_halves,
    bundle_rows,
    check_lengths,
    items_of,
    states_of,
)
from curate.passes.contract import Kind, Measurement
from curate.passes.halving import halving
from curate.passes.loading.model import Model, load_model
from curate.passes.tokens import Encoded, EncodedPair

__all__ = ["Model", "load_model", "measure", "response_logps", "tokens_to_run"]


def measure(
    model: Model,
    encoded: Sequence[Encoded | EncodedPair],
    measurements: Sequence[Measurement],
    *,
    token_budget: int = 16384,
) -> dict[str, np.ndarray]:
    """Run the model once over the rows and read off every measurement: {column: (len(encoded),) float64}, in the rows'
    order.

    NaN where a row has a `problem` (measurements of the prompt alone are taken of rows without a completion too), or is of
    another kind than the measurement. A row longer than `token_budget` runs
    alone; a batch that does not fit into memory is halved until it does. ModelError when a single row does not fit, or
    is longer than learned positions allow.
    """
    out = {column: np.full(len(encoded), np.nan) for m in measurements for column in m.columns}
    for kind, name in ((EncodedPair, "preference"), (Encoded, "sft")):
        requested = [m for m in measurements if m.kind in (name, "any")]
        rows = [i for i, row in enumerate(encoded) if isinstance(row, kind)]
        _measure_rows(model, encoded, [i for i in rows if encoded[i].problem is None], requested, token_budget, out)
        prompt_only = [i for i in rows if _is_prompt(encoded[i])]
        _measure_rows(model, encoded, prompt_only, [m for m in requested if m.prompt_only], token_budget, out)
    return out


def response_logps(model: Model, encoded: Sequence[Encoded | EncodedPair], *, token_budget: int = 16384) -> np.ndarray:
    """(rows, sides) float64: log π(y | x) in nats of every response, summed over its tokens; NaN where a row has a `problem`. The sides are chosen
    and rejected of pairs, the completion of SFT rows.
    """
    sides = ("chosen", "rejected") if any(isinstance(row, EncodedPair) for row in encoded) else ("completion",)

    def summed(batch: Batch) -> dict[str, torch.Tensor]:
        responses = {side: getattr(batch, side) for side in sides}
        return {side: response.sum(response.logp) for side, response in responses.items()}

    kind: Kind = "preference" if len(sides) == 2 else "sft"
    reading = Measurement("response_logps", "forward", kind, dict.fromkeys(sides, "nats"), 1, summed, head=("logp",))
    columns = measure(model, encoded, [reading], token_budget=token_budget)
    return np.stack([columns[side] for side in sides], 1)


def _measure_rows(
    model: Model,
    encoded: Sequence[Encoded | EncodedPair],
    indices: list[int],
    measurements: list[Measurement],
    token_budget: int,
    out: dict[str, np.ndarray],
) -> None:
    if not measurements or not indices:
        return
    alone = any(m.without_prompt for m in measurements)
    rows = {i: items_of(i, encoded[i], alone, model.bos) for i in indices}
    check_lengths(model, rows)

    @torch.inference_mode()
    def run(bundle: Bundle) -> None:
        states, where = states_of(model, bundle)
        encoded_rows = [encoded[row] for row in bundle.rows]
        batch = Batch(
            model.head,
            bundle.rows,
            encoded_rows,
            bundle.items,
            where,
            states,
            {s for m in measurements for s in m.head},
        )
        for m in measurements:
            write_columns(m, batch, out)

    def too_long(bundle: Bundle) -> ModelError:
        return ModelError(
            f"{model.path}: one row of {bundle.n_tokens} tokens does not fit into the memory of {model.device}.\n"
            "  Lower `tokens.max_length`, or use a smaller dtype."
        )

    halving(batch_rows(model, rows, token_budget), run, bundle_halves, too_long)


def _is_prompt(row: Encoded | EncodedPair) -> bool:
    """Whether a row has no completion but a whole prompt."""
    return isinstance(row, Encoded) and row.problem is not None and 0 < len(row.ids) == row.start and not row.truncated


def tokens_to_run(encoded: Sequence[Encoded | EncodedPair], *, without_prompt: bool = False) -> int:
    """How many tokens the packed pass puts through the model for these rows: what a plan's cost is reckoned from."""
    rows = {i: items_of(i, row, without_prompt, None) for i, row in enumerate(encoded) if row.problem is None}
    return sum(bundle.n_tokens for bundle in bundle_rows(rows, NO_LIMIT))
