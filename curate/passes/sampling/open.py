"""A sampling engine, started: vLLM, a server that speaks OpenAI's protocol, or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curate.passes.sampling.engines import choose_sampler
from curate.passes.sampling.types import Sampler


def open_sampler(
    which: str,
    model_path: str | Path | None,
    *,
    base: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    dtype: str = "auto",
    device: str = "auto",
    max_length: int | None = None,
    seed: int = 0,
    server: dict[str, Any] | None = None,
    expected: Any = None,
) -> Sampler:
    """The engine, started. `max_length` caps prompt + response tokens (None: the model's context); `server` is the recipe's section.

    expected: of a server, which model answers must come from (openai.py).

    base: where `model_path` is a LoRA adapter's folder, the model it sits on. adapters: those that are to come.
    Raises EngineError when the engine cannot start or cannot serve this model, ModelError when the model cannot be read.
    """
    name, _ = choose_sampler(which, model_path, base=base, device=device)
    if name == "openai":
        from curate.passes.sampling.openai import OpenAISampler

        return OpenAISampler(server or {}, max_length=max_length, expected=expected)
    assert model_path is not None
    if name == "vllm":
        from curate.passes.sampling.vllm import VllmSampler

        return VllmSampler(
            model_path, base=base, adapters=adapters, dtype=dtype, device=device, max_length=max_length, seed=seed
        )
    from curate.passes.sampling.hf import HfSampler

    return HfSampler(model_path, base=base, dtype=dtype, device=device, max_length=max_length)
