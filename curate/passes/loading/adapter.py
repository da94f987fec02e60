"""A LoRA adapter around the linear layers of a model in memory: put on, exchanged for another in place, taken off without a trace.

    y = W x + s B A x

The base's weights stay as they are, so what is taken off leaves the base to the last bit, and gradients can be taken over A and B. What has no
linear layer to sit around takes the place of the base's own tensor meanwhile: whole tensors (modules_to_save, biases), and factors of an
embedding or of the LM head, merged as W + s B A in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from curate.errors import ModelError
from curate.passes.descriptions import describe_folder, first_line
from curate.passes.loading.adapter_config import MERGE, WEIGHTS, AdapterConfig, read_adapter_config, split_name


class LoraLinear(nn.Module):
    """A linear layer with an adapter's factors beside it. Names of parts as PEFT's."""

    def __init__(self, base_layer: nn.Module, down: torch.Tensor, up: torch.Tensor, bias: bool) -> None:
        super().__init__()
        self.base_layer: Any
        kind = {"dtype": base_layer.weight.dtype, "device": base_layer.weight.device}
        self.base_layer = base_layer
        self.lora_A = nn.Linear(down.shape[1], down.shape[0], bias=False, **kind)  # (r, in)
        self.lora_B = nn.Linear(up.shape[1], up.shape[0], bias=bias, **kind)  # (out, r)
        self.scaling = 1.0
        self.requires_grad_(False).eval()

    @property
    def weight(self) -> torch.Tensor:
        """The base's, for models that look at a layer's dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scaling


class Factors:
    """An adapter's tensors by where they go: `linear` and `merged`: layer -> its factors; `whole`: name -> tensor. Read, and checked with a model."""

    def __init__(self, path: str | Path, module: Any) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self.config: AdapterConfig = read_adapter_config(path)
        self.path = str(path)
        try:
            tensors = load_file(self.config.folder / WEIGHTS)
        except (OSError, SafetensorError) as problem:
            raise ModelError(
                f"{path}: wanted an adapter's folder ({WEIGHTS}), found {describe_folder(path)}.\n"
                f"  {type(problem).__name__}: {first_line(problem)}"
            ) from problem
        self.linear: dict[str, dict[str, torch.Tensor]] = {}
        self.merged: dict[str, dict[str, torch.Tensor]] = {}
        self.whole: dict[str, torch.Tensor] = {}
        parts, head = dict(_base_modules(module)), module.get_output_embeddings()
        for name, tensor in tensors.items():
            layer, factor = split_name(name)
            if not factor:
                self._whole(layer, tensor, parts, module)
                continue
            part = parts.get(layer)
            fits = _is_linear(part) and factor in ("lora_A.weight", "lora_B.weight", "lora_B.bias")
            fits |= isinstance(part, nn.Embedding) and factor in ("lora_embedding_A", "lora_embedding_B")
            if not fits:
                what = f"a {type(part).__name__}" if part is not None else "no layer of that name"
                raise ModelError(
                    f"{path}: its tensor {name} has no place in the {type(module).__name__} that is loaded ({layer} is {what} there).\n"
                    f"  Is it an adapter of another model? Else: {MERGE[0].lower()}{MERGE[1:]}"
                )
            group = self.linear if _is_linear(part) and part is not head else self.merged
            group.setdefault(layer, {})[factor] = tensor
        for layer, own in (*self.linear.items(), *self.merged.items()):
            self._check(layer, own, parts[layer])

    def _whole(self, name: str, tensor: torch.Tensor, parts: dict[str, nn.Module], module: Any) -> None:
        owner, _, attribute = name.rpartition(".")
        part = parts.get(owner)
        there = part._parameters.get(attribute) if part is not None else None
        of_words = part is not None and part in (module.get_input_embeddings(), module.get_output_embeddings())
        if there is None or there.shape[1 if of_words else 0 :] != tensor.shape[1 if of_words else 0 :]:
            present = tuple(there.shape) if there is not None else "no tensor of that name"
            raise ModelError(
                f"{self.path}: its tensor {name} {tuple(tensor.shape)} has no place in the {type(module).__name__} that is loaded (there: {present})."
            )
        self.whole[name] = tensor

    def _check(self, layer: str, own: dict[str, torch.Tensor], part: nn.Module) -> None:
        factors = [tensor for name, tensor in sorted(own.items()) if not name.endswith("bias")]
        shapes = [tuple(tensor.shape) for tensor in factors]
        weight = part._parameters["weight"]
        assert weight is not None
        out, into = reversed(weight.shape) if not isinstance(part, nn.Linear) else weight.shape  # Conv1D, Embedding
        if len(factors) != 2 or shapes != [(shapes[0][0], into), (out, shapes[0][0])]:
            raise ModelError(
                f"{self.path}: the factors of {layer} have the shapes {shapes}, its layer takes (r, {into}) and ({out}, r): "
                "not an adapter of the model that is loaded."
            )

    @property
    def shapes(self) -> dict[str, Any] | None:
        """What two adapters share that can be exchanged in place; None where one takes the place of the base's own tensors."""
        if self.whole or self.merged:
            return None
        return {f"{layer} {name}": t.shape for layer, own in self.linear.items() for name, t in own.items()}


