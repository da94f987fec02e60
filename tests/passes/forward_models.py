"""Tiny random models of the families that people fine-tune, random rows, and the slow oracle: one sequence at a time, float64, full logits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

from curate.passes.tokens import Encoded, EncodedPair, common_prefix

VOCABULARY = 101
BODY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),  # biases on q, k, v
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_window": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "mistral_window": ("Mistral", {"sliding_window": 8}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {}),
    "phi3_long": (
        "Phi3",
        {
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 20,
            },
        },
    ),
    "llama_dynamic": (
        "Llama",
        {"max_position_embeddings": 20, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "phi": ("Phi", {}),  # bias on the head
    "gpt_neox": ("GPTNeoX", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),  # has no attention interface
    "mamba": ("Mamba", {"state_size": 4}),  # has no attention
}


def make(family: str, *, seed: int = 0) -> torch.nn.Module:
    """A random model with weights large enough to have opinions, biases and norms included."""
    name, extra = FAMILIES[family]
    options = {**BODY, **extra}
    config = getattr(transformers, f"{name}Config")(**options)
    kind = {"Gemma3Text": "Gemma3", "GPT2": "GPT2LMHead", "Bloom": "Bloom"}.get(name, name)
    kind += "Model" if kind == "GPT2LMHead" else "ForCausalLM"
    config._attn_implementation = "eager" if name == "Gemma2" else None
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def random_pairs(n: int, *, seed: int = 0, longest: int = 30) -> list[EncodedPair]:
    """Pairs of every shape: prompts that repeat, responses that begin alike, one-token responses, a chosen that is a prefix of rejected."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, rng.integers(low, high + 1)).astype(np.int32)

    prompts = [np.concatenate([[1], ids(0, longest)]).astype(np.int32) for _ in range(n)]
    pairs = []
    for i in range(n):
        prompt = prompts[i % max(n // 2, 1)]  # every prompt twice
        start = len(prompt)
        chosen, rejected = ids(1, longest), ids(1, longest)
        if i % 3 == 0:
            rejected = np.concatenate([chosen[: len(chosen) // 2 + 1], rejected])
        if i % 5 == 0:
            rejected = np.concatenate([chosen, ids(1, 3)])
        end = np.asarray([2] if i % 4 else [], np.int32)  # some were cut before EOS
        a, b = (np.concatenate([prompt, y, end]).astype(np.int32) for y in (chosen, rejected))
        pairs.append(EncodedPair(Encoded(a, start), Encoded(b, start), common_prefix(a, b)))
    return pairs


def double(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module).double().eval()


def adapted(family: str):
    """A family's model under PEFT's LoRA on some layers, with B that are not zero any more. Skips where PEFT is not installed."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    module = peft.get_peft_model(make(family), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return module


def detach_below(layer: torch.nn.Module) -> None:
    """No gradient goes further back than to this layer's input."""
    layer.register_forward_pre_hook(
        lambda part, args, kwargs: ((args[0].detach(), *args[1:]), kwargs), with_kwargs=True
    )


@torch.no_grad()
def oracle_side(module64: torch.nn.Module, side: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, V) log-probabilities at the predicting positions and (length, d) final states of one sequence alone."""
    if "dynamic" in str(getattr(module64.config, "rope_parameters", "")):
        module64 = copy.deepcopy(module64)  # dynamic NTK remembers the longest sequence it has seen
    out = module64(
        input_ids=torch.from_numpy(side.ids.astype(np.int64))[None], output_hidden_states=True, use_cache=False
    )
    logp = out.logits[0].double().log_softmax(-1)
    return logp[side.start - 1 : -1], out.hidden_states[-1][0].double()


def oracle(module64: torch.nn.Module, pairs: list[EncodedPair]) -> dict[str, np.ndarray]:
    """The columns of `likelihood` and `hidden` by their definitions; last_scale = ‖last+‖·‖last−‖."""
    rows = []
    for pair in pairs:
        row = {}
        sums, lasts, eos = {}, {}, {}
        for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            logp, states = oracle_side(module64, side)
            targets = torch.from_numpy(side.ids[side.start :].astype(np.int64))
            row[f"{name}_logp"] = float(logp.gather(1, targets[:, None]).sum())
            summed = states[side.start - 1 : -1]  # last prompt token in, EOS out
            sums[name], lasts[name], eos[name] = summed.sum(0), summed[-1], states[side.start - 1 :].sum(0)
        c, r = sums["chosen"], sums["rejected"]
        row |= {"hidden_cc": float(c @ c), "hidden_cr": float(c @ r), "hidden_rr": float(r @ r)}
        row["last_cr"] = float(lasts["chosen"] @ lasts["rejected"])
        row["last_scale"] = float(lasts["chosen"].norm() * lasts["rejected"].norm())
        row["hidden_eos_cc"] = float(eos["chosen"] @ eos["chosen"])
        row["hidden_eos_cr"] = float(eos["chosen"] @ eos["rejected"])
        rows.append(row)
    return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
