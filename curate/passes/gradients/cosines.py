"""Cosines of many rows' steps with M vectors in weight space, exactly: one backward for many rows, and no row's gradient is kept.

    cosine_im = ⟨P g_i, v_m⟩ / (‖P g_i‖ ‖v_m‖)        g = ∇_θ f        f of an SFT row: logp(completion); of a pair: its margin

P is a diagonal. Each weight's gradient of a row is computed block by block, multiplied by P and with the same block of all vectors, and freed
(passes/gradients/targets.py). A gradient's length depends on how many tokens a row has; a cosine does not.
Source: Xia et al. 2024, arXiv:2402.04333 (LESS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.gradients.backward import checked_rules
from curate.passes.gradients.layer_rules import Parameters
from curate.passes.gradients.memory import SHARE, free_for
from curate.passes.gradients.rows import parts_of, prepared, rows_of, take
from curate.passes.gradients.targets import Crossing, Targets
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair

Vector = dict[str, torch.Tensor]  # parameter's name -> tensor of its shape


class Cosines:
    """M vectors that rows' steps are compared with.

    vectors: what gives each, over the same parameters all; read one at a time and kept on the model's device, or, where they do not fit into half of
    its free memory, in blocks at every call, the rows run once per block. scale: P's diagonal over these parameters; None: 1. parameters: which
    these are, as in backward.measure, but a matrix that is embedding and head counts as a whole. ModelError where one has no rule, or not even one
    vector fits.
    """

    def __init__(
        self,
        model: Model,
        vectors: Sequence[Callable[[], Vector]],
        *,
        scale: Vector | None = None,
        parameters: Parameters = "all",
    ) -> None:
        module = model.module
        tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
        self.model, self.vectors = model, vectors
        self.parameters: Parameters = "all" if tied and isinstance(parameters, int) else parameters
        self.rules, _ = checked_rules(model, self.parameters)
        self.scale = None if scale is None else parts_of(model, self.rules, scale)
        size = sum(x.numel() for x in vectors[0]().values()) * max(4, torch.finfo(model.dtype).bits // 8)
        free = SHARE / 2 * free_for(model)
        self.together = int(free // size)
        if not self.together:
            raise ModelError(
                f"{model.path or type(module).__name__}: one target's gradient needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB may be taken on "
                f"{model.device}.\n  Take the gradients over fewer parameters: `--set gradients.parameters=lora`, or `=2` for the last two layers."
            )
        self._kept: tuple[Targets, torch.Tensor] | None = None

    def of(self, encoded: Sequence[Encoded | EncodedPair], *, token_budget: int = 16384) -> np.ndarray:
        """(rows, M) float64 in [−1, 1]; NaN where a row has a problem, and where a gradient is 0."""
        values = np.full((len(encoded), len(self.vectors)), np.nan)
        items = rows_of(encoded, "margin")
        if not items:
            return values
        numbered = dict(enumerate(items.values()))
        for start in range(0, len(self.vectors), self.together):
            targets, norms = self._block(start)
            crossing = Crossing(self.model.head, targets, len(items), self.scale)
            rules, memory, limit = prepared(self.model, items, self.parameters, token_budget)
            with torch.no_grad():
                take(self.model, rules, memory, numbered, limit, crossing)
                scale = crossing.squares.sqrt()[:, None] * norms  # (rows, block)
                cosines = torch.where(scale > 0, crossing.products / scale, torch.nan)
            values[list(items), start : start + targets.count] = cosines.cpu().numpy()
        return values

    def _block(self, start: int) -> tuple[Targets, torch.Tensor]:
        """The vectors from number `start` on, as many as fit into memory, and their norms, float64. Where all of them fit they are read only once."""
        if self._kept is not None:
            return self._kept
        some = self.vectors[start : start + self.together]
        parts = (parts_of(self.model, self.rules, read()) for read in some)
        targets = Targets.of(parts, len(some), self.model.device)
        block = targets, targets.squares().sqrt()
        if len(some) == len(self.vectors):
            self._kept = block
        return block