class Adapter:
    """What is on a module. `lora`: whether gradients can be taken over its factors: none of them had to be merged."""

    def __init__(self, module: Any, factors: Factors) -> None:
        self.module, self.factors = module, factors
        self._layers: dict[str, LoraLinear] = {}
        for layer, own in factors.linear.items():
            base_layer = module.get_submodule(layer)
            self._layers[layer] = LoraLinear(
                base_layer, own["lora_A.weight"], own["lora_B.weight"], "lora_B.bias" in own
            )
        self._kept: dict[str, nn.Parameter] = {}  # the base's own, of what is replaced
        self.put_on()

    @property
    def lora(self) -> bool:
        return not self.factors.merged

    def exchange(self, factors: Factors) -> bool:
        """Another adapter's values in place; False, and nothing done, where it is on other layers or of other ranks, or is more than factors."""
        if factors.shapes is None or factors.shapes != self.factors.shapes:
            return False
        self.factors = factors
        self._fill()
        return True

    def put_on(self) -> None:
        for layer, wrapped in self._layers.items():
            _set(self.module, layer, wrapped)
        self._fill()

    def take_off(self) -> None:
        """The base again, to the last bit."""
        self._restore()
        for layer, wrapped in self._layers.items():
            _set(self.module, layer, wrapped.base_layer)

    def _restore(self) -> None:
        for name, before in self._kept.items():
            _set(self.module, name, before)
        self._kept = {}

    @torch.no_grad()
    def _fill(self) -> None:
        config = self.factors.config
        for layer, own in self.factors.linear.items():
            wrapped = self._layers[layer]
            wrapped.scaling = config.scaling(layer, len(own["lora_A.weight"]))
            wrapped.lora_A.weight.copy_(own["lora_A.weight"])
            wrapped.lora_B.weight.copy_(own["lora_B.weight"])
            if "lora_B.bias" in own:
                wrapped.lora_B.bias.copy_(own["lora_B.bias"])
        for name, tensor in self.factors.whole.items():
            self._replace(name, tensor)
        for layer, own in self.factors.merged.items():
            weight = self.module.get_submodule(layer).weight
            down, up = (t.to(weight.device).float() for name, t in sorted(own.items()) if not name.endswith("bias"))
            change = config.scaling(layer, len(down)) * (up @ down)  # (out, in)
            change = change.T if "lora_embedding_A" in own else change
            self._replace(f"{layer}.weight", weight.float() + change)

    def _replace(self, name: str, tensor: torch.Tensor) -> None:
        before = self.module.get_parameter(name)
        self._kept.setdefault(name, before)
        _set(self.module, name, nn.Parameter(tensor.to(before.device, before.dtype), requires_grad=False))


def _base_modules(module: Any) -> list[tuple[str, nn.Module]]:
    """The model's modules by name, as they are without an adapter."""
    modules: list[tuple[str, nn.Module]] = []
    inside = [f"{name}." for name, part in module.named_modules() if isinstance(part, LoraLinear)]
    for name, part in module.named_modules():
        if not name.startswith(tuple(inside)):
            modules.append((name, part.base_layer if isinstance(part, LoraLinear) else part))
    return modules


def _is_linear(part: nn.Module | None) -> bool:
    return type(part) is nn.Linear or (type(part).__name__ == "Conv1D" and hasattr(part, "nf"))


def _set(module: Any, name: str, value: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    part = module.get_submodule(owner)
    setattr(part.base_layer if isinstance(part, LoraLinear) else part, attribute, value)
