"""Measuring a model while it is being trained, without a trace: what a pass changes is put back, and so are the random streams.

    with untouched(model) as module:        # module: the causal language model inside, adapters active
        with Model(module) as ...           # eval mode, no gradients

Training goes on as if nothing had happened: dropout, data order and gradients are those of a training without the measurement.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from curate.errors import UsageError

ROPE_STATE = (
    "inv_freq",
    "max_seq_len_cached",
)  # what dynamic rotary embeddings remember of the sequences that they saw


def measurable(model: Any) -> Any:
    """The causal language model inside a trainer's model: unwrapped from data parallelism and from PEFT, whose layers stay in place.

    UsageError where one process cannot run it alone (FSDP, ZeRO-3), or where the adapter is no part of the layers (prompt tuning).
    """
    while isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
        model = model.module
    sharded = any(hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in model.parameters())
    if sharded or "FullyShardedDataParallel" in type(model).__name__:
        raise UsageError(
            "The model's parameters are sharded over processes (FSDP or ZeRO-3), and the recorder runs on one of them alone. "
            "Save checkpoints instead (save_steps) and name their folder as models.checkpoints."
        )
    configs = getattr(model, "peft_config", None)
    if configs and hasattr(model, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
            raise UsageError(
                "Adapters that are prompts (prefix or prompt tuning) cannot be recorded: LoRA and its relatives can."
            )
        model = model.get_base_model()
    return model


@contextmanager
def untouched(model: Any) -> Iterator[Any]:
    """The measurable module, ready to be put into a `Model`; afterwards the model and all random streams are as they were."""
    module = measurable(model)
    modes = [(part, part.training) for part in module.modules()]
    grads = [(p, p.requires_grad) for p in module.parameters()]
    ropes = [
        (p, {k: getattr(p, k) for k in ROPE_STATE if hasattr(p, k)})
        for p in module.modules()
        if hasattr(p, "rope_type")
    ]
    streams = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (trainings use it)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    wrapped = module.__dict__.pop(
        "forward", None
    )  # mixed precision's autocast around forward: a saved checkpoint has none
    try:
        yield module
    finally:
        if wrapped is not None:
            module.forward = wrapped
        for part, training in modes:
            part.training = training
        for parameter, requires in grads:
            parameter.requires_grad_(requires)
        for part, known in ropes:
            for name, value in known.items():
                setattr(part, name, value)
        random.setstate(streams[0])
        np.random.set_state(streams[1])  # noqa: NPY002
        torch.set_rng_state(streams[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
