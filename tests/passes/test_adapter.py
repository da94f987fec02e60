"""LoRA adapters in torch: PEFT's own logits and gradients, exchange in place, and the base to the last bit afterwards."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from curate.errors import ModelError
from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.gradients import backward, mean
from curate.passes.loading.adapter_config import read_adapter_config, vllm_refusal
from curate.passes.tokens import EncodedPair
from tests.passes.forward_models import double, make, random_pairs
from tests.passes.test_backward import columns, products, worst

peft = pytest.importorskip("peft", reason="PEFT is not installed (extra: prove)")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about the rarer kinds

LOGPS = [MEASUREMENTS["likelihood"]]
ENTK = [MEASUREMENTS["entk"]]
QV = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "plain": ("qwen2", QV),
    "rslora": ("qwen2", {**QV, "use_rslora": True}),
    "patterns": ("llama", {**QV, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}),
    "all_linear": ("gemma2", {"r": 2, "target_modules": "all-linear"}),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fused": ("gpt_neox", {"r": 4, "target_modules": ["query_key_value", "dense"]}),
    "biases": ("qwen2", {**QV, "bias": "all", "lora_bias": True}),
    "lora_only": ("qwen2", {**QV, "bias": "lora_only"}),
    "head": ("llama_tied", {**QV, "modules_to_save": ["lm_head"]}),
    "head_and_words": ("llama", {**QV, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "merged": ("llama", {**QV, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "gaussian": ("llama", {**QV, "init_lora_weights": "gaussian"}),
}  # fmt: skip


def adapt(base: Path, folder: Path, options: dict, *, seed: int = 1) -> torch.nn.Module:
    """PEFT's own model of a base with random factors, saved as an adapter. Returns it in evaluation mode."""
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def save(family: str, folder: Path, *, seed: int = 0) -> Path:
    make(family, seed=seed).save_pretrained(folder)
    return folder


def logps(module: torch.nn.Module, pairs: list[EncodedPair]) -> np.ndarray:
    """(rows,) summed log-probs of the chosen responses, one sequence at a time in float64."""
    found = []
    for pair in pairs:
        ids = torch.from_numpy(pair.chosen.ids.astype(np.int64))[None]
        with torch.no_grad():
            logp = module(input_ids=ids, use_cache=False).logits[0, pair.chosen.start - 1 : -1].log_softmax(-1)
        found.append(float(logp.gather(1, ids[0, pair.chosen.start :, None]).sum()))
    return np.asarray(found)


def measured(model) -> np.ndarray:
    return forward.measure(model, random_pairs(5), LOGPS)["chosen_logp"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_equals_peft_and_leaves_no_trace(tmp_path, kind):
    family, options = KINDS[kind]
    base = save(family, tmp_path / "base")
    theirs = adapt(base, tmp_path / "adapter", options)
    with forward.load_model(base, device="cpu") as model:
        state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
        plain = measured(model)
        model.use(tmp_path / "adapter")
        found = measured(model)
        np.testing.assert_allclose(found, logps(double(theirs), random_pairs(5)), rtol=1e-5)
        assert abs(found - plain).max() > 0.1
        model._take_off()  # `use(base)` would read the base anew
        after = model.module.state_dict()
        assert after.keys() == state.keys() and all(torch.equal(after[name], t) for name, t in state.items())
        head, words = model.module.get_output_embeddings(), model.module.get_input_embeddings()
        assert (head.weight is words.weight) == (family in ("llama_tied", "gemma2", "gpt2"))
        model.use(base)
        np.testing.assert_array_equal(measured(model), plain)


def test_a_series_of_adapters_is_exchanged_in_place(tmp_path, monkeypatch):
    """Same layers and ranks: copied; another rank: put on anew; the base is read once, and another base's adapter brings its own."""
    base, other = save("llama", tmp_path / "base"), save("llama", tmp_path / "other", seed=1)
    for seed in (1, 2):
        adapt(base, tmp_path / str(seed), QV, seed=seed)
    adapt(base, tmp_path / "wide", {**QV, "r": 8})
    adapt(other, tmp_path / "elsewhere", QV)
    fresh = {}
    for name in ("1", "2", "wide", "elsewhere"):
        with forward.load_model(tmp_path / name, device="cpu") as model:  # the base that the adapter's own config names
            fresh[name] = measured(model)
    swapped = []
    swap = forward.load_model.__globals__["weights"].swap
    monkeypatch.setattr(
        "curate.passes.loading.weights.swap", lambda module, path: swapped.append(path) or swap(module, path)
    )
    with forward.load_model(tmp_path / "1", base=base, device="cpu") as model:
        for name, kept in (("2", True), ("1", True), ("wide", False), ("2", False)):
            model.known["of its layers"] = ...
            model.use(tmp_path / name, base=base)
            np.testing.assert_array_equal(measured(model), fresh[name])
            assert ("of its layers" in model.known) == kept
        assert not swapped
        model.use(tmp_path / "elsewhere", base=other)
        np.testing.assert_array_equal(measured(model), fresh["elsewhere"])
        assert swapped == [other]


def test_what_does_not_fit_is_said_and_leaves_the_old(tmp_path):
    base = save("llama", tmp_path / "base")
    adapt(base, tmp_path / "good", QV)
    adapt(
        save("gpt2", tmp_path / "gpt2"),
        tmp_path / "strange",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    )
    model = forward.load_model(tmp_path / "good", base=base, device="cpu")
    before = measured(model)
    with pytest.raises(ModelError, match="no layer of that name there"):
        model.use(tmp_path / "strange", base=base)
    with pytest.raises(ModelError, match="same llama model"):
        model.use(tmp_path / "gpt2")
    wider = make("llama")
    wider.config.intermediate_size = 64
    type(wider)(wider.config).save_pretrained(tmp_path / "wider")
    adapt(tmp_path / "wider", tmp_path / "wide", QV)
    with pytest.raises(ModelError, match=r"factors of model.layers.0.mlp.down_proj have the shapes \[\(4, 64\)"):
        model.use(tmp_path / "wide", base=base)
    (tmp_path / "good2").mkdir()
    (tmp_path / "good2" / "adapter_config.json").write_text((tmp_path / "good" / "adapter_config.json").read_text())
    with pytest.raises(ModelError, match="wanted an adapter's folder"):
        model.use(tmp_path / "good2", base=base)
    np.testing.assert_array_equal(measured(model), before)
    assert model.path == str(tmp_path / "good")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "has use_dora True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' rewrites the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' rewrites the base"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, options, words):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**QV, **options})
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words) as error:
        read_adapter_config(tmp_path)
    assert "merge_and_unload" in str(error.value)


