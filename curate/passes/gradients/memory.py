"""What a backward pass needs in memory, known before it starts: measured on two short sequences, a·n + b·n² bytes for a sequence of n tokens.

Where a batch's graph does not fit, its layers are run again on the way back (a checkpoint per decoder layer): then only each layer's input and
one layer's graph are in memory, for one more forward. What does not fit even so is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.gradients.capture import Capture
from curate.passes.gradients.head import KEEP, KEEP_ON_GPU
from curate.passes.gradients.layer_rules import Rules
from curate.passes.gradients.pairs import PairProducts
from curate.passes.layout import Group, Item, Layout
from curate.passes.loading.model import Model
from curate.passes.sampling.vllm_memory import free_memory

SHARE = 0.8  # of the free memory that a batch may take
SHORT, LONG = 16, 80  # tokens of the two sequences that are measured


@dataclass(frozen=True)
class Footprint:
    """What a model's graph needs in memory. linear: bytes per token; square: bytes per token squared of a sequence (attention). passing: bytes per
    token that one layer's backward holds at a time. layers: decoder layers in the graph; state: bytes of one token's state between two layers.
    """

    linear: float
    square: float
    passing: float
    layers: int
    state: float

    def of(self, lengths: Sequence[int], vocabulary: int, size: int, *, checkpointed: bool, gpu: bool) -> float:
        """Bytes at the peak for sequences of these lengths."""
        n, squares = sum(lengths), sum(x * x for x in lengths)
        graph = self.linear * n + self.square * squares
        if checkpointed:
            graph = 1.3 * graph / self.layers + self.layers * self.state * n
        head = min(n * vocabulary * size, KEEP_ON_GPU if gpu else KEEP) * 1.5
        return graph + self.passing * n + head + 8 * squares

    def graph(self, rows: Sequence[list[Item]]) -> float:
        """Bytes that the graph of these rows keeps when no layer is run again."""
        lengths = [len(item.ids) for row in rows for item in row]
        return self.linear * sum(lengths) + self.square * sum(n * n for n in lengths)

    def check(self, model: Model, items: dict[int, list[Item]], token_budget: int) -> int:
        """How many tokens of the graph a batch may have: the budget, or what memory allows. ModelError where a single row is too long."""
        free = SHARE * free_for(model)
        heaviest = max(items.values(), key=lambda row: self._row(model, row, True))
        need = self._row(model, heaviest, True)
        if need > free:
            raise self.too_long(model, heaviest)
        per_token = need / sum(len(item.ids) for item in heaviest)
        return max(1, min(token_budget, int(free / per_token)))

    def checkpointed(self, rows: list[list[Item]], model: Model) -> bool:
        """Whether a batch's layers must be run again on the way back."""
        return self.layers > 1 and sum(self._row(model, row, False) for row in rows) > SHARE * free_for(model)

    def too_long(self, model: Model, row: list[Item]) -> ModelError:
        """The error for a row whose gradients do not fit, with the length that would."""
        need, free = self._row(model, row, True), SHARE * free_for(model)
        n = max(len(item.ids) for item in row)
        shorter = max(1, int(n * min(free / need, 0.9)))
        return ModelError(
            f"{model.path or type(model.module).__name__}: the gradients of a row of {sum(len(item.ids) for item in row)} tokens need about "
            f"{need / 1e9:.1f} GB beside the model, {free / 1e9:.1f} GB are free on {model.device}.\n"
            f"  Set `--set tokens.max_length={shorter}`, lower engine.token_budget where several rows run at a time, or use a smaller dtype."
        )

    def _row(self, model: Model, row: list[Item], checkpointed: bool) -> float:
        """Bytes at the peak for one row, its sequences together."""
        lengths = [len(item.ids) for item in row]
        size = max(4, torch.finfo(model.dtype).bits // 8)
        vocabulary = len(model.head.weight)
        return self.of(
            lengths, vocabulary, size, checkpointed=checkpointed and self.layers > 1, gpu=model.device.type == "cuda"
        )


def footprint(model: Model, rules: Rules) -> Footprint:
    """The footprint of a model, from the bytes that autograd saves for two short sequences of different length."""
    limit = min(model.learned_positions or LONG, model.rope_limit or LONG, LONG)
    short, long = min(SHORT, max(1, limit // 4)), max(2, limit - 1)
    one, two = _saved(model, rules, short), _saved(model, rules, long)
    square = max(0.0, (two / long - one / short) / (long - short))
    linear = max(two / long - square * long, 0.0)
    widest = max((rule.weight.shape[0] for rule in rules.linears), default=0)
    size = max(4, torch.finfo(model.dtype).bits // 8)
    layers = len(rules.layers) - (rules.first or 0)
    width = model.head.weight.shape[1]
    return Footprint(
        linear, square, 4.0 * size * (widest + 2 * width), max(layers, 1), width * torch.finfo(model.dtype).bits / 8
    )


def _saved(model: Model, rules: Rules, n: int) -> float:
    """Bytes that the graph of one sequence of n tokens keeps, weights apart."""
    item = Item(0, "completion", np.arange(n, dtype=np.int32) % len(model.head.weight), 1)
    own = {p.untyped_storage().data_ptr() for p in (*model.module.parameters(), *model.module.buffers())}
    seen: dict[int, int] = {}

    def keep(x: torch.Tensor) -> Any:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # an output that kept itself would never be freed

    capture = Capture(rules, PairProducts([], model.device), n)
    with torch.enable_grad(), capture.installed(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if model.layout == "padded":
            states = model.padded_states([item])
        else:
            states = model.packed_states(Layout.of([Group((item,), 0)]))
    del states
    return float(sum(seen.values()))


def free_for(model: Model) -> float:
    """Bytes that can still be taken on the model's device."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return free + torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return float(free_memory())
