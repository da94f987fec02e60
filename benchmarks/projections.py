"""Each row's gradient along nine directions: by one backward for all, by differences of forward passes, and by a loop of backwards.

    python benchmarks/projections.py        under a minute on one core

What one quadrature node of POLCA costs (curate/passes/gradients/projections.py), in packed forward passes over the same rows, CPU time, medians,
interleaved:

    gradients    one forward and one backward per batch; each layer's own gradients of the rows, multiplied with all directions, and let go
    forwards     two forward passes per direction
    loop         a backward to weight gradients per row, nine dot products: what per-example attribution code does

Exactness: the largest difference from float64 gradients of autograd, over their root mean square.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from curate.console import table
from curate.passes.gradients import projections
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded

DIRECTIONS = 9
ROUNDS = 3
# name: hidden size, layers, vocabulary, rows, tokens of prompt and completion
SIZES = {
    "330k parameters, 9 + 1 tokens": (128, 2, 16, 256, 9, 1),
    "11M parameters, 60 + 40 tokens": (384, 4, 4000, 12, 60, 40),
}


def make(hidden: int, layers: int, vocabulary: int) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden if layers > 2 else 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return Model(LlamaForCausalLM(config))


def loop(model: Model, rows: list[Encoded], along: projections.Directions) -> np.ndarray:
    """(rows, r): a backward a row, logits at the completion only."""
    named = dict(model.module.named_parameters())
    out = np.zeros((len(rows), DIRECTIONS))
    for p in named.values():
        p.requires_grad_(True)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        states = model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, row.start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(model.module.lm_head(states), ids[0, row.start :])
        gradients = torch.autograd.grad(loss, list(named.values()))
        found = sum((along[name].flatten(1) @ g.flatten()).double() for name, g in zip(named, gradients))
        out[i] = found.numpy()
    for p in named.values():
        p.requires_grad_(False)
    return out


def runners(model: Model, rows: list[Encoded], along: projections.Directions) -> dict[str, Callable[[], np.ndarray]]:
    return {
        "forward": lambda: projections.row_losses(model, rows),
        "gradients": lambda: projections.by_gradients(model, rows, along),
        "forwards": lambda: projections.by_forwards(model, rows, along),
        "loop": lambda: loop(model, rows, along),
    }


def seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    lines = []
    for title, (hidden, layers, vocabulary, n, prompt, completion) in SIZES.items():
        model = make(hidden, layers, vocabulary)
        rng = np.random.default_rng(0)
        rows = [Encoded(rng.integers(0, vocabulary, prompt + completion).astype(np.int32), prompt) for _ in range(n)]
        along = {name: torch.randn(DIRECTIONS, *p.shape) for name, p in model.module.named_parameters()}
        length = torch.stack([d.flatten(1).square().sum(1) for d in along.values()]).sum(0).sqrt()
        along = {name: d / length.view(-1, *[1] * (d.ndim - 1)) for name, d in along.items()}
        ways = runners(model, rows, along)
        found = {name: run() for name, run in ways.items()}  # the first call checks the model against autograd
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, run in ways.items():
                taken[name].append(seconds(run))
        cost = {name: statistics.median(times) for name, times in taken.items()}
        wide = Model(copy.deepcopy(model.module).double())
        exact = loop(wide, rows, {name: d.double() for name, d in along.items()})
        for name in ("gradients", "forwards", "loop"):
            error = np.abs(found[name] - exact).max() / np.sqrt((exact**2).mean())
            lines.append([title, name, f"{cost[name] / cost['forward']:.1f}", f"{cost[name]:.2f}", f"{error:.1e}"])
    print(table(lines, head=("model and rows", "way", "in forward passes", "s of CPU time", "largest error")))


if __name__ == "__main__":
    main()
