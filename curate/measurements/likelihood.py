"""Log-probabilities of responses.

    logp(y) = Σ_t log π(y_t | x, y_<t)        nats, summed over the response tokens, EOS included
    target_nll = −logp(y) / T                 nats per token

Source: Chen et al. 2024, arXiv:2405.19534 (pairs); Kang et al. 2024, arXiv:2411.07681 (targets). Equal to TRL's
reference log-probs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.batch import Batch


@measurement(
    reads="forward", kind="preference", head=("logp",), columns={"chosen_logp": "nats", "rejected_logp": "nats"}
)
def likelihood(batch: Batch) -> dict[str, torch.Tensor]:
    """Summed log-probability of the chosen and of the rejected response."""
    return {
        "chosen_logp": batch.chosen.sum(batch.chosen.logp),
        "rejected_logp": batch.rejected.sum(batch.rejected.logp),
    }


@measurement(
    reads="forward", kind="sft", head=("logp",), columns={"target_logp": "nats", "target_nll": "nats per token"}
)
def target_likelihood(batch: Batch) -> dict[str, torch.Tensor]:
    """Summed log-probability of the completion, and its mean negative per token."""
    total = batch.completion.sum(batch.completion.logp)
    return {"target_logp": total, "target_nll": -total / batch.completion.lengths}
