"""Inner products of a row's own gradients: the empirical neural tangent kernel between its responses.

    g± = ∇_θ logp(y±)      entk_cc = ⟨g+, g+⟩   entk_cr = ⟨g+, g−⟩   entk_rr = ⟨g−, g−⟩      summed log-probabilities, all parameters
    loss_gradient = ‖∇_θ ℓ‖, ℓ the completion's mean loss per token                            SFT rows

Exact up to rounding (2e-7 of |g||g'| in float32); no gradient of a weight is ever held.

Source: Ren & Sutherland 2024, arXiv:2407.10490; Paul et al. 2021, arXiv:2107.07075 (GraNd).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.gradients.backward import GradientBatch


@measurement(
    reads="backward",
    kind="preference",
    columns={"entk_cc": "gradient²", "entk_cr": "gradient²", "entk_rr": "gradient²"},
)
def entk(batch: GradientBatch) -> dict[str, torch.Tensor]:
    """Inner products of the gradients of the two responses' log-probabilities."""
    return dict(zip(("entk_cc", "entk_cr", "entk_rr"), batch.products.unbind(1)))


@measurement(reads="backward", kind="sft", columns={"loss_gradient": "nats per token and unit of parameter"})
def loss_gradient(batch: GradientBatch) -> dict[str, torch.Tensor]:
    """Norm of the gradient of the completion's mean loss per token."""
    return {"loss_gradient": batch.products[:, 0].clamp_min(0).sqrt() / batch.completion.lengths}
