"""The demo's rows: determined by the seed, disjoint, and right by an evaluation of their equations that knows nothing of the generator."""

from __future__ import annotations

import json
import math
import operator
import random
import re
from collections import Counter

import pytest

from curate.jobs.demo import task

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.fixture(scope="module")
def rows():
    return task.splits(seed=3)


def evaluate(left: str) -> int:
    """Left to right over the words of an equation's left side."""
    first, *rest = left.split()
    value = int(first)
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        value = OPERATIONS[sign](value, int(operand))
    return value


def solve(prompt: str) -> int:
    """A second way to the answer: from the prompt's story alone."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    if prompt.endswith("Which is more?"):
        return max(numbers)
    signs = [1 if verb in task.GAINS else -1 for verb in re.findall(r" (\w+) \d", prompt)[1:] if verb != "of"]
    bags = "bags of" in prompt
    start, changes = (numbers[0] * numbers[1], numbers[2:]) if bags else (numbers[0], numbers[1:])
    return start + sum(sign * n for sign, n in zip(signs, changes, strict=True))


def test_the_seed_determines_the_rows(rows):
    assert task.splits(seed=3) == rows
    assert task.splits(seed=4)["train"] != rows["train"]


def test_a_larger_pool_of_rows_starts_with_the_smaller(rows):
    more = task.splits(seed=3, train=600)
    assert more["test"] == rows["test"]
    assert {row.prompt for row in more["train"]}.isdisjoint(row.prompt for row in rows["pool"])


def test_no_prompt_occurs_twice(rows):
    prompts = [row.prompt for part in rows.values() for row in part]
    assert len(prompts) == len(set(prompts)) == 500 + 200 + 600


def test_cells_are_equally_frequent(rows):
    for part in rows.values():
        counts = Counter(row.cell for row in part)
        assert set(counts) == set(task.CELLS)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_every_equation_holds_and_the_answer_follows_from_the_prompt(rows):
    for row in rows["train"] + rows["test"]:
        equations = re.findall(r": (.+?)\.", row.completion)
        for equation in equations:
            if "<" in equation:
                small, large = equation.split(" < ")
                assert int(small) < int(large) == int(row.answer)
            else:
                left, value = equation.split(" = ")
                assert evaluate(left) == int(value)
        assert solve(row.prompt) == int(row.answer), row
        assert row.completion.endswith(f". The answer is {row.answer}")


def test_the_values_are_the_cell_s(rows):
    steps = {"add1": 1, "add2": 2, "add3": 3, "times1": 1, "times2": 2, "big1": 2, "big2": 2, "pick1": 1}
    for row in rows["train"]:
        numbers = [int(n) for n in re.findall(r"\d+", row.prompt + row.completion)]
        assert len(re.findall(": ", row.completion)) == steps[row.cell]
        assert max(numbers) <= (task.LARGEST if row.cell.startswith("add") else 99)
        if row.cell.startswith("big"):
            a, b = (int(n) for n in re.findall(r"\d+", row.prompt))
            assert (a % 10 + b % 10 >= 10) == (row.cell == "big2")


def test_two_filler_words_stand_before_every_step_and_before_the_end(rows):
    for row in rows["train"]:
        assert row.n_fillers == 2 * (row.completion.count(": ") + 1)
    words = Counter(word for row in rows["train"] for word in row.completion.split() if word in task.FILLERS)
    assert len(words) == len(task.FILLERS) == 40
    assert max(words.values()) < 3 * min(words.values())


def test_irreducible_nll_by_hand():
    row = task.Problem("", " it count: 4 + 5 = 9. right clearly. The answer is 9", "9", "add1")
    assert task.irreducible_nll(row, n_tokens=18) == pytest.approx(4 * math.log(40) / 18)


def test_the_recipes_grader_takes_the_solutions_and_no_others(rows):
    from curate.measurements.grading import grader

    grade = grader("gsm8k").grade
    rng = random.Random(0)
    for row in rows["test"]:
        assert grade(row.completion, row.answer)
        assert not grade(row.completion, str(int(row.answer) + rng.randint(1, 9)))
        assert not grade(row.completion.split(" The answer")[0] + " The answer is", row.answer)


def test_jsonl_holds_the_columns_of_a_source(tmp_path, rows):
    file = task.write_jsonl(tmp_path / "new" / "train.jsonl", rows["train"][:5])
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [list(row) for row in found] == [["prompt", "completion", "answer", "cell"]] * 5
    assert found[2]["prompt"] == rows["train"][2].prompt
