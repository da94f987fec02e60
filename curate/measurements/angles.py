"""Angle concentration: how alike the directions of a prompt's final-layer token states are.

    cos = Û Ûᵀ                                         Û = unit final states of the prompt's tokens
    angle_intra = mean(cos[q0:q1, q0:q1])              within the question, as the paper sums it: i = j included
    angle_inter = mean(cos[rest, q0:q1])               between the rest of the prompt (system, template) and the question

The question is the last user message's text (plain prompts: all but BOS). Means of a cosine matrix are products of summed unit vectors,
so the matrix is never made. The released code slices rows twice and hard-codes the prefix; both are avoided here.

Source: GAIN-RL 2025, arXiv:2506.02281.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.batch import Batch


@measurement(reads="forward", kind="sft", prompt_only=True, columns={"angle_intra": "cosine", "angle_inter": "cosine"})
def angles(batch: Batch) -> dict[str, torch.Tensor]:
    """Mean cosines of prompt states; NULL without a question (intra), or where the prompt is nothing but the question (inter)."""
    import torch

    unknown = float("nan")
    intra, inter = [], []
    for row, encoded in enumerate(batch.encoded):
        low, high = encoded.question or (0, 0)  # type: ignore[union-attr]
        states = batch.completion.states_of(row, 0, encoded.start).double()  # type: ignore[union-attr]
        unit = states / states.norm(dim=1, keepdim=True).clamp_min(1e-300)
        n, rest = high - low, len(unit) - (high - low)
        question = unit[low:high].sum(0)
        others = unit.sum(0) - question
        intra.append(question @ question / n**2 if n else states.new_tensor(unknown))
        inter.append(question @ others / (n * rest) if n and rest else states.new_tensor(unknown))
    return {"angle_intra": torch.stack(intra), "angle_inter": torch.stack(inter)}
