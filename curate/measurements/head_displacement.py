"""Residual CHES: the LM head's part of how a pair's two gradients meet.

    R± = onehot(y±) − π(·)   (T±, V)       H± the states that predict the response   (T±, d)
    head_cc = ‖R+ᵀH+‖²   head_cr = ⟨R+ᵀH+, R−ᵀH−⟩      exactly the LM-head part of K++ and of K+− (entk.py)

∂ log π(y) / ∂W = RᵀH for logits z = W h. With a scale s and a soft-cap c the residual is multiplied by s(1 − (z/c)²), as the chain rule
says; a bias adds its own part, ⟨Σ_t r, Σ_t r'⟩. CHES replaces every ⟨r, r'⟩ by 1.

Source: Razin et al. 2024, arXiv:2410.08847; Ren & Sutherland 2024, arXiv:2407.10490.
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
    head=("logp", "lse"),
    columns={"head_cc": "gradient²", "head_cr": "gradient²"},
)
def head_products(batch: Batch) -> dict[str, torch.Tensor]:
    """Inner products of the two responses' gradients with respect to the LM head; costs another sweep over the vocabulary."""
    from curate.passes.gradients.residuals import residual_products

    cc, cr = residual_products(batch.head, batch.chosen, batch.rejected)
    return {"head_cc": cc, "head_cr": cr}
