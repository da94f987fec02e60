"""First-order forecasts beside the steps really taken, on real pairs with a real small model; and what they cost beside a training epoch.

    python benchmarks/forecast.py            about fifteen minutes on one core
    python benchmarks/forecast.py --quick    about three

    exact    derivatives by two forward passes against the exact product of every row's gradient: error over the spread, Spearman
    step     Δ log π(y+) and Δ margin of every pair after the step, against η·forecast: correlation, Spearman, share of signs that agree. One
             full-batch step of gradient descent, of torch's AdamW from nothing (forecast: sign) and from a warm-up's state (forecast: adam,
             momentum off), each at three sizes; then one epoch of real minibatch DPO. Pairs of the step, and as many held-out ones
    cost     a random Llama of 58M parameters: the batch forecast of a whole set over one training epoch plus two packed forward passes, CPU
             time. The epoch: one pair a step, both sequences in one batch, logits at the responses alone, gradients accumulated
             (benchmarks/backward.py's lean step)

Data and model: ../shared/data/hh_rlhf_harmless and ../shared/models/stories260K (260k parameters), beside the checkout.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import backward as rivals
import forward as plain
import numpy as np
import torch

from curate.measurements import MEASUREMENTS
from curate.passes import derivatives as along
from curate.passes import direction, forward
from curate.passes.model import Model, load_model
from curate.passes.warmup import BETAS, WarmUp, warm_up
from curate.rows import Pair
from curate.tokens import EncodedPair, Limits, encode, load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
FOLDER = SHARED / "models" / "stories260K"
BETA = 0.1
SIZES = (0.02, 0.5, 5.0)  # nats: how far the forecast says that a typical chosen response moves
SIDES = np.array([[1.0, 1.0], [0.0, -1.0]])  # (chosen, rejected) -> (chosen, margin)


def real_pairs(n: int) -> list[EncodedPair]:
    """The first n HH-RLHF harmlessness pairs that the model's 512 tokens hold."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(SHARED / "data" / "hh_rlhf_harmless" / "pairs.parquet").slice(0, 3 * n).to_pylist()
    tokenizer = load_tokenizer(FOLDER)
    pairs = [encode(Pair(row["prompt"], row["chosen"], row["rejected"]), tokenizer, Limits(512)) for row in table]
    return [pair for pair in pairs if pair.problem is None and not pair.truncated][:n]


def logps(model: Model, pairs: list[EncodedPair]) -> np.ndarray:
    """(pairs, 2)"""
    found = forward.measure(model, pairs, [MEASUREMENTS["likelihood"]])
    return np.stack([found["chosen_logp"], found["rejected_logp"]], 1)


def forecast(model: Model, pairs: list[EncodedPair], v: direction.Vector) -> tuple[np.ndarray, along.Epsilon]:
    """(pairs, 2) along v."""
    with along.Line(model, v) as line:
        epsilon = along.choose_epsilon(line, pairs)
        return along.derivatives(line, pairs, epsilon.value).derivative, epsilon


def agreement(forecasts: np.ndarray, changes: np.ndarray) -> str:
    """Both (pairs,)."""
    signs = np.mean(np.sign(forecasts) == np.sign(changes))
    return f"{np.corrcoef(forecasts, changes)[0, 1]:.4f} | {along.spearman(forecasts, changes):.4f} | {signs:.3f}"


