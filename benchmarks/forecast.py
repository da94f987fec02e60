"""First-order forecasts beside the steps really taken, on real pairs with a real small model; and what they cost beside a training epoch.

    python benchmarks/forecast.py            about fifteen minutes on one core
    python benchmarks/forecast.py --quick    about three

    exact    derivatives by two forward passes against the exact product of every row's gradient: error over the spread, Spearman
    step     Δ log π(y+) and Δ margin of every pair after the step, against η·forecast: correlation, Spearman, share of signs that agree. One
             full-batch step of gradient descent, of torch's AdamW from nothing (forecast: sign) and from a warm-up's state (forecast: adam,
             momentum off), each at three sizes; then one epoch of real minibatch DPO. Pairs of the step, and as many held-out ones
    cost     the batch forecast of a whole set over one training epoch plus two packed forward passes, CPU time: 1,000 real pairs with the real
             small model, 1,000 of random tokens with a random Llama of 7M parameters, a few with one of 58M. The epoch: forward and backward
             of one pair or eight a step, whichever is cheaper, logits at the responses alone, gradients accumulated

Data and model: ../shared/data/hh_rlhf_harmless and ../shared/models/stories260K (260k parameters), beside the checkout.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import backward as rivals
import forward as plain
import influence
import numpy as np
import torch

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.gradients import derivatives as along
from curate.passes.gradients import mean as direction
from curate.passes.gradients.warmup import BETAS, WarmUp, warm_up
from curate.passes.loading.model import Model, load_model
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import EncodedPair, Limits, encode
from curate.rows import Pair

SHARED = Path(__file__).resolve().parents[2] / "shared"
FOLDER = SHARED / "models" / "stories260K"
BETA = 0.1
SIZES = (0.02, 0.5, 5.0)  # nats: how far the forecast says that a typical chosen response moves
PER_STEP = (1, 8)  # pairs a training step: the cheaper one is taken
BLOCK = 100  # pairs that ours and the trainer take in turns
SIDES = np.array([[1.0, 1.0], [0.0, -1.0]])  # (chosen, rejected) -> (chosen, margin)


def real_pairs(n: int, *, longest: int = 512, cut: bool = False) -> list[EncodedPair]:
    """The first n HH-RLHF harmlessness pairs of at most `longest` tokens; cut: of longer ones the end."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(SHARED / "data" / "hh_rlhf_harmless" / "pairs.parquet")
    tokenizer, pairs = load_tokenizer(FOLDER), []
    for row in (row for batch in table.to_batches(1000) for row in batch.to_pylist()):
        pair = encode(
            Pair(row["prompt"], row["chosen"], row["rejected"]),
            tokenizer,
            Limits(longest, "keep_end" if cut else "keep_start"),
        )
        if pair.problem is None and (cut or not pair.truncated):
            pairs.append(pair)
        if len(pairs) == n:
            return pairs
    raise SystemExit(f"wanted {n} pairs of at most {longest} tokens, found {len(pairs)}")


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


def epoch_of(module: torch.nn.Module, pairs: list[EncodedPair], per_step: int) -> None:
    """Forward and backward of every pair as a lean trainer does it: batches of `per_step` pairs padded on the right, logits at the responses
    alone, DPO's loss, gradients accumulated.
    """
    for i in range(0, len(pairs), per_step):
        sides = [side for pair in pairs[i : i + per_step] for side in (pair.chosen, pair.rejected)]
        longest = max(len(side.ids) for side in sides)
        ids, labels = torch.zeros(len(sides), longest, dtype=torch.long), torch.full((len(sides), longest), -100)
        for k, side in enumerate(sides):
            ids[k, : len(side.ids)] = torch.from_numpy(side.ids.astype(np.int64))
            labels[k, side.start : len(side.ids)] = ids[k, side.start : len(side.ids)]
        logp = rivals.log_probabilities(module, ids, labels).view(-1, 2)
        (-torch.nn.functional.logsigmoid(BETA * (logp[:, 0] - logp[:, 1]))).sum().backward()


def cost(name: str, module: torch.nn.Module, pairs: list[EncodedPair]) -> None:
    """CPU seconds of the whole set, ours and a trainer's taken in turns, a block of pairs each."""
    model, trained, n = Model(copy.deepcopy(module)), module.requires_grad_(True), len(pairs)
    blocks = [pairs[i : i + BLOCK] for i in range(0, n, BLOCK)]
    seconds = dict.fromkeys(("epoch", "passes", "G", "check", "along"), 0.0)

    def timed(part: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = run()
        seconds[part] += time.process_time() - start
        return found

    epoch_of(trained, pairs[:2], 2)
    per_step = min(PER_STEP, key=lambda k: plain.seconds(lambda: epoch_of(trained, pairs[: max(PER_STEP)], k)))
    logps(model, pairs[:2])
    weigh, total = direction.dpo_weights(BETA, n), None
    for block in blocks:
        timed("epoch", lambda block=block: epoch_of(trained, block, per_step))
        timed("passes", lambda block=block: [logps(model, block) for _ in range(2)])
        step = timed("G", lambda block=block: direction.accumulate(model, block, weigh))
        total = step if total is None else {key: total[key].add_(x) for key, x in step.items()}
    v = timed("G", lambda: direction.precondition(total, "sign", total))
    with along.Line(model, v) as line:
        epsilon = timed("check", lambda: along.choose_epsilon(line, pairs))
        for block in blocks:
            timed("along", lambda block=block: along.derivatives(line, block, epsilon.value))
    ratio = (seconds["G"] + seconds["check"] + seconds["along"]) / (seconds["epoch"] + seconds["passes"])
    tokens = sum(len(side.ids) for pair in pairs for side in (pair.chosen, pair.rejected))
    parts = " | ".join(f"{x:.1f}" for x in seconds.values())
    print(
        f"| {name} | {n:,} | {tokens / n:.0f} | {per_step} | {parts} | {epsilon.error:.0e} | {ratio:.2f} |", flush=True
    )


def costs(quick: bool) -> None:
    print(
        "\n## Cost of the batch forecast of a whole set, CPU seconds\n\n| model and pairs | pairs | tokens a pair | pairs a step | epoch "
        "| two forward passes | G | checking ε | along the step | its error | (G + ε + along) / (epoch + two passes) |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    if FOLDER.is_dir():
        module = load_model(FOLDER, dtype="float32", device="cpu").module
        cost("stories260K, HH-RLHF", module, real_pairs(800))
        cost("stories260K, HH-RLHF cut to the last 256 tokens", module, real_pairs(1000, longest=256, cut=True))
    sets = (
        [(plain, 12, "short")]
        if quick
        else [(influence, 1000, "short"), (plain, 12, "short"), (plain, 24, "middle"), (plain, 24, "long")]
    )
    for home, n, shape in sets:
        module = home.make_model()
        size = sum(p.numel() for p in module.parameters()) / 1e6
        lengths = ", ".join(map(str, rivals.SHAPES[shape]))
        cost(f"random Llama of {size:.0f}M, {lengths}", module, rivals.make_pairs(shape, n, vocabulary=home.VOCABULARY))


def main() -> None:
    parser = argparse.ArgumentParser(description="First-order forecasts: exactness, the step really taken, cost.")
    parser.add_argument("--quick", action="store_true", help="fewer pairs and rounds")
    parser.add_argument("--only", choices=("exact", "step", "cost"), help="one of the parts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    n, exact = (100, 40) if given.quick else (200, 120)
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
        costs(given.quick)


if __name__ == "__main__":
    main()
