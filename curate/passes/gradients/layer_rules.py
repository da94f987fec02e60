"""Which module owns which parameter, and by which rule its gradient's inner products are taken. What has no rule is refused by name.

    linear      torch's Linear, GPT-2's Conv1D                weight, bias
    embedding   torch's Embedding, and its scaled kin          weight
    norm        LayerNorm and RMSNorm of any model             weight (or 1 + weight), bias: checked on the spot with a probe
    head        the LM head                                    weight, bias; tied to the embedding where both are one matrix

Exactly one rule must own every parameter that was asked for (a matrix that is head and embedding has both). Where none does, as for the experts of
MoE models, state-space layers and other kinds of adapters, the model is refused: no parameter is left out silently.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from curate.errors import ModelError
from curate.passes.gradients.products import wide
from curate.passes.loading.model import Model
from curate.passes.loading.skeleton import Skeleton

Parameters = Literal["all", "lora"] | int


@dataclass(frozen=True)
class Linear:
    """y = xWᵀ + b. weight: (o, i), whichever way round the module keeps it. needs_weight, needs_bias: whether the gradients of W and b are taken."""

    module: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    needs_weight: bool  # its weight's products
    needs_bias: bool


@dataclass(frozen=True)
class Embedding:
    """y = scale · W[ids]. table: W (n, d). tied: the LM head is the same matrix."""

    module: nn.Module
    table: torch.Tensor
    scale: float
    tied: bool


@dataclass(frozen=True)
class Norm:
    """y = x̂ ∘ w (or 1 + w) + b. normal: the function x -> x̂. shape: that of w. bias: whether there is a b."""

    module: nn.Module
    normal: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    bias: bool

    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
        """What each token adds to the gradient of the weight and, where there is one, of the bias: (N, *shape) each. x: the norm's input, g: the
        gradient at its output, both (N, …, *shape).
        """
        g, extra = wide(g), tuple(range(1, x.ndim - len(self.shape)))
        parts = [g * self.normal(x), g] if self.bias else [g * self.normal(x)]
        return [part.sum(extra) for part in parts] if extra else parts


@dataclass(frozen=True)
class Rules:
    """A model's parameters by rule. layers: the decoder layers in order. first: the first layer whose gradients are wanted, None for all of the
    model and its embeddings. head, head_bias: whether the LM head is among the wanted. names: of all wanted parameters. by_heads: kinds of norms
    that were seen to get (batch, heads, n, ·).
    """

    linears: list[Linear]
    embeddings: list[Embedding]
    norms: list[Norm]
    layers: list[nn.Module]
    first: int | None
    head: bool
    names: tuple[str, ...]
    by_heads: dict[type, bool] = field(default_factory=dict)


def find_rules(model: Model, parameters: Parameters = "all") -> Rules:
    """Sort the model's modules by rule. ModelError naming the first wanted parameter that has none.

    parameters: "all", "lora" (those whose name contains lora_), or k: the last k decoder layers, the final norm and the LM head (of a
    tied matrix its use as a head). A and B of an adapter on the model are counted with "lora" alone: else its weights are W + sBA, whose
    gradient is W's own.
    """
    module = model.module
    layers = _decoder_layers(module)
    owners = _owners(module)
    requested = _requested(model, owners, layers, parameters)
    head = module.get_output_embeddings()
    first = len(layers) - min(parameters, len(layers)) if isinstance(parameters, int) else None
    rules = Rules([], [], [], layers, first, id(head.weight) in requested, tuple(requested.values()))
    done = {id(p) for p in (head.weight, getattr(head, "bias", None)) if p is not None}
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        if part is head or not own:
            continue
        mine = {name for name, p in own.items() if id(p) in requested}
        if isinstance(part, nn.Embedding) and own.keys() == {"weight"}:
            if mine and first is None:
                rules.embeddings.append(
                    Embedding(part, part.weight.detach(), _embedding_scale(part), part.weight is head.weight)
                )
                done.add(id(part.weight))
        elif (weight := _linear_weight(part)) is not None and own.keys() <= {"weight", "bias"}:
            bias = getattr(part, "bias", None)
            rules.linears.append(Linear(part, weight, bias, "weight" in mine, "bias" in mine))
            done |= {id(p) for p in own.values()}
        elif mine and (norm := _norm(part, own)) is not None:
            rules.norms.append(norm)
            done |= {id(p) for p in own.values()}
    if parameters != "all" and first is None and not requested:
        raise ModelError(f"{model.path or type(module).__name__}: no LoRA parameter (lora_…) was found in this model.")
    for key, name in requested.items():
        homes = {id(part): part for _, part in owners[key]}
        shared = [part for part in homes.values() if part is not head and part is not module.get_input_embeddings()]
        if key not in done or (len(homes) > 1 and shared):
            kind = type(owners[key][0][1]).__name__
            why = (
                f"is shared by {len(homes)} modules"
                if key in done
                else f"belongs to a {kind}, for which there is no rule"
            )
            raise ModelError(
                f"{type(module).__name__}: gradients over {_described(parameters)} were asked for, but {name} {why}.\n"
                "  Scores that read forward passes alone (ches_ln, head_displacement, …) work for this model."
            )
    return rules


def parameter_names(model: Model | Skeleton, parameters: Parameters = "all") -> tuple[str, ...]:
    """The parameters that were asked for, with a rule or without, by the names of `named_parameters`. ModelError where there are none, or where
    factors of an adapter are none, being merged.
    """
    requested = _requested(model, _owners(model.module), _decoder_layers(model.module), parameters)
    if not requested:
        raise ModelError(
            f"{model.path or type(model.module).__name__}: {_described(parameters)} were asked for, it has none."
        )
    return tuple(name for name, p in model.module.named_parameters() if id(p) in requested)


def probe_ids(model: Model, count: int, *, seed: int) -> np.ndarray:
    """(count,) random token ids to try the rules on. None is padding_idx: torch gives that line of the embedding no gradient, though it acts
    like any other; ours has the function's own.
    """
    vocabulary = model.module.config.get_text_config().vocab_size
    ids = np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.int32)
    padding = getattr(model.module.get_input_embeddings(), "padding_idx", None)
    return ids if padding is None else np.where(ids == padding, (ids + 1) % vocabulary, ids)


def _owners(module: Any) -> dict[int, list[tuple[str, nn.Module]]]:
    """id of a parameter -> (its full name, the module that has it), of every module that has it."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, part in module.named_modules():
        for name, p in part.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append((f"{prefix}.{name}" if prefix else name, part))
    return owners


