"""Fourteen numbers about a checkpoint's weights, from which the latent states of training runs are read.

    of every weight matrix (the mean over matrices is kept; more than two dimensions are folded into out × rest):
      l1 = Σ|w|, l2 = (Σw²)^½, l1_l2 = l1/l2, trace = Σ_i w_ii, spectral = σ_max, trace_spectral = trace/σ_max,
      singular_mean, singular_variance over its singular values
    of all weights and of all biases together: mean, median, variance                    (a bias is a tensor whose name ends in "bias")

Source: Hu et al. 2023, arXiv:2308.09543, which takes the same fourteen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.errors import ModelError

if TYPE_CHECKING:
    import torch

STATISTICS = (
    "l1",
    "l2",
    "l1_l2",
    "trace",
    "spectral",
    "trace_spectral",
    "singular_mean",
    "singular_variance",
    "weight_mean",
    "weight_median",
    "weight_variance",
    "bias_mean",
    "bias_median",
    "bias_variance",
)


def weight_statistics(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """(14,) float64 in the order of STATISTICS; NaN where there is nothing to take it of (a model without biases; a matrix of zeros only).

    Singular values come from the eigenvalues of the smaller Gram matrix in float64.
    """
    matrices: list[list[float]] = []
    weights: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        (biases if name.endswith("bias") else weights).append(tensor)
        if tensor.ndim > 1 and not name.endswith("bias"):
            matrices.append(_of_matrix(tensor.double().flatten(1)))
    with np.errstate(invalid="ignore"):
        first = np.mean(matrices, axis=0) if matrices else np.full(8, np.nan)
    return np.concatenate([first, _of_all(weights), _of_all(biases)])


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A model folder's tensors by name, as they are stored. ModelError where there are none that can be read."""
    return dict(_stored(folder))


def _of_matrix(w: torch.Tensor) -> list[float]:
    """The eight numbers of one (out, in) float64 matrix."""
    import torch

    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    l1, l2 = w.abs().sum().item(), w.norm().item()
    trace, largest = w.diagonal().sum().item(), singular.max().item()
    return [
        l1,
        l2,
        l1 / l2 if l2 else np.nan,
        trace,
        largest,
        trace / largest if largest else np.nan,
        singular.mean().item(),
        singular.var(correction=0).item(),
    ]


def _of_all(tensors: list[torch.Tensor]) -> list[float]:
    import torch

    if not tensors:
        return [np.nan] * 3
    values = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    mean = values.mean(dtype=torch.float64).item()
    variance = (values - mean).square_().mean(dtype=torch.float64).item()
    return [mean, float(np.median(values.numpy())), variance]  # torch's median takes the lower of two


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(f"{folder}: no weights (*.safetensors) in this folder; expected a checkpoint.")
    for file in files:
        try:
            yield from _read(file)
        except Exception as problem:  # safetensors and pickle raise errors of their own
            reason = (str(problem).splitlines() or [""])[0]
            raise ModelError(f"{file}: unreadable weights ({type(problem).__name__}: {reason}).") from problem


def _read(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".bin":
        import torch

        yield from torch.load(file, map_location="cpu", weights_only=True).items()
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            yield name, opened.get_tensor(name)
