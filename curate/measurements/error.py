"""How far the model's prediction is from the target, token by token, at one checkpoint.

    target_error = mean_t ‖π − onehot(y_t)‖₂                      EL2N of a token, in [0, √2]
    target_gap   = mean_t (z_{y_t} − largest other logit)         what AUM averages over checkpoints

Source: Paul et al. 2021, arXiv:2107.07075 (EL2N); Pleiss et al. 2020, arXiv:2001.10528 (AUM).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.batch import Batch


@measurement(
    reads="forward", kind="sft", head=("error", "gap"), columns={"target_error": "probability", "target_gap": "logits"}
)
def target_error(batch: Batch) -> dict[str, torch.Tensor]:
    """Mean norm of the prediction's error, and mean margin of the target's logit over the largest other one."""
    side = batch.completion
    return {"target_error": side.mean(side.error), "target_gap": side.mean(side.gap)}
