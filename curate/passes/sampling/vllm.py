"""Sampling with vLLM, on a GPU or a CPU: one engine, in a child process, for a whole series of checkpoints.

- `use(path)` swaps a checkpoint's weights in place (0.03 s for 10M parameters) instead of starting a new engine; LoRA adapters of one base are
  exchanged as adapters, the base staying as it is.
- One `sample()` is one generate call, with the row's own seed; the n samples of a prompt share its prefix through the prefix cache.
- A sample's `logp` agrees with transformers' float32 log-softmax to 1e-5 a token.
- When memory is short the engine is started again with less (KV cache, sequences and tokens at a time) and the call is repeated; `notes`
  says each step. vllm_memory.py is the whole ladder.

Source: Kwon et al. 2023, arXiv:2309.06180 (vLLM); settings: measured on 2 cores, see `cpu_environment`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curate.errors import EngineError
from curate.passes.loading.adapter_config import (
    VLLM_RANKS,
    read_adapter_config,
    split_name,
    tensor_names,
    tokenizer_folder,
)
from curate.passes.loading.own_code import runs_own_code
from curate.passes.sampling.engines import (
    TORCHVISION_BROKEN,
    TORCHVISION_HINT,
    read_config,
    refusal,
    resolve_dtype,
    sampler_identity,
    target_device,
)
from curate.passes.sampling.process import ChildFailure, EngineProcess
from curate.passes.sampling.types import Prompt, Sample, Sampling, engine_seed, room
from curate.passes.sampling.vllm_memory import MEMORY_WORDS, Memory, first_memory, free_memory, less_memory
from curate.passes.tokenizer import context_length
from curate.recipe.bounds import read_object

START_TIMEOUT = 1800.0  # seconds; loading a large model from a slow disk takes its time
CALL_TIMEOUT = 900.0  # seconds, plus what the tokens of the call may take at worst:
SLOWEST = 20.0  # tokens per second, below which an engine counts as hung
UNBOUNDED = 8192  # context of a model whose config names none

# Fields of config.json that differ between checkpoints of one architecture
NOT_ARCHITECTURE = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "_attn_implementation",
}


def cpu_environment() -> dict[str, str]:
    """For the child only, on the CPU: start-up 5–9 s instead of 22–29 s, first generate 3 s instead of 14 s. The user's own settings win."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": str(max(cores // 2, 1)),  # two threads on two busy cores were ten times slower than one
    }
    return {name: os.environ.get(name, value) for name, value in settings.items()}


