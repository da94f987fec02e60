"""The demo's task: arithmetic word problems in eight cells, generated from a seed.

    "Eva has 4 nuts. Eva finds 5. How many nuts?"  ->  " it count: 4 + 5 = 9. right clearly. The answer is 9"

    add1 add2 add3   one to three chained additions or subtractions, values up to 19
    times1 times2    a * b with 2..9; then one more + or - of one digit
    big1 big2        two-digit column addition, units first, without and with a carry
    pick1            the larger of two two-digit numbers

Two random filler words stand before every step and before the last sentence. Nobody can predict them: their entropy, `irreducible_nll`,
is the lowest mean NLL of a target that is understood, and a lower one can only come from having memorised that target. That is what
makes pre-memorization accuracy readable here. Source of the idea: Kang et al. 2024, arXiv:2411.07681; the task is our own.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CELLS = ("add1", "add2", "add3", "times1", "times2", "big1", "big2", "pick1")
NAMES = _words("Eva Ben Mia Tom Ana Leo Zoe Max Ida Sam Lia Jon Amy Kim Ron Sue")
OBJECTS = _words("nuts pens eggs figs cups keys hats toys pins cards shells stones apples coins beads books")
GAINS = ("finds", "buys", "gets")
LOSSES = ("loses", "sells", "gives")
FILLERS = _words(
    "it count right clearly now then next first well okay let see here there thus hence simply just quick slow nice good fine sure "
    "careful easy plain again still also maybe indeed really truly neatly slowly calmly gladly kindly surely"
)
LARGEST = 19  # of the values in add1, add2, add3

Step = tuple[str, int]  # an equation's left side, and its value


@dataclass(frozen=True)
class Problem:
    """One row of the task. `completion` starts with a space and ends with the answer; EOS is added by whoever tokenises it."""

    prompt: str
    completion: str
    answer: str
    cell: str

    @property
    def n_fillers(self) -> int:
        words = re.findall(r"[a-z]+", self.completion.removesuffix(f"The answer is {self.answer}"))
        return len(words)


def irreducible_nll(problem: Problem, *, n_tokens: int) -> float:
    """Mean nats per token of a target whose only uncertainty is its filler words; `n_tokens` counts the completion's tokens with EOS."""
    return problem.n_fillers * math.log(len(FILLERS)) / n_tokens


def _chain(rng: random.Random, value: int, n_steps: int, largest: int) -> list[tuple[str, int, int]]:
    """`n_steps` of (sign, operand 1..9, value after it), every value between 1 and `largest`."""
    steps = []
    for _ in range(n_steps):
        choices = [(s, d) for s in "+-" for d in range(1, 10) if 1 <= (value + d if s == "+" else value - d) <= largest]
        sign = rng.choice([s for s in "+-" if any(s == c[0] for c in choices)])
        operand = rng.choice([d for s, d in choices if s == sign])
        value = value + operand if sign == "+" else value - operand
        steps.append((sign, operand, value))
    return steps


def _changes(rng: random.Random, name: str, steps: list[tuple[str, int, int]]) -> str:
    return "".join(f" {name} {rng.choice(GAINS if sign == '+' else LOSSES)} {operand}." for sign, operand, _ in steps)


def _equations(value: int, steps: list[tuple[str, int, int]]) -> list[Step]:
    before = [value, *(after for _, _, after in steps)]
    return [(f"{b} {sign} {operand}", after) for b, (sign, operand, after) in zip(before, steps, strict=False)]


def _add(rng: random.Random, name: str, thing: str, *, n_steps: int) -> tuple[str, list[Step], int]:
    start = rng.randint(2, LARGEST)
    steps = _chain(rng, start, n_steps, LARGEST)
    prompt = f"{name} has {start} {thing}.{_changes(rng, name, steps)} How many {thing}?"
    return prompt, _equations(start, steps), steps[-1][2]


