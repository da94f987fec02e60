"""Graders and references are looked at before anything is sampled."""

from __future__ import annotations

import json
import sys

import polars as pl
import pytest

import curate
from curate.console import Progress
from curate.errors import UsageError
from curate.measurements.grading import grader
from curate.plan.references import _graded_by_themselves
from curate.recipe.load import load_recipe
from curate.rows import Example
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

OWN = """
def fails_on_nothing(text, answer):
    return text[0] == answer

def unknown(text, answer):
    return None

def nan(text, answer):
    return float("nan")

def one(text):
    return True
"""
RECIPE = """
kind: sft
source: rows.jsonl
models: {reference: model}
engine: {sampler: transformers}
sampling: {samples: 2, temperature: 1.0, max_new_tokens: 2, grader: gsm8k}
scores: [accuracy]
"""
GOOD = [
    {"prompt": "one", "completion": "so #### 1", "answer": "1"},
    {"prompt": "half", "completion": "#### 1/2", "answer": "1/2"},
]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "own_for_references.py").write_text(OWN)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    make_llama(tmp_path / "model", seed=3)

    def with_rows(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return tmp_path / "recipe.yaml"

    yield with_rows
    sys.modules.pop("own_for_references", None)


def notes(recipe, *settings):
    return "\n".join(make_plan(load_recipe(recipe, set=list(settings)), progress=Progress(quiet=True)).notes())


def test_rows_that_cannot_be_graded_are_counted_and_named(recipe):
    rows = [
        *GOOD,
        {"prompt": "void", "completion": "nothing", "answer": ""},
        {"prompt": "word", "completion": "it is 3", "answer": "3 or 4"},
    ]
    rows.append({"prompt": "bare", "completion": "I say seven", "answer": "7"})
    said = notes(recipe(*rows))
    assert "1 of 5 rows have no answer to compare with" in said
    assert "2 of 5 rows have a reference solution that is graded wrong by grader gsm8k" in said and "with '7'" in said
    result = curate.run(recipe(*rows))
    known = dict(result.store.sql("SELECT prompt, accuracy IS NOT NULL FROM scored").rows())
    assert known == {"one": True, "half": True, "void": False, "word": True, "bare": True}
    assert "reference" not in notes(recipe(*GOOD))


def test_an_answer_that_the_grader_cannot_read_is_unknown_not_wrong(recipe):
    rows = [{"prompt": f"which {x}", "completion": x, "answer": x} for x in ("A", "B", "E")]
    path = recipe(*rows)
    assert "1 of 3 rows have an answer that grader choice cannot read" in notes(path, "sampling.grader=choice")
    result = curate.run(path, set=["sampling.grader=choice"])
    known = result.store.sql("SELECT count(accuracy), count(n_samples) FROM scored").row(0)
    assert known == (2, 3)
    assert "cannot read" not in notes(path, "sampling.grader={choice: ABCDE}")


@pytest.mark.parametrize(
    "rows, settings",
    [
        ([{"prompt": "a", "completion": "b"}], []),
        ([{"prompt": "a", "completion": "It is 3.", "answer": "It is 3, or 4."}], ["sampling.grader=choice"]),
        ([{"prompt": "a", "answer": "three"}], ["sampling.grader=number"]),
    ],
)
def test_where_no_row_can_be_graded_nothing_is_sampled(recipe, rows, settings):
    path = recipe(*rows)
    for refused in (lambda: notes(path, *settings), lambda: curate.run(path, set=settings)):
        with pytest.raises(UsageError, match="No row can be graded, so nothing is sampled.*source.columns"):
            refused()
    assert not list((path.parent / "store").rglob("shards/*/*"))


@pytest.mark.parametrize(
    "name, words",
    [
        ("fails_on_nothing", r"failed on rows\.jsonl, row 1 \(row [0-9a-f]{20}\): IndexError"),
        ("unknown", r"returned None \(NoneType\) on rows\.jsonl, row 1 \(row .*expected True or False"),
        ("nan", "returned nan"),
        ("one", r"function of \(text, answer\)"),
        ("not_there", "has no 'not_there'"),
    ],
)
def test_a_grader_is_tried_before_anything_is_sampled(recipe, name, words):
    path = recipe(*GOOD)
    for refused in (notes, lambda path, setting: curate.run(path, set=[setting])):
        with pytest.raises(UsageError, match=words):
            refused(path, f"sampling.grader=own_for_references:{name}")
    assert not list((path.parent / "store").rglob("shards/*/*"))


def test_a_grader_that_fails_names_the_row_as_other_errors_do(recipe):
    """With its line, which is not its number behind a blank line; in the plan and, where only a sampled answer makes it fail, in the run."""
    (recipe(*GOOD).parent / "late_grader.py").write_text(
        "def grade(text, answer):\n    return {'so #### 1': True}[text] if answer == '1/2' and text != '#### 1/2' and text not in ('', "
        "'I do not know.') else True\n\ndef second(text, answer):\n    return None if answer == '1/2' else True\n"
    )
    path = recipe(*GOOD)
    (path.parent / "rows.jsonl").write_text(json.dumps(GOOD[0]) + "\n\n" + json.dumps(GOOD[1]) + "\n")
    wanted = r"on rows\.jsonl, row 2, line 3 \(row [0-9a-f]{20}\)"
    with pytest.raises(UsageError, match="returned None .*" + wanted):
        notes(path, "sampling.grader=late_grader:second")
    with pytest.raises(UsageError, match=f"failed {wanted}: KeyError"):
        curate.run(path, set=["sampling.grader=late_grader:grade"])
    sys.modules.pop("late_grader", None)


def test_answers_that_are_cut_or_empty_are_said(recipe):
    lines = []
    progress = Progress(quiet=True)
    progress.say = lines.append
    curate.run(recipe(*GOOD), progress=progress)
    assert any(
        "4 of 4 answers of model were cut at max_new_tokens 2" in line and "Raise it" in line for line in lines
    ), lines


@pytest.mark.parametrize(
    "path, columns, spec",
    [
        ("gsm8k/train_half.parquet", ["question", "answer", "final_answer"], "gsm8k"),
        ("gsm8k/test_half.parquet", ["question", "answer", "final_answer"], "number"),
        ("svamp/svamp.parquet", ["Body", "Answer", "Answer"], "gsm8k"),
        ("svamp/svamp.parquet", ["Body", "Equation", "Equation"], "math"),
        ("knights_knaves/kk_half.parquet", ["prompt", "answer", "answer"], "exact"),
    ],
)
def test_real_references_grade_themselves(shared, path, columns, spec):
    table = pl.read_parquet(shared / "data" / path).head(800)
    rows = [Example(str(prompt), str(text), str(answer)) for prompt, text, answer in zip(*(table[c] for c in columns))]
    found = _graded_by_themselves(grader(spec), rows)
    assert found.rows > 600 and not found.stopped and found.counts == {}, (found.counts, found.examples)
