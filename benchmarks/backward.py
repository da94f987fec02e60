"""The backward pass beside what a user would run instead, in one process, interleaved, CPU time, medians, one thread.

    python benchmarks/backward.py            about eight minutes on one core
    python benchmarks/backward.py --quick    under three minutes

Model: the random 58M-parameter Llama of benchmarks/forward.py. Pairs of random tokens with P prompt and C, R response tokens. Ours: ⟨g+,g+⟩, ⟨g+,g−⟩,
⟨g−,g−⟩ over all parameters, and both log-probabilities. Rivals:

    lean step     one DPO micro-step as lean as plain torch gets: both sequences in one batch, logits at the response only, gradients accumulated
    transformers  out.loss.backward() of the same batch, labels on the response: full logits
    loop          the per-example loop: two backwards to weight gradients, lean logits, three dot products

All four costs are of the same pair. Figures are ours over each rival (below 1: ours is cheaper), and peak memory beyond the
model, in processes of their own.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import forward as plain
import numpy as np
import torch

from curate.measurements import MEASUREMENTS
from curate.passes.gradients import backward
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair, common_prefix

SHAPES = {"short": (100, 60, 60), "middle": (200, 150, 150), "long": (300, 290, 300)}
WANTED = [MEASUREMENTS["entk"], MEASUREMENTS["likelihood"]]


def make_pairs(shape: str, n: int, *, seed: int = 0, vocabulary: int = plain.VOCABULARY) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected = SHAPES[shape]
    pairs = []
    for _ in range(n):
        x, y, z = (rng.integers(3, vocabulary, k).astype(np.int32) for k in (prompt, chosen, rejected))
        a, b = np.concatenate([x, y]), np.concatenate([x, z])
        pairs.append(EncodedPair(Encoded(a, prompt), Encoded(b, prompt), common_prefix(a, b)))
    return pairs


def batch(pair: EncodedPair) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, longest) ids, padded on the right, and labels: −100 outside the responses."""
    longest = max(len(side.ids) for side in (pair.chosen, pair.rejected))
    ids, labels = torch.zeros(2, longest, dtype=torch.long), torch.full((2, longest), -100)
    for i, side in enumerate((pair.chosen, pair.rejected)):
        ids[i, : len(side.ids)] = torch.from_numpy(side.ids.astype(np.int64))
        labels[i, side.start : len(side.ids)] = ids[i, side.start : len(side.ids)]
    return ids, labels


