"""The completion after its nearest other training examples.

    neighbour_nll = −mean_t log π(y_t | solved neighbours, x, y_<t)      nats per token

The neighbours (at most three, passes/nearest.py) stand before the prompt as a few-shot prompt's examples do, the nearest last; of those
that do not fit into max_length the farthest are left out. NULL where none does.

Source: ICA, in-context approximation of the held-out loss; RHO-LOSS: Mindermann et al. 2022, arXiv:2206.07137.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.batch import Batch


@measurement(reads="neighbours", kind="sft", head=("logp",), columns={"neighbour_nll": "nats per token"})
def neighbours(batch: Batch) -> dict[str, torch.Tensor]:
    """Mean negative log-probability of the completion with its nearest neighbours before the prompt."""
    return {"neighbour_nll": -batch.completion.mean(batch.completion.logp)}