def _described(parameters: Parameters) -> str:
    """The parameters in words, for error messages."""
    if isinstance(parameters, int):
        return f"the last {parameters} layers"
    return "all parameters" if parameters == "all" else "the LoRA parameters"


def _requested(
    model: Model | Skeleton,
    owners: dict[int, list[tuple[str, nn.Module]]],
    layers: list[nn.Module],
    parameters: Parameters,
) -> dict[int, str]:
    """{id of a parameter: its name} of the parameters that were asked for, in the model's order."""
    module, names = model.module, {key: homes[0][0] for key, homes in owners.items()}
    if parameters == "lora" and model.adapter is not None and not model.adapter.lora:
        raise ModelError(
            f"{model.path}: gradients over the LoRA parameters were asked for, but this adapter has factors of the embedding or the LM head, "
            "for which there is no rule. Take them over all parameters (gradients.parameters: all)."
        )
    if parameters != "lora" and model.adapter is not None:
        names = {key: name for key, name in names.items() if ".lora_" not in name}
    if parameters == "all":
        return names
    if parameters == "lora":
        return {key: name for key, name in names.items() if "lora_" in name}
    if isinstance(parameters, bool) or not isinstance(parameters, int) or parameters < 1:
        raise ModelError(f"parameters: wanted 'all', 'lora' or a number of last layers, found {parameters!r}.")
    early = {id(p) for layer in layers[:-parameters] for p in layer.parameters()}
    head = module.get_output_embeddings()
    early |= {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    early -= {id(p) for p in head.parameters()}
    before = _before_layers(module, layers)
    return {key: name for key, name in names.items() if key not in early | before}


def _before_layers(module: Any, layers: list[nn.Module]) -> set[int]:
    """Parameters registered before the decoder layers (norms and projections of embeddings): they act before them."""
    early: set[int] = set()
    inside = {id(p) for layer in layers for p in layer.parameters()}
    for p in module.base_model.parameters():
        if id(p) in inside:
            break
        early.add(id(p))
    return early - {id(p) for p in module.get_output_embeddings().parameters()}


def _decoder_layers(module: Any) -> list[nn.Module]:
    """The decoder layers in order: the longest list of modules in the model."""
    lists: list[nn.ModuleList] = [part for part in module.base_model.modules() if isinstance(part, nn.ModuleList)]
    return max((list(part) for part in lists), key=len, default=[])


def _linear_weight(part: nn.Module) -> torch.Tensor | None:
    """The (o, i) weight of a linear layer (torch's Linear, GPT-2's Conv1D); None for other modules."""
    if type(part) is nn.Linear:
        return part.weight.detach()
    weight = getattr(part, "weight", None)
    if type(part).__name__ == "Conv1D" and hasattr(part, "nf") and isinstance(weight, torch.Tensor):
        return weight.detach().T
    return None


def _embedding_scale(part: nn.Embedding) -> float:
    """The factor between a line of the table and what the module gives. ModelError where it is no factor."""
    if type(part).forward is nn.Embedding.forward and part.max_norm is None:
        return 1.0
    scale = float(getattr(part, "embed_scale", 1.0))
    ids = torch.arange(min(4, part.num_embeddings), device=part.weight.device)[None]
    try:
        with torch.no_grad():
            ours, theirs = wide(part.weight[ids] * scale), wide(part(ids))
        good = ours.shape == theirs.shape and bool((ours - theirs).norm() <= 0.01 * theirs.norm())
    except Exception:  # embeddings of positions take arguments of their own
        good = False
    if not good:
        raise ModelError(
            f"{type(part).__name__}: an embedding that is no table times a factor; its gradient has no rule."
        )
    return scale


def _norm(part: nn.Module, own: dict[str, nn.Parameter]) -> Norm | None:
    """The rule of a norm: RMS or centred, whichever gives the gradient that autograd gives for random numbers. None where neither does."""
    if not own.keys() <= {"weight", "bias"} or "weight" not in own or own["weight"].ndim > 2 or list(part.children()):
        return None
    eps = next(
        (
            float(getattr(part, name))
            for name in ("variance_epsilon", "eps", "norm_eps", "epsilon")
            if getattr(part, name, None) is not None
        ),
        None,
    )
    shape = tuple(own["weight"].shape)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    try:
        twin = copy.deepcopy(part).cpu().double()
        for p in twin.parameters():
            p.requires_grad_(True)
        with torch.enable_grad():
            y = twin(x)
            expected = torch.autograd.grad(y, list(twin.parameters()), g.to(y.dtype))
    except Exception:  # whatever a module that is no norm does with it
        return None
    if eps is None:
        eps = torch.finfo(torch.float32).eps if "RMS" in type(part).__name__ else 1e-5
    for centred in (False, True):
        normal = _normal(eps, centred)
        ours = [
            (g * normal(x)).sum(0) if p.shape == shape and name == "weight" else g.sum(0) for name, p in own.items()
        ]
        if all(a.shape == b.shape and bool((a - b).norm() <= 1e-4 * b.norm()) for a, b in zip(ours, expected)):
            return Norm(part, normal, shape, "bias" in own)
    return None


def _normal(eps: float, centred: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> x̂: x divided by its root mean square over the last dimension; centred: after its mean was subtracted."""

    def normal(x: torch.Tensor) -> torch.Tensor:
        x = wide(x)
        if centred:
            x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    return normal
