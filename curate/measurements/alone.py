"""The completion without its prompt.

    alone_nll = −mean_t log π(y_t | y_<t)         nats per token, after BOS where the row begins with one

Without a BOS the first token has nothing to be predicted from and is left out of the mean.

Source: Li et al. 2023, arXiv:2308.12032 (the denominator of IFD).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.batch import Batch


@measurement(reads="forward", kind="sft", head=("logp",), without_prompt=True, columns={"alone_nll": "nats per token"})
def alone(batch: Batch) -> dict[str, torch.Tensor]:
    """Mean negative log-probability of the completion without its prompt; NULL where no token is left to predict."""
    side = batch.completion_alone
    return {"alone_nll": -side.mean(side.logp)}