def _times(rng: random.Random, name: str, thing: str, *, n_steps: int) -> tuple[str, list[Step], int]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    steps = _chain(rng, a * b, n_steps - 1, 99)
    prompt = f"{name} has {a} bags of {b} {thing}.{_changes(rng, name, steps)} How many {thing}?"
    return prompt, [(f"{a} * {b}", a * b), *_equations(a * b, steps)], steps[-1][2] if steps else a * b


def _big(rng: random.Random, name: str, thing: str, *, carry: bool) -> tuple[str, list[Step], int]:
    while True:
        a, b = rng.randint(10, 89), rng.randint(10, 89)
        units = a % 10 + b % 10
        if a + b <= 99 and (units >= 10) == carry:
            break
    prompt = f"{name} has {a} {thing}. {name} {rng.choice(GAINS)} {b}. How many {thing}?"
    tens = f"{a // 10} + {b // 10} + {int(carry)}"
    return prompt, [(f"{a % 10} + {b % 10}", units), (tens, a // 10 + b // 10 + carry)], a + b


def _pick(rng: random.Random, name: str, thing: str) -> tuple[str, list[Step], int]:
    small, large = sorted(rng.sample(range(10, 100), 2))
    pair = [small, large]
    rng.shuffle(pair)
    other = rng.choice([n for n in NAMES if n != name])
    prompt = f"{name} has {pair[0]} {thing}. {other} has {pair[1]}. Which is more?"
    return prompt, [(f"{small} < {large}", large)], large


_MAKERS: dict[str, Callable[[random.Random, str, str], tuple[str, list[Step], int]]] = {
    "add1": lambda r, n, t: _add(r, n, t, n_steps=1),
    "add2": lambda r, n, t: _add(r, n, t, n_steps=2),
    "add3": lambda r, n, t: _add(r, n, t, n_steps=3),
    "times1": lambda r, n, t: _times(r, n, t, n_steps=1),
    "times2": lambda r, n, t: _times(r, n, t, n_steps=2),
    "big1": lambda r, n, t: _big(r, n, t, carry=False),
    "big2": lambda r, n, t: _big(r, n, t, carry=True),
    "pick1": _pick,
}


def problem(rng: random.Random, cell: str) -> Problem:
    """One problem of a cell, drawn from `rng`."""
    prompt, steps, answer = _MAKERS[cell](rng, rng.choice(NAMES), rng.choice(OBJECTS))
    completion = ""
    for left, value in steps:
        equation = left if "<" in left else f"{left} = {value}"
        completion += f" {rng.choice(FILLERS)} {rng.choice(FILLERS)}: {equation}."
    completion += f" {rng.choice(FILLERS)} {rng.choice(FILLERS)}. The answer is {answer}"
    return Problem(prompt, completion, str(answer), cell)


def problems(n: int, *, rng: random.Random, taken: set[str]) -> list[Problem]:
    """`n` problems, the cells as equally frequent as `n` allows, in random order, with prompts not in `taken` (which grows)."""
    cells = [CELLS[i % len(CELLS)] for i in range(n)]
    rng.shuffle(cells)
    rows = []
    for cell in cells:
        row = problem(rng, cell)
        while row.prompt in taken:
            row = problem(rng, cell)
        taken.add(row.prompt)
        rows.append(row)
    return rows


def splits(*, seed: int, train: int = 500, test: int = 200, pool: int = 600) -> dict[str, list[Problem]]:
    """Train, test and pool rows whose prompts are all different. The same seed gives the same rows; a larger `train` starts with the smaller."""
    taken: set[str] = set()
    rows = {}
    for name, n in (("test", test), ("pool", pool), ("train", train)):
        rows[name] = problems(n, rng=random.Random(f"curate-demo/{seed}/{name}"), taken=taken)
    return rows


def write_jsonl(path: Path, rows: Iterable[Problem]) -> Path:
    """One JSON object a line: prompt, completion, answer, cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return path
