"""A training run as a path of straight segments between its checkpoints, and an orthonormal basis of the space it moved in.

    D = [θ_1 − θ_0, …, θ_K − θ_{K−1}]      (d, K−1) weight deltas
    DᵀD = U Λ Uᵀ                           Gram, in float64, summed tensor by tensor: never d × d
    B = D U Λ^(−1/2)                       orthonormal, by falling share of the path; BᵀD = Λ^(1/2) Uᵀ

Every delta lies in the span of B, so what is taken apart along B adds up again. Directions whose share of the path is rounding alone
(λ below 1e-10 of the largest: a checkpoint given twice) are left out.
Source: Kangaslahti et al. 2025, arXiv:2506.15872, takes Hessian eigenvectors in B's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.gradients.memory import free_for
from curate.passes.loading.adapter_config import is_adapter
from curate.passes.loading.model import Model

ROUNDING = 1e-10  # of the largest eigenvalue
COLUMNS = 1 << 20  # numbers of a delta that are in float64 at a time

Directions = dict[str, torch.Tensor]  # parameter's name -> (r, *its shape)


class Segments:
    """The path through some checkpoints' weights, walked with one model.

    basis: B, (r, *shape) per parameter, in the model's dtype and on its device. steps: (r, K−1) float64, ⟨b, θ_{t+1} − θ_t⟩. share: (r,) float64,
    each direction's part of Σ_t ‖θ_{t+1} − θ_t‖². gram: (K−1, K−1) float64.
    """

    def __init__(self, model: Model, paths: Sequence[str | Path]) -> None:
        """Reads every checkpoint once. ModelError where there are fewer than two, where all have the same weights, or where K + 2 copies of the
        weights do not fit into memory.
        """
        if len(paths) < 2:
            raise ModelError(
                f"the segments of a run: wanted two checkpoints or more, found {len(paths)}.\n"
                "  For the trainer, set save_strategy and save_steps; models.checkpoints takes a run's folder or a list."
            )
        self.model, self.paths = model, [str(path) for path in paths]
        if any(is_adapter(path) for path in paths):
            raise ModelError(
                f"{self.paths[0]}: the segments of a run are taken of whole models, found LoRA adapters.\n"
                "  Merge each into its base (`peft`: model.merge_and_unload(), then save), and name those folders."
            )
        self._parameters = dict(model.module.named_parameters())
        self._check_memory()
        deltas = self._deltas()
        self.gram = _gram(deltas)
        values, vectors = np.linalg.eigh(self.gram)
        kept = np.flatnonzero(values > ROUNDING * max(values[-1], 0.0))[::-1]
        if not len(kept) or values[-1] <= 0:
            raise ModelError(
                f"{len(paths)} checkpoints from {self.paths[0]} on have the same weights: there is no path."
            )
        mix = vectors[:, kept] / np.sqrt(values[kept])  # (K−1, r)
        self.steps = np.sqrt(values[kept])[:, None] * vectors[:, kept].T  # (r, K−1)
        self.share = values[kept] / values[kept].sum()
        self.basis: Directions = {name: _mixed(deltas.pop(name), mix) for name in list(deltas)}
        self._at: int | None = None
        self._start: dict[str, torch.Tensor] = {}
        self._stop: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths) - 1

    def checkpoint(self, k: int) -> None:
        """Put a checkpoint's own weights into the model."""
        self.model.use(self.paths[k])

    def put(self, segment: int, u: float) -> None:
        """Put θ_t + u(θ_{t+1} − θ_t) into the model."""
        if self._at != segment:
            self._start = self._read(segment) if self._at is None or self._at + 1 != segment else self._stop
            self._stop = self._read(segment + 1)
            self._at = segment
        with torch.no_grad():
            for name, p in self._parameters.items():
                torch.lerp(self._start[name], self._stop[name], u, out=p.data)

    def _read(self, k: int) -> dict[str, torch.Tensor]:
        self.checkpoint(k)
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _deltas(self) -> Directions:
        """(K−1, *shape) per parameter."""
        n = len(self)
        deltas = {
            name: torch.empty(n, *p.shape, dtype=p.dtype, device=p.device) for name, p in self._parameters.items()
        }
        before = self._read(0)
        for t in range(n):
            self.checkpoint(t + 1)
            for name, p in self._parameters.items():
                torch.sub(p.detach(), before[name], out=deltas[name][t])
                before[name].copy_(p.detach())
        return deltas

    def _check_memory(self) -> None:
        size = sum(p.numel() * p.element_size() for p in self._parameters.values())
        need, free = (len(self) + 3) * size, free_for(self.model)
        if need > free:
            raise ModelError(
                f"{self.paths[0]}: the directions of {len(self.paths)} checkpoints take {need / 1e9:.1f} GB ({len(self) + 3} copies of the weights), "
                f"{free / 1e9:.1f} GB are free on {self.model.device}.\n  Name fewer checkpoints in models.checkpoints."
            )


def _gram(deltas: Directions) -> np.ndarray:
    """(n, n) float64 inner products of the deltas."""
    total: np.ndarray | None = None
    for tensor in deltas.values():
        flat = tensor.reshape(len(tensor), -1)
        for i in range(0, flat.shape[1], COLUMNS):
            part = flat[:, i : i + COLUMNS].double()
            products = (part @ part.T).cpu().numpy()
            total = products if total is None else total + products
    assert total is not None
    if not np.isfinite(total).all():
        raise ModelError("the checkpoints' weights are not finite: there is no path between them.")
    return total


def _mixed(delta: torch.Tensor, mix: np.ndarray) -> torch.Tensor:
    """(n, *shape), (n, r) -> (r, *shape): the products in float64, a piece of the tensor at a time."""
    m = torch.from_numpy(np.ascontiguousarray(mix.T)).to(delta.device)
    flat = delta.reshape(len(delta), -1)
    out = delta.new_empty(len(m), flat.shape[1])
    for i in range(0, flat.shape[1], COLUMNS):
        out[:, i : i + COLUMNS] = (m @ flat[:, i : i + COLUMNS].double()).to(delta.dtype)
    return out.view(len(m), *delta.shape[1:])
