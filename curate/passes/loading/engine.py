"""What a model runs on: its device, its dtype, and the name of both that fingerprints hold."""

from __future__ import annotations

import torch

from curate.errors import ModelError
from curate.passes.descriptions import first_line
from curate.passes.kernels.cpu_products import NARROW

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
BETWEEN = "float32-between"  # in an engine's name: float32 between narrow products


def find_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as problem:
        raise ModelError(
            f"engine.device: wanted {device}, which this machine does not have ({first_line(problem)}).\n"
            "  Leave it at auto, or see `curate doctor`."
        ) from problem


def find_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"engine.dtype: wanted auto or one of {', '.join(DTYPES)}, found {dtype!r}.")
    return DTYPES[dtype]


def engine_identity(*, dtype: str = "auto", device: str = "auto") -> str:
    """What would run, before anything is loaded: "torch 2.13.0 cpu float32". The layout is left out: it changes no number beyond rounding.
    "cpu bfloat16 float32-between": passes/kernels/cpu_products.py, where the model takes it.
    """
    chosen = find_device(device)
    kind = find_dtype(dtype, chosen)
    between = f" {BETWEEN}" if chosen.type == "cpu" and kind in NARROW else ""
    return f"torch {torch.__version__.split('+')[0]} {chosen.type} {str(kind).removeprefix('torch.')}{between}"
