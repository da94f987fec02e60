"""Adam's second moments out of a trainer's saved optimizer (optimizer.pt of a transformers or TRL checkpoint), by parameter.

    v̂ = v / (1 − β₂^t)

The file numbers the parameters in the optimizer's order: of transformers' trainer first those with weight decay, then those without (biases, norms).
Names are found by that order and held against every shape.
"""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from curate.errors import ModelError
from curate.passes.direction import Vector
from curate.tokens import describe_folder, first_line

FILE = "optimizer.pt"
NO_DECAY = re.compile(
    r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"
)  # transformers' Trainer.get_decay_parameter_names


def _said(problem: Exception) -> str:
    """torch's advice on a file that is no pickle of tensors is to load it unsafely: not what is wrong, and not to be followed."""
    if isinstance(problem, UnpicklingError):
        return "It is not a file of tensors that torch.save wrote."
    return f"{type(problem).__name__}: {first_line(problem)}"


def second_moments(file: str | Path, module: nn.Module) -> Vector:
    """v̂ of every parameter that the optimizer holds, float32 on the CPU. ModelError where the file is no Adam of this model."""
    file = Path(file)
    try:
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        groups, state = saved["param_groups"], saved["state"]
    except Exception as problem:  # OSError, pickle's and zipfile's own, KeyError
        raise ModelError(
            f"{file}: wanted a trainer's saved optimizer ({FILE}), found {describe_folder(file)}.\n"
            f"  {_said(problem)}\n"
            "  Leave forecast.optimizer out: a short warm-up then gives Adam's state."
        ) from problem
    order = [index for group in groups for index in group["params"]]
    names = _names(groups, module, len(order))
    if names is None:
        raise ModelError(
            f"{file}: it holds {len(order)} parameters in {len(groups)} groups, not those of this model ({len(list(module.parameters()))})."
        )
    parameters = dict(module.named_parameters())
    betas = {index: group.get("betas", (0.9, 0.999)) for group in groups for index in group["params"]}
    found: Vector = {}
    for index, name in zip(order, names):
        own = state.get(index)
        if own is None:  # never had a gradient
            continue
        v = own.get("exp_avg_sq")
        if v is None or v.shape != parameters[name].shape:
            what = (
                f"keeps {', '.join(own)}"
                if v is None
                else f"has shape {tuple(v.shape)}, not {tuple(parameters[name].shape)}"
            )
            raise ModelError(
                f"{file}: wanted Adam's exp_avg_sq of {name}; it {what}. Only a plain AdamW's state can be read."
            )
        found[name] = v.float() / (1 - betas[index][1] ** float(own["step"]))
    return found


def _names(groups: list[dict[str, Any]], module: nn.Module, n: int) -> list[str] | None:
    """The parameters' names in the optimizer's order; None where they are not this model's."""
    if all("param_names" in group for group in groups):
        said = [str(name).removeprefix("module.") for group in groups for name in group["param_names"]]
        return said if set(said) <= dict(module.named_parameters()).keys() else None
    every = [name for name, _ in module.named_parameters()]
    trained = every if len(every) == n else [name for name in every if "lora_" in name]
    if len(trained) != n:
        return None
    if len(groups) == 1:
        return trained
    plain = {
        f"{prefix}.{name}"
        for prefix, part in module.named_modules()
        if isinstance(part, nn.LayerNorm)
        for name in ("weight", "bias")
    }
    without = {name for name in trained if name in plain or NO_DECAY.search(name.lower())}
    ordered = [name for name in trained if name not in without] + [name for name in trained if name in without]
    return ordered if len(groups) == 2 and len(groups[1]["params"]) == len(without) else None
