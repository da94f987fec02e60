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
from zipfile import is_zipfile

import torch
from torch import nn

from curate.errors import ModelError
from curate.passes.descriptions import describe_folder, first_line
from curate.passes.gradients.layer_rules import Parameters, parameter_names
from curate.passes.gradients.mean import Vector, check_same
from curate.passes.loading.skeleton import skeleton

FILE = "optimizer.pt"
NEXT = "Name the model's own with forecast.optimizer, leave that out (a short warm-up then gives Adam's state), or take step: sgd."
NO_DECAY = re.compile(
    r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"
)  # transformers' Trainer.get_decay_parameter_names


def _reason(problem: Exception) -> str:
    """What is wrong with a file, for an error message. torch's own advice (load the file unsafely) is left out: it should not be followed."""
    if isinstance(problem, UnpicklingError):
        return "It is not a file of tensors that torch.save wrote."
    return f"{type(problem).__name__}: {first_line(problem)}"


def second_moments(file: str | Path, module: nn.Module) -> Vector:
    """{parameter: v̂, of its shape}, float32 on the CPU, for every parameter that the optimizer holds. ModelError where the file is not
    the state of an Adam optimizer of this model.
    """
    return {
        name: state["exp_avg_sq"].float() / (1 - beta ** float(state["step"]))
        for name, state, beta in _states(file, module)
    }


def check_moments(
    file: str | Path, path: str | Path, *, base: str | Path | None = None, parameters: Parameters = "all"
) -> None:
    """ModelError where `second_moments` would fail on this file, or where it shares no parameter with gradients over `parameters`. Checked before
    the model at `path` is loaded; no tensor of the file is read.
    """
    model = skeleton(path, base=base)
    held = [name for name, _, _ in _states(file, model.module)]
    check_same(held, parameter_names(model, parameters))


def _states(file: str | Path, module: nn.Module) -> list[tuple[str, dict[str, Any], float]]:
    """(parameter's name, Adam's state of it, β₂) of every parameter that ever had a gradient; tensors are read from the disk as they are used."""
    file = Path(file)
    try:
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        groups, state = saved["param_groups"], saved["state"]
        order = [(index, group) for group in groups for index in group["params"]]
        kept = sorted({key for own in state.values() for key in own})
    except Exception as problem:  # OSError, pickle's and zipfile's own, KeyError, TypeError, AttributeError
        raise ModelError(
            f"{file}: wanted a trainer's saved optimizer ({FILE}), found {describe_folder(file)}.\n"
            f"  {_reason(problem)}\n  {NEXT}"
        ) from problem
    if not {"exp_avg_sq", "step"} <= set(kept):
        what = (
            f"this one keeps {', '.join(kept)}"
            if kept
            else "this one keeps nothing, as plain SGD does and Adam before its first step"
        )
        raise ModelError(
            f"{file}: wanted Adam's state (exp_avg_sq and step of every trained parameter); {what}.\n"
            f"  Only a plain AdamW's state can be read. {NEXT}"
        )
    names = _names(groups, module, len(order))
    if names is None:
        raise ModelError(
            f"{file}: it holds {len(order)} parameters in {len(groups)} groups, not those of this model ({len(list(module.parameters()))}).\n  {NEXT}"
        )
    parameters = dict(module.named_parameters())
    states = []
    for (index, group), name in zip(order, names):
        own = state.get(index)
        if own is None:  # never had a gradient
            continue
        v, shape = own.get("exp_avg_sq"), tuple(parameters[name].shape)
        if v is None or "step" not in own or tuple(v.shape) != shape:
            wrong = f"it keeps {', '.join(own)}: only a plain AdamW's state can be read"
            if v is not None and tuple(v.shape) != shape:
                wrong = f"it has shape {tuple(v.shape)}, not {shape}: the optimizer of another model"
            raise ModelError(f"{file}: wanted Adam's exp_avg_sq of {name}; {wrong}.\n  {NEXT}")
        states.append((name, own, group.get("betas", (0.9, 0.999))[1]))
    return states


def _names(groups: list[dict[str, Any]], module: nn.Module, n: int) -> list[str] | None:
    """The parameters' names in the optimizer's order; None where they are not this model's."""
    if all("param_names" in group for group in groups):
        stored = [str(name).removeprefix("module.") for group in groups for name in group["param_names"]]
        return stored if set(stored) <= dict(module.named_parameters()).keys() else None
    every = [name for name, _ in module.named_parameters()]
    trained = every if len(every) == n else [name for name in every if "lora_" in name]
    if len(trained) != n:
        return None
    if len(groups) == 1:
        return trained
    in_norms = {
        f"{prefix}.{name}"
        for prefix, part in module.named_modules()
        if isinstance(part, nn.LayerNorm)
        for name in ("weight", "bias")
    }
    without = {name for name in trained if name in in_norms or NO_DECAY.search(name.lower())}
    ordered = [name for name in trained if name not in without] + [name for name in trained if name in without]
    return ordered if len(groups) == 2 and len(groups[1]["params"]) == len(without) else None
