"""Squeezing: what pushing a rejected response down does to the rest of the distribution.

    valley_depth       = mean_t [max_v log π(v) − log π(y−_t)]
    squeezed_mass      = mean_t π*·(π* + π_{y−} − ‖π‖²)       π* the largest probability among tokens other than y−_t
    squeezed_vocabulary = mean_t share of the vocabulary with π_i < ‖π‖² − π_{y−}

Under a negative gradient on y− a token i ≠ y− rises to first order iff π_i > ‖π‖² − π_{y−}: the third is the share below that line.

Source: Ren & Sutherland 2024, arXiv:2407.10490, section 4 and appendix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.batch import Batch


@measurement(reads="forward", kind="preference", head=("logp", "top_logp"), columns={"valley_depth": "nats per token"})
def valley_depth(batch: Batch) -> dict[str, torch.Tensor]:
    """How far below the model's favourite tokens the rejected response lies."""
    side = batch.rejected
    return {"valley_depth": side.mean(side.top_logp - side.logp)}


@measurement(
    reads="forward", kind="preference", head=("logp", "other_logp", "square"), columns={"squeezed_mass": "probability²"}
)
def squeezed_mass(batch: Batch) -> dict[str, torch.Tensor]:
    """First-order rise of the strongest other token when the rejected response is pushed down."""
    side = batch.rejected
    best = side.other_logp.exp()
    return {"squeezed_mass": side.mean(best * (best + side.logp.exp() - side.square))}


@measurement(reads="forward", kind="preference", head=("below_line",), columns={"squeezed_vocabulary": "share"})
def squeezed_vocabulary(batch: Batch) -> dict[str, torch.Tensor]:
    """Share of the vocabulary that falls with the rejected response; costs a second sweep over the vocabulary."""
    return {"squeezed_vocabulary": batch.rejected.mean(batch.rejected.below_line)}
