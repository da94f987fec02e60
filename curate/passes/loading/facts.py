"""Facts of a model that its config and modules give, and the few tokens on which it is probed: model.py puts them together."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from curate.errors import ModelError

M_TRIM_THRESHOLD = -1  # glibc's name for it
KEPT = (
    192 << 20
)  # bytes of freed memory that stay with the process on a CPU; a batch of a small model takes 100 to 150 MB


def with_adapters(head: Any, name: str) -> torch.Tensor:
    """(V, d) weight of an LM head, with what PEFT's LoRA layers on it add in training: merged in float32. ModelError for DoRA's."""
    weight = head.weight.detach()
    factors = getattr(head, "lora_A", None)
    if factors is None or head.merged or head.disable_adapters:
        return weight
    active = [adapter for adapter in head.active_adapters if adapter in factors]
    if any(head.use_dora.get(adapter) for adapter in active):
        raise ModelError(
            f"{name}: DoRA on the LM head cannot be measured while it trains. Leave lm_head out of target_modules, or save checkpoints, merge "
            "them, and name their folder as models.checkpoints."
        )
    return sum((head.get_delta_weight(a).detach().float() for a in active), weight.float()).to(weight.dtype)


def keep_freed_memory() -> None:
    """Let the allocator reuse what a pass frees. glibc gives large blocks back to the system one by one and gets them back page by page, which
    is a tenth of a pass: blocks below 32 MB stay (the largest one freed so far sets that), KEPT in all.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
    with suppress(AttributeError):  # another allocator
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, KEPT)


REFUSED = "It cannot be measured in torch; sample it with vLLM, or open an issue naming the architecture."


def probe_ids(vocabulary: int) -> list[np.ndarray]:
    ids = np.random.default_rng(0).integers(0, vocabulary, 7 + 6 + 9 + 5).astype(np.int32)
    return np.split(ids, np.cumsum([7, 6, 9]))


def agree(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of one thing agree as well as the dtype allows, relative to the tensor's scale."""
    tolerance = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    ours, theirs = ours.double(), theirs.double()
    if not bool(torch.isfinite(theirs).all()):
        return True  # broken weights: nothing to compare, and the measurements will say NULL
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12)


def learned_positions(module: Any) -> int | None:
    """How many positions a model with a learned position table has; None for rotary and relative ones."""
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Embedding) and name.rsplit(".", 1)[-1] in (
            "wpe",
            "embed_positions",
            "position_embeddings",
        ):
            return part.num_embeddings - int(getattr(part, "offset", 0))
    return None


def rope_limit(config: Any) -> int | None:
    """Length above which rotary angles depend on the longest sequence of a batch (dynamic NTK, longrope): such rows
    run alone.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    if not any(r.get("rope_type") in ("dynamic", "longrope") for r in kinds):
        return None
    limits = [r.get("original_max_position_embeddings") for r in kinds]
    known = [limit for limit in (*limits, getattr(config, "original_max_position_embeddings", None)) if limit]
    return int(min(known)) if known else getattr(config, "max_position_embeddings", None)