def test_other_kinds_of_adapters_and_broken_configs(tmp_path):
    peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="of the kind IA3"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_adapter_config(tmp_path)


def test_gradients_over_an_adapter_equal_pefts(tmp_path):
    base = save("qwen2", tmp_path / "base")
    pairs = random_pairs(6)
    with forward.load_model(base, device="cpu") as model:
        with pytest.raises(ModelError, match="no LoRA parameter"):
            backward.measure(model, pairs, ENTK, parameters="lora")
        for seed, options in ((1, QV), (2, QV), (3, {**QV, "r": 2, "use_rslora": True})):
            theirs = double(adapt(base, tmp_path / str(seed), options, seed=seed))
            model.use(tmp_path / str(seed), base=base)
            found = backward.measure(model, pairs, ENTK, parameters="lora")
            wanted = products(theirs, pairs, "lora_")
            error = worst(columns(found), wanted)
            if error >= 1e-6:  # on some processors: then autograd's own float32 gradients are as far off there
                assert error < 2 * worst(products(copy.deepcopy(theirs).float(), pairs, "lora_"), wanted)
        whole = columns(backward.measure(model, pairs, ENTK))
        last = columns(backward.measure(model, pairs, ENTK, parameters=1))
    theirs.float().merge_and_unload().save_pretrained(tmp_path / "merged")
    with forward.load_model(tmp_path / "merged", device="cpu") as merged:
        assert (
            worst(whole, columns(backward.measure(merged, pairs, ENTK))) < 1e-5
        )  # all: of the model that the two make
        assert worst(last, columns(backward.measure(merged, pairs, ENTK, parameters=1))) < 1e-5


def test_gradients_see_the_tensors_that_took_the_place_of_the_bases(tmp_path):
    """Biases that one adapter brings are gone with the next."""
    base, pairs = save("qwen2", tmp_path / "base"), random_pairs(4)
    with forward.load_model(base, device="cpu") as model:
        for seed in (1, 2):
            theirs = double(adapt(base, tmp_path / str(seed), {**QV, "bias": "all"}, seed=seed))
            model.use(tmp_path / str(seed), base=base)
            found = backward.measure(model, pairs, ENTK, parameters="lora")
            assert worst(columns(found), products(theirs, pairs, "lora_")) < 1e-6


def test_bf16_is_close_to_peft(tmp_path):
    base = save("qwen2", tmp_path / "base")
    theirs = adapt(base, tmp_path / "a", QV)
    with forward.load_model(tmp_path / "a", base=base, device="cpu", dtype="bfloat16") as model:
        found = measured(model)
    np.testing.assert_allclose(found, logps(double(theirs), random_pairs(5)), rtol=0.02)


def test_factors_without_a_rule_have_no_lora_gradients(tmp_path):
    base = save("llama", tmp_path / "base")
    adapt(base, tmp_path / "a", {**QV, "target_modules": ["q_proj", "lm_head"]})
    with forward.load_model(tmp_path / "a", base=base, device="cpu") as model:
        with pytest.raises(ModelError, match="factors of the embedding or the LM head"):
            backward.measure(model, random_pairs(2), ENTK, parameters="lora")
        with pytest.raises(ModelError, match="factors of the embedding or the LM head"):
            mean.accumulate(model, random_pairs(2), mean.fixed_weights(1, 0), parameters="lora")


def test_what_vllm_takes(tmp_path):
    base = save("llama", tmp_path / "base")
    wanted = {
        "plain": (QV, None),
        "patterns": ({**QV, "rank_pattern": {"v_proj": 2}, "use_rslora": True}, None),
        "biases": ({**QV, "lora_bias": True}, "biases"),
        "whole": ({**QV, "modules_to_save": ["lm_head"]}, "whole tensors"),
        "head": ({**QV, "target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        "rank": ({**QV, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 600}}, "up to 512"),
    }
    for name, (options, words) in wanted.items():
        adapt(base, tmp_path / name, options)
        found = vllm_refusal(tmp_path / name)
        assert (found is None) if words is None else words in found


def test_a_saved_config_means_the_same_wherever_it_was_saved(tmp_path):
    base = save("llama", tmp_path / "base")
    adapt(base, tmp_path / "a", QV)
    first = read_adapter_config(tmp_path / "a").identity()
    file = tmp_path / "a" / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(
        json.dumps({**values, "base_model_name_or_path": "x", "target_modules": values["target_modules"][::-1]})
    )
    assert read_adapter_config(tmp_path / "a").identity() == first
    file.write_text(json.dumps({**values, "lora_alpha": 9}))
    assert read_adapter_config(tmp_path / "a").identity() != first
