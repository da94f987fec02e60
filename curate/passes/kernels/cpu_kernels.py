"""Operators that torch has no fast form of on a CPU, in C (cpu_kernels.c), compiled where they run: about a second, once a machine.

    attend      attention of a whole packed row in one call. torch's kernel multiplies with MKL in tiles of 32 queries and computes much of what
                a causal mask hides: more than twice as long (benchmarks/forward.py --only kernels)
    head_sums   maximum, Σ e^z, Σ e^2z, Σ z e^z, rank and best token of a block of logits, read twice: torch takes six sweeps and writes three
    rms_norm, rotate, silu_times    in one sweep; passes/kernels/cpu_sweeps.py puts them into models

Without a C compiler (CC, cc, gcc or clang) or AVX2, and for whatever these do not serve, torch's own operators run: slower, the same numbers to
rounding. `curate doctor` says which. Each kind of attention is compared with the loop of passes/kernels/attention_loop.py on the spot before its
first use, norms, angles and gates with the model's own, the sums with torch's when they are loaded. CURATE_CPU_KERNELS=0 leaves them out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from curate.passes.files import write_atomically

if TYPE_CHECKING:
    from curate.passes.layout import Layout

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC"]
LIMIT_S = 120  # for the compiler


class Refused(Exception):
    """Why there are no kernels here."""


class Kernels:
    """The compiled operators. All tensors are float32 on the CPU. width: numbers in a vector."""

    def __init__(self, library: ctypes.CDLL) -> None:
        address, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
        self.width = integer.in_dll(library, "width").value  # the compiler's, which may use more than torch does
        names = "packed_attention", "head_sums", "rms_norm", "rotate", "silu_times"
        self._attention, self._sums, self._norm, self._rotate, self._gate = (getattr(library, name) for name in names)
        shape = [integer] * 4
        self._attention.argtypes = [*[address] * 5, *shape, number, address, integer, address, integer]
        self._sums.argtypes = [address, *[ctypes.c_int64] * 4, number, *[address] * 8, integer]
        self._norm.argtypes = [*[address] * 3, *[ctypes.c_int64] * 2, number, integer]
        self._rotate.argtypes = [*[address] * 4, *[ctypes.c_int64] * 5, integer]
        self._gate.argtypes = [address, address, ctypes.c_int64, integer]
        self._sums.restype = self._norm.restype = self._rotate.restype = self._gate.restype = None

    def attend(
        self,
        query: torch.Tensor,  # (1, heads, N, d)
        key: torch.Tensor,  # (1, kv heads, N, d)
        value: torch.Tensor,  # (1, kv heads, N, dv), dv whole vectors
        stretches: torch.Tensor,  # (n, 4) int64: first own token, how many, first token of its prefix, how many
        low: torch.Tensor | None,  # (longest,) int64: the lowest position that each position sees
        scaling: float,
    ) -> torch.Tensor:
        """(1, N, heads, dv). MemoryError where there is no room for one stretch's keys."""
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        heads, n, d = query.shape[1:]
        out = torch.empty(1, n, heads, value.shape[3])
        steps = np.array([x.stride(i) for x in (query, key, value) for i in (2, 1)], np.int64)
        failed = self._attention(
            *(x.data_ptr() for x in (query, key, value, out)),
            steps.ctypes.data,
            *(heads, key.shape[1], d, value.shape[3]),
            scaling,
            stretches.data_ptr(),
            len(stretches),
            None if low is None else low.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"attention over {n} tokens: no memory for the keys of one sequence")
        return out

    def head_sums(
        self,
        z: torch.Tensor,  # (n, width) logits; each row's own token is put to `nothing`
        start: int,  # the block's first token
        nothing: float,
        tokens: torch.Tensor,  # (n,) int64
        own: torch.Tensor,  # (n,) float64 logit of each row's own token
        sums: dict[str, torch.Tensor],
    ) -> None:
        """Add a block of the vocabulary to the running `sums`, (n,) float64 each: best, total, square, weighted, and where they are there rank
        and best_token (int64).
        """
        tokens = tokens.contiguous()  # named, or it would be gone before the call
        best = [sums[name].data_ptr() for name in ("best", "total", "square", "weighted")]
        rest = [sums[name].data_ptr() if name in sums else None for name in ("rank", "best_token")]
        shape = *z.shape, z.stride(0)
        self._sums(
            z.data_ptr(),
            *shape,
            start,
            nothing,
            tokens.data_ptr(),
            own.data_ptr(),
            *best,
            *rest,
            torch.get_num_threads(),
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """(…, d) contiguous, (d,) -> x / √(mean x² + eps) ∘ weight, (…, d)."""
        out, d = torch.empty_like(x), len(weight)
        self._norm(*(a.data_ptr() for a in (x, out, weight)), x.numel() // d, d, eps, torch.get_num_threads())
        return out

    def silu_times(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a ← silu(a) ∘ b, both contiguous and of one shape."""
        self._gate(a.data_ptr(), b.data_ptr(), a.numel(), torch.get_num_threads())
        return a

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(1, heads, n, d), angles (1, n, d) contiguous -> x cos + (−x₂, x₁) sin, (1, heads, n, d) laid out as (n, heads, d)."""
        heads, n, d = x.shape[1:]
        out = torch.empty(1, n, heads, d)
        steps = x.stride(2), x.stride(1)
        self._rotate(*(a.data_ptr() for a in (x, out, cos, sin)), n, heads, d, *steps, torch.get_num_threads())
        return out.transpose(1, 2)


def stretches_of(layout: Layout) -> torch.Tensor:
    """(n, 4) int64, a line for each branch of a packed row: its first token, how many it has, the first token of its prefix, how many that has. A
    group's prefix and first branch count as one branch without a prefix.
    """
    stretches = []
    for offset, p, branches in layout.segments:
        at = offset + p + branches[0]
        stretches.append((offset, p + branches[0], 0, 0))
        for n in branches[1:]:
            stretches.append((at, n, offset, p))
            at += n
    return torch.tensor([row for row in stretches if row[1]], dtype=torch.int64).reshape(-1, 4)


def serves(device: torch.device | str) -> bool:
    """Whether packed rows on this device run through the kernel."""
    return torch.device(device).type == "cpu" and kernels() is not None


def refuses(query: torch.Tensor, value: torch.Tensor, softcap: bool, sinks: bool) -> str | None:
    """Why this attention cannot run here whatever the mask; None when it may."""
    compiled = kernels()
    if compiled is None:
        return refusal()
    if softcap or sinks:
        return "a soft-cap" if softcap else "attention sinks"
    if query.dtype != torch.float32:
        return str(query.dtype).removeprefix("torch.")
    if value.shape[-1] % compiled.width:
        return f"a head's {value.shape[-1]} values are no whole vectors of {compiled.width}"
    return None


def kernels() -> Kernels | None:
    """The compiled operators; None where there are none, and `refusal` says why."""
    return None if isinstance(loaded := _load(), Refused) else loaded


def refusal() -> str | None:
    """Why there are no kernels on this machine; None where there are."""
    return str(loaded) if isinstance(loaded := _load(), Refused) else None


@cache
def _load() -> Kernels | Refused:
    """Compile the operators, or take them from the cache, load and try them, once a process."""
    try:
        if os.environ.get("CURATE_CPU_KERNELS") == "0":
            raise Refused("CURATE_CPU_KERNELS=0")
        if os.name != "posix":
            raise Refused(f"not tried on {platform.system()}")
        kind = torch.backends.cpu.get_cpu_capability()
        if kind not in ("AVX2", "AVX512"):
            raise Refused(f"no AVX2 or AVX-512 (torch says {kind})")
        loaded = Kernels(ctypes.CDLL(str(_library(_compiler()))))
        if not _adds_up(loaded):
            raise Refused("the compiled sums differ from torch's")
        return loaded
    except Refused as reason:
        return reason
    except OSError as problem:
        return Refused(f"the compiled kernels cannot be loaded: {problem}")


def _adds_up(kernels: Kernels) -> bool:
    """Whether `head_sums` gives torch's numbers, over two blocks. The other operators are tried where they are used."""
    z = torch.randn(3, 90, generator=torch.Generator().manual_seed(0)) * 4
    tokens = torch.tensor([0, 50, 89])
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("total", "square", "weighted")}
    sums["best"] = torch.full((3,), -1e37, dtype=torch.float64)
    others = z.double().scatter(1, tokens[:, None], -1e37)
    for start in (0, 45):
        kernels.head_sums(z[:, start : start + 45].clone(), start, -1e37, tokens, torch.zeros(3).double(), sums)
    best = others.amax(1)
    x = others - best[:, None]
    e = x.exp()
    expected = {"best": best, "total": e.sum(1), "square": (e * e).sum(1), "weighted": (x * e).sum(1)}
    return all(torch.allclose(sums[name], numbers, rtol=1e-5, atol=1e-6) for name, numbers in expected.items())


def _compiler() -> str:
    """The path of a C compiler. Refused where there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise Refused("no C compiler (install gcc or clang, or set CC)")


def _library(compiler: str) -> Path:
    """The compiled library, from the user's cache or compiled into it; its name holds a hash of all that it depends on. Refused without a folder."""
    version = _run([compiler, "--version"])
    about = "\n".join([SOURCE.read_text(), *FLAGS, compiler, version, _processor(), torch.__version__])
    name = f"cpu_kernels-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    for place in (_cache, _temporary):
        try:
            folder = place()
            path = folder / name
            if not path.exists():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _compile(compiler, path, openmp="clang" not in version)
            if all(part.stat().st_uid == os.getuid() for part in (folder, path)):  # nobody else's code is loaded
                return path
        except (OSError, RuntimeError):  # a home that cannot be written to; none at all
            continue
    raise Refused("neither the cache folder nor the temporary folder can be written to")


def _compile(compiler: str, to: Path, *, openmp: bool = True) -> None:
    """Compile the library. It is moved into place whole and synced: half a file, after a power cut too, would crash whoever loads it.

    openmp: in several threads (clang's own OpenMP is not torch's).
    """
    with tempfile.TemporaryDirectory(dir=to.parent) as folder, write_atomically(to, sync=True) as library:
        code = f"{folder}/kernels.o"
        # linked without -fopenmp: torch's own OpenMP, which is loaded already, shall be the only one
        _run([compiler, *FLAGS, *(["-fopenmp"] if openmp else []), "-c", str(SOURCE), "-o", code])
        _run([compiler, "-shared", code, "-o", str(library), "-lm"])


def _run(command: list[str]) -> str:
    """A command's output. Refused where it fails or takes longer than LIMIT_S seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"{command[0]}: not done after {LIMIT_S} s") from None
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise Refused(f"{command[0]} failed: {first}")
    return done.stdout


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "curate"


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"curate-{os.getuid()}"


def _processor() -> str:
    """A text that names the processor: the machine code depends on it, and several kinds of machines may share a home folder."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    fields = ("model name", "flags")
    return "\n".join(dict.fromkeys(line for line in info.read_text().splitlines() if line.startswith(fields)))