class VllmSampler:
    """A `Sampler` (see types.py) over one vLLM engine in a child process.

    base: the model that an adapter's folder (`model_path`) sits on. adapters: those that are to come; without them an engine that was opened on a
    whole model starts anew for the first of them. max_length: prompt + response tokens (None: the model's context, as far as
    the KV cache reaches). Raises EngineError when the engine
    cannot serve the model, cannot start, dies, or does not answer in time; the object is closed then.
    """

    name = "vllm"
    module = "curate.passes.sampling.vllm_worker"  # what the child runs

    def __init__(
        self,
        model_path: str | Path,
        *,
        base: str | Path | None = None,
        adapters: Sequence[str | Path] = (),
        dtype: str = "auto",
        device: str = "auto",
        max_length: int | None = None,
        seed: int = 0,
        call_timeout: float = CALL_TIMEOUT,
        memory: Memory | None = None,
    ):
        why_not = refusal(model_path, base=base, device=device)
        if why_not:
            raise EngineError(
                f"{model_path}: {why_not}. Sample with transformers instead: `--set engine.sampler=transformers`."
            )
        config = read_config(base or model_path)
        self.notes: list[str] = []
        self._device = target_device(device)
        self._dtype = resolve_dtype(dtype, self._device)
        self._path, self._adapter = _place(model_path, base)
        self._weights = self._path  # now in the engine that was opened on _path
        self._tokenizer = _absolute(tokenizer_folder(model_path, base))
        self._rank, self._layers = _reach(
            [*adapters, *([model_path] if base else [])]
        )  # of the adapters that the engine takes; 0: none
        self._seed, self._call_timeout = seed, call_timeout
        reach = context_length(base or model_path)
        self._max_model_len = min(filter(None, (max_length, reach)), default=UNBOUNDED)
        self._memory = memory or first_memory(
            config, device=self._device, dtype=self._dtype, max_model_len=self._max_model_len, free_bytes=free_memory()
        )
        self._process: EngineProcess | None = None
        self._open()
        self.engine = sampler_identity("vllm", model_path, base=base, dtype=dtype, device=device)[0]

    @property
    def pid(self) -> int | None:
        """The child's process id; None when closed."""
        return self._process.pid if self._process else None

    def sample(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        """n samples per prompt, in the prompts' order; an empty list where the prompt leaves no room in the context."""
        rooms = [room(len(prompt.ids), sampling.max_new_tokens, self.context) for prompt in prompts]
        fits = [row for row, tokens in enumerate(rooms) if tokens > 0 and prompts[row].ids]
        answer = self._call(
            "sample",
            tokens=sum(rooms[row] + len(prompts[row].ids) for row in fits) * sampling.n,
            ids=[list(map(int, prompts[row].ids)) for row in fits],
            seeds=[engine_seed(prompts[row].seed) + prompts[row].first for row in fits],
            max_tokens=[rooms[row] for row in fits],
            n=1 if sampling.temperature == 0 else sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(sampling.stop),
            **({"further": sampling.further} if sampling.further else {}),
            **({"shown": list(sampling.shown)} if sampling.shown else {}),
            **({"with_ids": True} if sampling.with_ids else {}),
        ) if fits else []  # fmt: skip
        samples: list[list[Sample]] = [[] for _ in prompts]
        for row, outputs in zip(fits, answer, strict=True):
            drawn = [
                Sample(text, n_tokens, logp, finished, ids=tuple(ids[0]) if ids else None)
                for text, n_tokens, logp, finished, *ids in outputs
            ]
            samples[row] = drawn * (sampling.n if sampling.temperature == 0 else 1)  # greedy: n times the same
        return samples

    def use(self, weights_path: str | Path, *, base: str | Path | None = None) -> None:
        """Another checkpoint's weights, or another adapter of the same base, in place; a new engine where that cannot be, which `notes` says."""
        path, adapter = _place(weights_path, base)
        why = self._why_anew(path, adapter) if self._process else ""
        if why is not None:
            if why:
                self.notes.append(f"{adapter or path}: {why}, so the engine was started anew.")
            self._close_process()
            self._rank, self._layers = _reach([adapter] if adapter else [], self._rank, self._layers)
            self._tokenizer = _absolute(tokenizer_folder(weights_path, base))
            self._path = self._weights = path
            self._adapter = adapter
            self._open()
            return
        if path != self._weights or not self._rank:
            self._call("use", tokens=0, path=path)
            self._weights = path
        if adapter != self._adapter:
            self._call("adapt", tokens=0, path=adapter)
            self._adapter = adapter

    def _why_anew(self, path: str, adapter: str | None) -> str | None:
        """Why the running engine cannot take these weights, None where it can."""
        if not _same_architecture(self._path, path):
            return "its config.json differs from the running model's"
        rank, layers = _reach([adapter] if adapter else [])
        if rank > self._rank or not layers <= self._layers:
            return f"it is a LoRA adapter of rank {rank} on {', '.join(sorted(layers))}, which the running engine was not opened for"
        if self._rank and path != self._path:  # vLLM's layers for adapters do not reload their base
            return "the running engine keeps adapters of another base"
        return None

    def close(self) -> None:
        self._close_process()

    def __enter__(self) -> VllmSampler:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> None:
        """Start the child, with less memory after each failure for want of it."""
        while True:
            environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights can be swapped in place only in-process
            if self._device == "cpu":
                environment |= cpu_environment()
                environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes, in whole GiB
            self._process = EngineProcess(
                self.module, environment=environment, label=f"The vLLM engine of {Path(self._path).name}"
            )
            try:
                about = self._process.call("open", timeout=START_TIMEOUT, **self._settings())
            except ChildFailure as failure:
                self._step_down(failure, during="open")
                continue
            self.context: int = about["max_model_len"]
            if self._adapter:
                self._call("adapt", tokens=0, path=self._adapter)
            return

    def _settings(self) -> dict[str, Any]:
        memory = self._memory
        settings: dict[str, Any] = {
            "model": self._path,
            "dtype": self._dtype,
            "seed": self._seed,
            "max_model_len": self._max_model_len,
            "max_num_seqs": memory.max_num_seqs,
            "max_num_batched_tokens": memory.max_num_batched_tokens,
            "enforce_eager": memory.eager or self._device == "cpu",
        }
        if runs_own_code():
            settings["trust_remote_code"] = True
        if self._tokenizer != self._path:
            settings["tokenizer"] = self._tokenizer
        if self._rank:
            most = next(rank for rank in VLLM_RANKS if rank >= self._rank)
            # Layers by name: an LM head that stands ready for adapters breaks prompt_logprobs of several rows (vLLM 0.32, CPU).
            lora = {
                "enable_lora": True,
                "max_lora_rank": most,
                "max_loras": 1,
                "lora_target_modules": sorted(self._layers),
            }
            settings |= lora
        if self._device == "cpu":
            # A prompt split over two steps kills a seeded request on the CPU (vLLM 0.32: "CPU Generator does not use offset"): never split.
            return {**settings, "kv_cache_memory_bytes": memory.kv_cache_bytes, "enable_chunked_prefill": False}
        return {**settings, "gpu_memory_utilization": memory.utilization}

    def _call(self, method: str, *, tokens: int, **arguments: Any) -> Any:
        while True:
            if not self._process:
                raise EngineError(f"The vLLM engine of {Path(self._path).name} is closed; open it again.")
            try:
                return self._process.call(method, timeout=self._call_timeout + tokens / SLOWEST, **arguments)
            except ChildFailure as failure:
                self._step_down(failure, during=method)
                self._open()
                if self._weights != self._path:
                    self._process.call("use", timeout=self._call_timeout, path=self._weights)
            except BaseException:
                self._close_process(patience=0)
                raise

    def _step_down(self, failure: ChildFailure, *, during: str) -> None:
        """Close the child; go one rung down the ladder, or raise what the user can do."""
        text = str(failure)
        tail = self._process._tail() if self._process else ""
        self._close_process(patience=0)
        where = "could not start" if during == "open" else f"failed during `{during}`"
        if TORCHVISION_BROKEN in text + tail:
            raise EngineError(f"vLLM {where}: {TORCHVISION_BROKEN}. Run: {TORCHVISION_HINT}") from failure
        if not MEMORY_WORDS.search(text):
            raise EngineError(
                f"vLLM {where} with {self._path}: {text}. Sample with transformers instead: `--set engine.sampler=transformers`.{tail}"
            ) from failure
        step = less_memory(self._memory, text)
        if step is None:
            raise EngineError(
                f"vLLM {where} for want of memory, with the least it can do with ({self._memory}): {text}. "
                "Lower `--set tokens.max_length=…`, free memory, or use `--set engine.sampler=transformers`."
            ) from failure
        self._memory, words = step
        self.notes.append(f"Memory was short (vLLM {where}): trying again with {words}.")

    def _close_process(self, *, patience: float = 10.0) -> None:
        if self._process:
            self._process.close(patience=patience) if patience else self._process.kill()
            self._process = None


def _place(path: str | Path, base: str | Path | None) -> tuple[str, str | None]:
    """(the whole model, the adapter on it or None), as absolute paths: the child runs in a working folder of its own."""
    return (_absolute(path), None) if base is None else (_absolute(base), _absolute(path))


def _reach(
    adapters: Sequence[str | Path], rank: int = 0, layers: frozenset[str] = frozenset()
) -> tuple[int, frozenset[str]]:
    """What an engine has to take for these adapters to run on it: the largest rank, and the names of all layers (q_proj, …) that any of them
    changes. rank, layers: what it takes already; the result covers that too. (0, no layers) where there are no adapters.
    """
    if not adapters:
        return 0, frozenset()
    named = {split_name(name)[0].rpartition(".")[2] for adapter in adapters for name in tensor_names(adapter)}
    return max(rank, *(read_adapter_config(adapter).rank for adapter in adapters)), layers | named


def _absolute(path: str | Path) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else str(path)  # else a hub id


def _same_architecture(one: str, other: str) -> bool:
    def essence(path: str) -> Any:
        file = Path(path) / "config.json"
        config = read_object(file) if file.is_file() else read_config(path).to_dict()
        return {name: value for name, value in config.items() if name not in NOT_ARCHITECTURE}

    return one == other or essence(one) == essence(other)
