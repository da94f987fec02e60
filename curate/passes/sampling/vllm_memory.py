"""How much memory a vLLM engine is given, and what gives way when that is too much: pure functions of settings and error texts.

    KV cache of one sequence = 2 (keys, values) x layers x KV heads x head size x bytes of the dtype x tokens

A failure for want of memory goes one rung down: less KV cache or a smaller share of the GPU, fewer sequences and fewer tokens at a time.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curate.passes.sampling.vllm_facts import head_sizes

MIB = 1 << 20
MEMORY_WORDS = re.compile(
    r"out of memory|outofmemory|memoryerror|can't allocate memory|cannot allocate memory|not enough memory|insufficient memory"
    r"|free memory on device|available memory on node|no available memory|available kv cache memory|memory for the cache blocks",
    re.IGNORECASE,
)
WANTS_MORE_CACHE = re.compile(
    r"available kv cache memory|no available memory|memory for the cache blocks", re.IGNORECASE
)
FREE_ON_DEVICE = re.compile(r"free memory on device[^(]*\(([\d.]+)/([\d.]+) GiB\)", re.IGNORECASE)


@dataclass(frozen=True)
class Memory:
    """What an engine may take: the rungs of the ladder."""

    device: str  # "cpu" or "cuda"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    fewest_tokens: int = 256  # at a time; on the CPU the context, see _settings
    kv_cache_bytes: int = 0  # CPU
    kv_cache_floor: int = 0  # CPU: one sequence of full length
    utilization: float = 0.9  # GPU: share of its memory
    eager: bool = False  # GPU: no CUDA graphs


def less_memory(memory: Memory, failure: str) -> tuple[Memory, str] | None:
    """The next rung after a failure for want of memory, and what to say; None when nothing is left to give up."""
    sequences, tokens = max(memory.max_num_seqs // 2, 8), max(memory.max_num_batched_tokens // 2, memory.fewest_tokens)
    if memory.device == "cpu":
        cache = max(memory.kv_cache_bytes // 2, memory.kv_cache_floor)
        smaller = replace(memory, kv_cache_bytes=cache, max_num_seqs=sequences, max_num_batched_tokens=tokens)
        words = f"{cache // MIB} MiB of KV cache, {sequences} sequences and {tokens} tokens at a time"
        return (smaller, words) if smaller != memory else None
    free = FREE_ON_DEVICE.search(failure)
    if free:
        share = int(0.95 * 100 * float(free[1]) / float(free[2])) / 100
    elif WANTS_MORE_CACHE.search(
        failure
    ):  # the weights and the working memory left too little: the working memory gives way
        share = 0.95
    else:
        share = round(memory.utilization - 0.15, 2)
    if share < 0.1:
        return None
    smaller = replace(memory, utilization=share, eager=True, max_num_seqs=sequences, max_num_batched_tokens=tokens)
    words = f"{share:.0%} of the GPU's memory, no CUDA graphs, {sequences} sequences and {tokens} tokens at a time"
    return (smaller, words) if smaller != memory else None


def first_memory(config: Any, *, device: str, dtype: str, max_model_len: int, free_bytes: int) -> Memory:
    """Where the ladder starts. On the CPU: a KV cache for 256 sequences of full length, but at most 30% of the free memory."""
    if device != "cpu":
        return Memory(device="cuda")
    text = config.get_text_config()
    heads = int(getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None) or 1)
    size = (head_sizes(text) or [128])[0]
    width = {"float32": 4, "float64": 8}.get(dtype, 2)
    tokens = -(-(max_model_len + 1) // 128) * 128 + 256  # whole blocks, and the engine's own spare ones
    one = 2 * int(getattr(text, "num_hidden_layers", None) or 1) * heads * size * width * tokens
    floor = max(one, 16 * MIB)
    return Memory(
        device="cpu",
        kv_cache_bytes=max(min(256 * one, int(0.3 * free_bytes)), floor),
        kv_cache_floor=floor,
        max_num_batched_tokens=max(4096, max_model_len),
        fewest_tokens=max_model_len,
    )


def free_memory() -> int:
    """Bytes a process may still take: the kernel's estimate, or what the container leaves if that is less."""
    pages = (
        "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    )  # macOS knows the second only
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass  # another kernel: the first figure stands
    return max(free, 0)
