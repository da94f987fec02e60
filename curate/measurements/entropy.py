"""How sure the model is along a response.

    entropy  = mean_t −Σ_v π(v) log π(v)        nats per token
    top_logp = mean_t max_v log π(v)            nats per token

Source: Ren & Sutherland 2024, arXiv:2407.10490 (the largest log-probability beside the response's own).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.batch import Batch


@measurement(
    reads="forward",
    kind="preference",
    head=("entropy", "top_logp"),
    columns={
        "chosen_entropy": "nats per token",
        "rejected_entropy": "nats per token",
        "chosen_top_logp": "nats per token",
        "rejected_top_logp": "nats per token",
    },
)
def entropy(batch: Batch) -> dict[str, torch.Tensor]:
    """Mean entropy and mean largest log-probability along the chosen and the rejected response."""
    chosen, rejected = batch.chosen, batch.rejected
    return {
        "chosen_entropy": chosen.mean(chosen.entropy),
        "rejected_entropy": rejected.mean(rejected.entropy),
        "chosen_top_logp": chosen.mean(chosen.top_logp),
        "rejected_top_logp": rejected.mean(rejected.top_logp),
    }


@measurement(
    reads="forward",
    kind="sft",
    head=("entropy", "top_logp"),
    columns={"target_entropy": "nats per token", "target_top_logp": "nats per token"},
)
def target_entropy(batch: Batch) -> dict[str, torch.Tensor]:
    """Mean entropy and mean largest log-probability along the completion."""
    side = batch.completion
    return {"target_entropy": side.mean(side.entropy), "target_top_logp": side.mean(side.top_logp)}