def exactness(model: Model, pairs: list[EncodedPair], vectors: dict[str, direction.Vector]) -> None:
    print(
        f"\n## Derivatives against exact products, {len(pairs)} pairs\n\n| direction | ε | response: error / spread | Spearman | margin | Spearman |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, v in vectors.items():
        found, epsilon = forecast(model, pairs, v)
        exact = along.exact_products(model, pairs, v)
        cells = []
        for a, b in zip((found @ SIDES).T, (exact @ SIDES).T):
            cells.append(f"{np.sqrt(np.mean((a - b) ** 2)) / b.std():.1e} | {along.spearman(a, b):.6f}")
        print(f"| {name} | {epsilon.value:.1e} | {' | '.join(cells)} |", flush=True)


def stepped(
    module: torch.nn.Module, step: direction.Vector, kind: str, rate: float, moments: direction.Vector
) -> Model:
    """One full-batch step of torch's own optimizer on the mean DPO loss, whose gradient is −step."""
    moved = copy.deepcopy(module).requires_grad_(True)
    parameters = dict(moved.named_parameters())
    for name, p in parameters.items():
        p.grad = -step[name]
    if kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters.values(), lr=rate)
    else:
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=rate, weight_decay=0.0, betas=(0.0 if kind == "adam" else BETAS[0], BETAS[1])
        )
    if kind == "adam":
        for name, p in parameters.items():  # v̂ as after very many steps, so that no bias is corrected
            optimizer.state[p] = {
                "step": torch.tensor(1e6),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": moments[name].clone(),
            }
    optimizer.step()
    return Model(moved.requires_grad_(False))


