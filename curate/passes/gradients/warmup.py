"""A short warm-up: a few dozen AdamW steps on the set itself, for Adam's state and for a model that training has begun to move.

    θ ← θ + η·m̂/(√v̂ + 1e-8)        m, v of the gradient of −loss: DPO's against the model it starts from, or the mean log-probability per token (SFT)

AdamW without weight decay, β = (0.9, 0.999), a constant rate. Batches go through the rows in an order that the seed fixes. It is no training run.

Source: Xia et al. 2024, arXiv:2402.04333 (LESS' warm-up).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes import forward
from curate.passes.gradients.mean import ADAM_EPSILON, Rows, Vector, accumulate, dpo_weights, token_mean_weights
from curate.passes.loading.model import Model
from curate.passes.tokens import EncodedPair

BETAS = 0.9, 0.999


@dataclass(frozen=True)
class WarmUp:
    """steps of `rows` rows each, at `learning_rate`. beta: DPO's, of pairs."""

    steps: int
    rows: int
    learning_rate: float
    beta: float
    seed: int = 0


def warm_up(
    model: Model,
    encoded: Rows,
    settings: WarmUp,
    *,
    token_budget: int = 16384,
    count: Callable[[int], object] = lambda n: None,
) -> Vector:
    """Train the model in place, and give Adam's v̂ at the end, float32 on the CPU. count: called with the number of rows of each step.

    ModelError where weights, gradient and Adam's state, four times the weights in float32, do not fit into memory, or do not stay finite.
    """
    known = [row for row in encoded if row.problem is None]
    pairs = any(isinstance(row, EncodedPair) for row in known)
    batches = _batches(len(known), settings)
    reference = np.full((len(known), 2), np.nan)
    if pairs:
        used = sorted({i for batch in batches for i in batch})
        reference[used] = forward.response_logps(model, [known[i] for i in used], token_budget=token_budget)
    parameters = dict(model.module.named_parameters())
    try:
        m, v = ({name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()} for _ in range(2))
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{model.path}: a warm-up takes four times the weights in float32, which do not fit into the memory of {model.device}.\n"
            "  Take scores at the reference (`at: reference`) with a step other than adam, or name a trainer's optimizer: forecast.optimizer."
        ) from None
    for t, batch in enumerate(batches, start=1):
        rows = [known[i] for i in batch]
        weigh = (
            dpo_weights(settings.beta, len(rows), reference[batch]) if pairs else token_mean_weights(rows, len(rows))
        )
        g = accumulate(model, rows, weigh, token_budget=token_budget)
        with torch.no_grad():
            for name, p in parameters.items():
                new = g[name].to(p.device, torch.float32)
                m[name].lerp_(new, 1 - BETAS[0])
                v[name].mul_(BETAS[1]).addcmul_(new, new, value=1 - BETAS[1])
                size = (v[name] / (1 - BETAS[1] ** t)).sqrt_().add_(ADAM_EPSILON)
                p.addcdiv_((m[name] / (1 - BETAS[0] ** t)).to(p.dtype), size.to(p.dtype), value=settings.learning_rate)
        count(len(rows))
    if not all(bool(x.isfinite().all()) for x in (*parameters.values(), *v.values())):
        raise ModelError(
            f"{model.path}: {settings.steps} steps of warm-up left the finite numbers. Lower `forecast.learning_rate` ({settings.learning_rate:g})."
        )
    return {name: (value / (1 - BETAS[1] ** len(batches))).cpu() for name, value in v.items()}


def _batches(n: int, settings: WarmUp) -> list[list[int]]:
    """The row indices of each step: every row comes once before any comes again."""
    rng = np.random.default_rng(settings.seed)
    size = min(settings.rows, n)
    order: list[int] = []
    while len(order) < settings.steps * size:
        order += rng.permutation(n).tolist()
    return [order[i * size : (i + 1) * size] for i in range(settings.steps)]
