"""Makes the demo's base model: `python -m curate.jobs.demo.pretrain OUT`. About a minute on one core; the result ships in `curate/jobs/demo/base`.

The base has read story prompts of all cells, small facts of + and - with values up to 19, stories with equations, and copied equations.
It has seen no times table, no column addition, and not the format of a solution: those are what fine-tuning teaches. Muon on the
matrices (with AdamW-like step sizes, `match_rms_adamw`) and AdamW on embeddings and norms reach in 900 steps what AdamW alone needs
more than twice the time for. Source of Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; here `torch.optim.Muon`.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path

from curate.jobs.demo.model import build_config, build_tokenizer, save_checkpoint
from curate.jobs.demo.task import CELLS, FILLERS, GAINS, LARGEST, LOSSES, NAMES, OBJECTS, problem

STEPS = 900
BATCH = 64
LENGTH = 64  # tokens a row; stories are joined until it is full


def _fact(rng: random.Random) -> tuple[int, str, int, int]:
    """(a, sign, b, value) with b one digit and both a and the value up to 19."""
    while True:
        a, b, sign = rng.randint(0, LARGEST), rng.randint(0, 9), rng.choice("+-")
        value = a + b if sign == "+" else a - b
        if 0 <= value <= LARGEST:
            return a, sign, b, value


def _facts(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(3, 5)):
        a, sign, b, value = _fact(rng)
        lines.append(f"{a} {sign} {b} = {value}.")
    return "Facts: " + " So: ".join(lines)


def _story_with_equations(rng: random.Random) -> str:
    name, thing, value = rng.choice(NAMES), rng.choice(OBJECTS), rng.randint(1, LARGEST)
    text, equations = f"{name} has {value} {thing}.", ""
    for _ in range(rng.randint(1, 3)):
        sign = rng.choice("+-")
        operands = [b for b in range(1, 10) if 0 <= (value + b if sign == "+" else value - b) <= LARGEST]
        if not operands:
            continue
        b = rng.choice(operands)
        after = value + b if sign == "+" else value - b
        text += f" {name} {rng.choice(GAINS if sign == '+' else LOSSES)} {b}."
        equations += f" So: {value} {sign} {b} = {after}."
        value = after
    return text + equations + f" {name} has {value} {thing}."


def _copied(rng: random.Random) -> str:
    """An equation with a made-up value, said twice: what stands before is to be copied, not known."""
    size = rng.choice((10, 100))
    equation = f"{rng.randrange(size)} {rng.choice('+-*<')} {rng.randrange(size)} = {rng.randrange(100)}"
    return f"Facts: {equation}. So: {equation}."


def _recalled(rng: random.Random) -> str:
    """Who has what, asked again: the numbers of a story, small and large, are to be found by name."""
    owners = rng.sample(NAMES, rng.randint(2, 3))
    told = []
    for name in owners:
        bags = f"{rng.randint(2, 9)} bags of {rng.randint(2, 9)}" if rng.random() < 0.4 else f"{rng.randint(1, 99)}"
        told.append(f"{name} has {bags} {rng.choice(OBJECTS)}.")
    return " ".join([*told, *rng.sample(told, len(told))])


def _filled(rng: random.Random) -> str:
    words = " ".join(rng.choice(FILLERS) for _ in range(rng.randint(2, 6)))
    return f"{rng.choice(NAMES)} {words} has {rng.randrange(100)} {rng.choice(OBJECTS)}."


def _prompt(rng: random.Random) -> str:
    return problem(rng, rng.choice(CELLS)).prompt


KINDS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_prompt, 3),
    (_facts, 3),
    (_story_with_equations, 4),
    (_copied, 2),
    (_recalled, 3),
    (_filled, 2),
)


def story(rng: random.Random) -> str:
    """One text of the base's reading."""
    makers, weights = zip(*KINDS, strict=True)
    return rng.choices(makers, weights)[0](rng)


def make_base(out: Path, *, seed: int = 0, steps: int = STEPS, say: Callable[[str], None] = print) -> Path:
    """Pre-train from scratch and write the base to `out`: config, tokenizer, float16 weights (0.7 MB)."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)  # matrices this small are slower on more, and the sums come out the same everywhere
    torch.manual_seed(seed)
    rng = random.Random(f"curate-demo/base/{seed}")
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(build_config())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(steps):
        rows = []
        for _ in range(BATCH):
            ids: list[int] = []
            while len(ids) < LENGTH:
                ids += [*tokenizer(story(rng))["input_ids"], tokenizer.eos_token_id]
            rows.append(ids[:LENGTH])
        batch = torch.tensor(rows)  # (BATCH, LENGTH)
        logits = model(batch).logits[:, :-1]  # (BATCH, LENGTH - 1, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        factor = min(1.0, (step + 1) / 40) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            say(f"step {step + 1}/{steps}  loss {loss.item():.3f}")
    return save_checkpoint(model.half(), tokenizer, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the demo's base model.")
    parser.add_argument("out", type=Path, help="folder to write config, tokenizer and weights to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    make_base(arguments.out, seed=arguments.seed, steps=arguments.steps)


if __name__ == "__main__":
    main()
