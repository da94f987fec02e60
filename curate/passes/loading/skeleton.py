"""A model's modules and parameters by name and shape, on torch's meta device: what can be checked before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import ModelError
from curate.passes.descriptions import describe_folder, first_line
from curate.passes.loading.adapter import Adapter, Factors
from curate.passes.loading.own_code import runs_own_code


@dataclass(frozen=True)
class Skeleton:
    """As much of a `Model` as names and shapes need. adapter: the LoRA adapter on it, or None."""

    path: str
    module: Any
    adapter: Adapter | None = None


def skeleton(path: str | Path, *, base: str | Path | None = None) -> Skeleton:
    """The model that `load_model` would give, without the values of its weights; of an adapter its factors are read.

    ModelError where the config cannot be read or the adapter is none of this base.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = base or path
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(str(whole), trust_remote_code=runs_own_code()),
                trust_remote_code=runs_own_code(),
            )
    except Exception as problem:  # OSError, ValueError, KeyError, and the model's own
        raise ModelError(
            f"{whole}: wanted a folder or hub id with a causal language model's config.json, found {describe_folder(whole)}.\n"
            f"  {type(problem).__name__}: {first_line(problem)}"
        ) from problem
    module.eval().requires_grad_(False)
    return Skeleton(str(path), module, Adapter(module, Factors(path, module)) if base else None)
