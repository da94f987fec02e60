"""A LoRA adapter's folder as PEFT and TRL save it: adapter_config.json and adapter_model.safetensors; what it says, and what is refused.

    y = W x + s B A x        s = alpha / r, or alpha / √r (rsLoRA); r and alpha of a layer by the adapter's patterns, where it has any

Whatever a config holds beyond what is understood here (DoRA, inits that rewrite the base, ...) is refused by name, never left out.

Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA); the layout is PEFT's.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import BrokenCheckpoint, ModelError, listed
from curate.passes.loading.header import read_header
from curate.recipe.bounds import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Where an adapter came from and how it was trained; its values do not depend on these.
PLACE = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "task_type"}
TRAINING = {"lora_dropout", "eva_config", "lora_ga_config", "exclude_modules", "ensure_weight_tying"}
# Which layers have factors is read off the tensors themselves; the last two count only beside keys that are refused.
LAYERS = {
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "qalora_group_size",
    "megatron_core",
}
VALUES = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias"}
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # of the factors alone: the base stays as it was
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that an engine can be opened for (vLLM 0.32)
MERGE = "Merge it into its base (peft: merge_and_unload, then save_pretrained) and name the merged model."


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's config says. base: the name or path that its trainer knew its base by ("" if none); revision: of that base on the hub."""

    folder: Path
    base: str
    revision: str | None
    values: dict[str, Any]

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max([int(self.values["r"]), *map(int, (self.values.get("rank_pattern") or {}).values())])

    def scaling(self, layer: str, rank: int) -> float:
        """s of a layer whose A has `rank` rows; layer: its name in the model."""
        patterns = self.values.get("alpha_pattern") or {}
        matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
        alpha = float(next(matching, self.values["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def identity(self) -> str:
        """What the adapter's values depend on besides its tensors, as text that is the same wherever and whenever it was saved."""
        relevant = {k: v for k, v in self.values.items() if v and k in VALUES}
        return json.dumps(relevant, sort_keys=True)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    folder = Path(path)
    whole = any(any(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin"))
    return (folder / CONFIG).is_file() and not whole


def tokenizer_folder(path: str | Path, base: str | Path | None) -> str:
    """Where a model's tokenizer is: beside an adapter if its trainer put one there, else its base's."""
    own = any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return str(path if base is None or own else base)


def read_adapter_config(path: str | Path) -> AdapterConfig:
    """The config of an adapter's folder. ModelError where it cannot be read, or holds something that is not understood (named)."""
    folder = Path(path)
    try:
        values = read_object(folder / CONFIG)
        kind = values["peft_type"]
        if kind == "LORA":
            _check_numbers(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise BrokenCheckpoint(
            f"{folder.name}/{CONFIG} cannot be read as PEFT's config of a LoRA adapter: {listed([repr(error)], longest=200)}."
        ) from None
    if kind != "LORA":
        raise ModelError(
            f"{folder.name}: its adapter is of the kind {listed([kind])}, only LORA can be measured as it is. {MERGE}"
        )
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in INITS:
        raise ModelError(
            f"{folder.name}: init_lora_weights {listed([init])!r} rewrites the base's weights when PEFT loads the adapter, which is not done here.\n"
            f"  Save it with PEFT's path_initial_model_for_weight_conversion. Or: {MERGE[0].lower()}{MERGE[1:]}"
        )
    for key, value in values.items():
        if value and key not in PLACE | TRAINING | LAYERS | VALUES | {"init_lora_weights"}:
            raise ModelError(
                f"{folder.name}: its {CONFIG} has {listed([f'{key} {value!r}'])}, which is not understood here. {MERGE}"
            )
    return AdapterConfig(folder, values.get("base_model_name_or_path") or "", values.get("revision"), values)


def _check_numbers(values: dict[str, Any]) -> None:
    """ValueError and others where ranks and alphas are not what they must be: numbers, by patterns of layers' names."""
    for rank in (values["r"], *(values.get("rank_pattern") or {}).values()):
        if not 0 < int(rank) < 2**31:
            raise ValueError(f"a rank of {str(rank)[:40]}")
    for alpha in (values["lora_alpha"], *(values.get("alpha_pattern") or {}).values()):
        if not math.isfinite(float(alpha)):
            raise ValueError(f"an alpha of {str(alpha)[:40]}")
    for pattern in (*(values.get("rank_pattern") or {}), *(values.get("alpha_pattern") or {})):
        re.compile(pattern)
    if not isinstance(values.get("base_model_name_or_path") or "", str) or not isinstance(
        values.get("revision") or "", str
    ):
        raise TypeError("the base's name is no text")


def vllm_refusal(path: str | Path) -> str | None:
    """Why vLLM cannot serve this adapter as an adapter, None where nothing speaks against it. ModelError as `read_adapter_config`."""
    config = read_adapter_config(path)
    if config.values.get("lora_bias"):
        return "vLLM takes no LoRA adapter with biases (lora_bias)"
    if config.rank > VLLM_RANKS[-1]:
        return f"vLLM takes LoRA ranks up to {VLLM_RANKS[-1]}, the adapter has {config.rank}"
    for name in tensor_names(config.folder):
        layer, factor = split_name(name)
        if not factor:
            return f"vLLM takes no adapter with whole tensors (modules_to_save or bias: {layer})"
        if "embedding" in factor or layer.endswith(("lm_head", "embed_out")):
            return f"vLLM takes no LoRA factors of {layer}"
    return None


def tensor_names(path: str | Path) -> list[str]:
    """Names of the adapter's tensors, from the file's header. ModelError where it cannot be read."""
    file = Path(path) / WEIGHTS
    try:
        return sorted(read_header(file)[1])
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.parent.name}/{WEIGHTS} cannot be read: {error}.") from None


def split_name(name: str) -> tuple[str, str]:
    """PEFT's name of a tensor -> (the layer's name in the model, which factor); or (the whole tensor's name, "")."""
    in_model = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    match = re.fullmatch(r"(.+)\.(lora_[A-Za-z_]+(?:\.weight|\.bias)?)", in_model)
    return (match[1], match[2]) if match else (in_model, "")


def own_base(path: str | Path) -> str | None:
    """The base that an adapter's own config names; None for a whole model. ModelError where an adapter names none."""
    if not is_adapter(path):
        return None
    config = read_adapter_config(path)
    if not config.base:
        raise ModelError(
            f"{path} is a LoRA adapter whose config names no base. Say which model it sits on (models.base)."
        )
    return config.base