def one_step(model: Model, train: list[EncodedPair], held: list[EncodedPair], moments: direction.Vector) -> None:
    step = direction.accumulate(model, train, direction.dpo_weights(BETA, len(train)))
    every = [*train, *held]
    before = logps(model, every)
    head = along.head_derivatives(
        model, every, direction.accumulate_head(model, train, direction.dpo_weights(BETA, len(train)))
    )
    print(
        f"\n## One step on {len(train)} pairs, {len(held)} held out: forecast against what happened\n\n"
        "| step | forecast moves a chosen response by | Δ of | pairs of the step: r | Spearman | signs | held out: r | Spearman | signs |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in ("sgd", "sign", "adam"):
        found, _ = forecast(model, every, direction.precondition(step, kind, step, moments))
        for size in SIZES:
            rate = size / float(np.sqrt(np.mean(found[:, 0] ** 2)))
            change = (logps(stepped(model.module, step, kind, rate, moments), every) - before) @ SIDES
            shown = [("chosen", (found @ SIDES)[:, 0], change[:, 0]), ("margin", (found @ SIDES)[:, 1], change[:, 1])]
            if kind == "sgd":
                shown.append(("chosen, by head_forecast", head[:, 0], change[:, 0]))
            name = {"sgd": "SGD", "sign": "AdamW, its first", "adam": "AdamW after a warm-up"}[kind]
            for what, a, b in shown:
                n = len(train)
                print(
                    f"| {name} | {size:g} nats | {what} | {agreement(a[:n], b[:n])} | {agreement(a[n:], b[n:])} |",
                    flush=True,
                )


def one_epoch(model: Model, train: list[EncodedPair], held: list[EncodedPair], moments: direction.Vector) -> None:
    """Real minibatch DPO with AdamW, against forecasts at the reference."""
    step = direction.accumulate(model, train, direction.dpo_weights(BETA, len(train)))
    every = [*train, *held]
    before = logps(model, every)
    forecasts = {
        kind: forecast(model, every, direction.precondition(step, kind, step, moments))[0]
        for kind in ("sgd", "sign", "adam")
    }
    print(
        "\n## One epoch of DPO with AdamW, batches of 16 pairs\n\n| learning rate | mean Δ margin | mean Δ chosen | forecast | Δ of "
        "| trained pairs: r | Spearman | signs | held out: r | Spearman | signs |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for rate in (1e-5, 1e-4):
        trained = Model(copy.deepcopy(model.module))
        warm_up(trained, train, WarmUp(len(train) // 16, 16, rate, BETA))
        change = (logps(trained, every) - before) @ SIDES
        n = len(train)
        for kind, found in forecasts.items():
            for i, what in enumerate(("chosen", "margin")):
                a, b = (found @ SIDES)[:, i], change[:, i]
                moved = f"{change[:n, 1].mean():.2f} | {change[:n, 0].mean():.2f}"
                print(
                    f"| {rate:g} | {moved} | {kind} | {what} | {agreement(a[:n], b[:n])} | {agreement(a[n:], b[n:])} |",
                    flush=True,
                )


def cost(n: int, shapes: list[str], rounds: int) -> None:
    """CPU seconds, medians of interleaved rounds."""
    module = plain.make_model()
    model, trained = Model(copy.deepcopy(module)), module.requires_grad_(True)
    print(f"\n## Cost, {model.engine}, {sum(p.numel() for p in module.parameters()) / 1e6:.0f}M parameters\n")
    print(
        "| P, C, R | pairs | epoch, s | two forward passes | G | checking ε | along the step | "
        "(G + ε + along) / (epoch + two passes) | at 1,000 pairs |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in shapes:
        pairs = rivals.make_pairs(shape, n)
        found: dict[str, list[float]] = {name: [] for name in ("epoch", "passes", "G", "check", "along")}

        def timed(name: str, run, found=found):
            start = time.process_time()
            result = run()
            found[name].append(time.process_time() - start)
            return result

        for _ in range(rounds):
            timed("epoch", lambda pairs=pairs: [rivals.lean_step(trained, pair) for pair in pairs])
            timed("passes", lambda pairs=pairs: [logps(model, pairs) for _ in range(2)])
            step = timed("G", lambda pairs=pairs: direction.accumulate(model, pairs, direction.dpo_weights(BETA, n)))
            v = direction.precondition(step, "sign", step)
            with along.Line(model, v) as line:
                epsilon = timed("check", lambda pairs=pairs, line=line: along.choose_epsilon(line, pairs))
                timed("along", lambda pairs=pairs, line=line, e=epsilon: along.derivatives(line, pairs, e.value))
        t = {name: float(np.median(values)) for name, values in found.items()}
        ratio = (t["G"] + t["check"] + t["along"]) / (t["epoch"] + t["passes"])
        large = (1000 / n * (t["G"] + t["along"]) + t["check"]) / (1000 / n * (t["epoch"] + t["passes"]))
        parts = " | ".join(f"{t[name]:.1f}" for name in ("epoch", "passes", "G", "check", "along"))
        print(
            f"| {', '.join(map(str, rivals.SHAPES[shape]))} | {n} | {parts} | {ratio:.2f} | {large:.2f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="First-order forecasts: exactness, the step really taken, cost.")
    parser.add_argument("--quick", action="store_true", help="fewer pairs and rounds")
    parser.add_argument("--only", choices=("exact", "step", "cost"), help="one of the parts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    n, exact, timed = (100, 40, 12) if given.quick else (200, 120, 24)
    if given.only != "cost" and not FOLDER.is_dir():
        print("../shared (real pairs and tiny models) is not beside this checkout: only the cost is measured.")
        given.only = "cost"
    if given.only in (None, "exact", "step"):
        pairs = real_pairs(2 * n)
        train, held = pairs[:n], pairs[n : 2 * n]
        model = load_model(FOLDER, dtype="float32", device="cpu")
        moments = warm_up(Model(copy.deepcopy(model.module)), train, WarmUp(30, 16, 1e-5, BETA))
        if given.only != "step":
            some = train[:exact]
            step = direction.accumulate(model, some, direction.dpo_weights(BETA, len(some)))
            chosen = direction.accumulate(model, some, direction.fixed_weights(1 / len(some), 0))
            vectors = {
                f"G, {kind}": direction.precondition(step, kind, step, moments) for kind in ("sgd", "sign", "adam")
            }
            vectors |= {
                f"mean chosen, {kind}": direction.precondition(chosen, kind, step, moments)
                for kind in ("sgd", "sign", "adam")
            }
            exactness(model, some, vectors)
        if given.only != "exact":
            one_step(model, train, held, moments)
            one_epoch(model, train, held, moments)
    if given.only in (None, "cost"):
        cost(timed, ["short", "middle"] if given.quick else list(rivals.SHAPES), 1 if given.quick else 3)


if __name__ == "__main__":
    main()