def log_probabilities(module: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(sequences,) summed response log-probabilities; logits at the response only."""
    states = module.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    at = labels[:, 1:] != -100
    logits = torch.nn.functional.linear(states[at], module.lm_head.weight)
    token = -torch.nn.functional.cross_entropy(logits, labels[:, 1:][at], reduction="none")
    return torch.stack([part.sum() for part in token.split(at.sum(1).tolist())])


def lean_step(module: torch.nn.Module, pair: EncodedPair) -> None:
    chosen, rejected = log_probabilities(module, *batch(pair))
    (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))).backward()


def transformers_step(module: torch.nn.Module, pair: EncodedPair) -> None:
    ids, labels = batch(pair)
    module(input_ids=ids, labels=labels, use_cache=False).loss.backward()


def loop(module: torch.nn.Module, pair: EncodedPair) -> list[float]:
    parameters = list(module.parameters())
    sides = []
    for side in (pair.chosen, pair.rejected):
        ids = torch.from_numpy(side.ids.astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : side.start] = -100
        sides.append(torch.autograd.grad(log_probabilities(module, ids, labels).sum(), parameters))
    return [
        float(sum((a * b).sum().double() for a, b in zip(x, y)))
        for x, y in ((sides[0], sides[0]), (sides[0], sides[1]), (sides[1], sides[1]))
    ]


def ours(model: Model, pairs: list[EncodedPair]) -> np.ndarray:
    found = backward.measure(model, pairs, WANTED)
    return np.stack([found["entk_cc"], found["entk_cr"], found["entk_rr"]], 1)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error over |g||g'|."""
    scale = np.sqrt(np.stack([wanted[:, 0] ** 2, wanted[:, 0] * wanted[:, 2], wanted[:, 2] ** 2], 1))
    return float((np.abs(found - wanted) / scale).max())


RIVALS = ("ours", "lean", "transformers", "loop")


def runners(module: torch.nn.Module, model: Model | None, pairs: list[EncodedPair]) -> dict[str, Callable[[], object]]:
    """module takes gradients; model is ours."""
    return {
        "ours": lambda: ours(model, pairs),
        "lean": lambda: [lean_step(module, pair) for pair in pairs],
        "transformers": lambda: [transformers_step(module, pair) for pair in pairs],
        "loop": lambda: [loop(module, pair) for pair in pairs],
    }


def compare(module: torch.nn.Module, model: Model, n: int, rounds: int, shapes: list[str], weighed: list[str]) -> None:
    """shapes: what is timed; weighed: whose memory is measured too."""
    print(
        "| P, C, R | ours / lean step | ours / transformers | ours / loop | ms a pair | MB ours | lean | transformers | loop |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    trained = copy.deepcopy(module).requires_grad_(True)
    for shape in shapes:
        lengths = SHAPES[shape]
        runs = runners(trained, model, make_pairs(shape, n))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(plain.seconds(run))
        ratio = {name: statistics.median(o / t for o, t in zip(times["ours"], times[name])) for name in runs}
        peaks = [f"{peak(name, shape):.0f}" if shape in weighed else "-" for name in RIVALS]
        print(
            f"| {', '.join(map(str, lengths))} | {ratio['lean']:.2f} | {ratio['transformers']:.2f} | {ratio['loop']:.2f} "
            f"| {1000 * statistics.median(times['ours']) / n:.0f} | {' | '.join(peaks)} |",
            flush=True,
        )


def peak(name: str, shape: str) -> float:
    """Peak memory beyond the loaded model, MB, of one run over two pairs, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory", name, shape], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def report_peak(name: str, shape: str) -> None:
    module = plain.make_model()
    model = Model(module) if name == "ours" else None
    pairs = make_pairs(shape, 2)
    if model is None:
        module.requires_grad_(True)
    runners(module, model, make_pairs("short", 1))[name]()  # kernels, and the check against autograd
    for p in module.parameters():
        p.grad = None
    print(plain.extra_memory(runners(module, model, pairs)[name]))


def exactness(module: torch.nn.Module, model: Model, n: int) -> None:
    """Against two float64 backwards; the float32 loop beside it."""
    pairs = make_pairs("short", n)
    double = copy.deepcopy(module).double().requires_grad_(True)
    single = copy.deepcopy(module).requires_grad_(True)
    truth = np.asarray([loop(double, pair) for pair in pairs])
    beside = np.asarray([loop(single, pair) for pair in pairs])
    print(
        f"\nLargest error over |g||g'|, against float64: ours {error(ours(model, pairs), truth):.1e}, the float32 loop {error(beside, truth):.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pair eNTK: ours, a lean training step, transformers, the per-example loop."
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs and rounds")
    parser.add_argument("--memory", nargs=2, metavar=("WHO", "SHAPE"), help="only the peak memory of one run")
    given = parser.parse_args()
    quick = given.quick
    torch.set_num_threads(1)
    if given.memory:
        report_peak(*given.memory)
        return
    n, rounds = (2, 3) if quick else (2, 5)
    module = plain.make_model()
    model = Model(copy.deepcopy(module))
    size = sum(p.numel() for p in module.parameters()) / 1e6
    print(f"{model.engine}; {size:.0f}M parameters; {n} pairs, {rounds} rounds\n")
    ours(model, make_pairs("short", 1))  # the check against autograd comes once per model
    shapes, weighed = (["short", "middle"], ["middle"]) if quick else (list(SHAPES), list(SHAPES))
    compare(module, model, n, rounds, shapes, weighed)
    exactness(module, model, 1 if quick else 3)


if __name__ == "__main__":
    main()
