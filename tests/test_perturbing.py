"""Perturbations by a user's function, against the same perturbations written out as rows."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import curate
from curate.console import Progress
from curate.errors import UsageError
from curate.measurements.perturbations import perturbation
from curate.recipe.load import load_recipe
from curate.rows import Example
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

OWN = """
def other_names(prompt, answer):
    if prompt.startswith("zed"):
        return []
    return [prompt.replace("says", word) for word in ("sings", "says")] + [("the " + prompt, "t")]

def by_row(prompt, answer, row):
    return ("so " + prompt, row.completion)

def grade(text, answer):  # right or wrong as the very letters of text and answer have it
    return sum(map(ord, text + answer)) % 3 < 2

def one(prompt):
    return prompt

def number(prompt, answer):
    return 7

def fails(prompt, answer):
    return prompt[1000]
"""

CALLED = """
class Called:
    def __call__(self, prompt, answer):
        return "{word} " + prompt

called = Called()
"""

RECIPE = """
kind: sft
source: rows.jsonl
models: {reference: model}
engine: {sampler: transformers}
sampling: {samples: 1, temperature: 0, max_new_tokens: 6, grader: "own_changes_for_test:grade"}
scores: [limem]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own_changes_for_test.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own_changes_for_test", None)


def test_the_version_is_of_what_runs(own):
    """A file that is edited while a session goes on runs as it was imported; an object's code is its class."""
    file = own / "own_changes_for_test.py"
    file.write_text(OWN + CALLED.format(word="so"))
    before = [perturbation(f"own_changes_for_test:{name}", folder=own) for name in ("by_row", "called")]
    assert before[1].of(Example("a", "b", "c"))[0].prompt == "so a" and before[1].version != "unknown"
    file.write_text(OWN.replace('"so "', '"then "') + CALLED.format(word="then"))
    again = [perturbation(f"own_changes_for_test:{name}", folder=own) for name in ("by_row", "called")]
    assert [p.fingerprint for p in again] == [p.fingerprint for p in before]
    sys.modules.pop("own_changes_for_test")
    anew = [perturbation(f"own_changes_for_test:{name}", folder=own) for name in ("by_row", "called")]
    assert all(a.version != b.version for a, b in zip(anew, before))
    assert anew[1].of(Example("a", "b", "c"))[0].prompt == "then a"


def test_what_a_function_says(own):
    changed = perturbation("own_changes_for_test:other_names", folder=own)
    found = changed.of(Example("ada says", " a", "a"))
    assert found == [
        Example("ada sings", None, "a"),
        Example("the ada says", None, "t"),
    ]  # what changes nothing is none
    assert changed.of(Example("zed says", " z", "z")) == []
    talk = ({"role": "system", "content": "says"}, {"role": "user", "content": "ada says"})
    assert changed.of(Example(talk, None, "a"))[0].prompt == (talk[0], {"role": "user", "content": "ada sings"})
    by_row = perturbation("own_changes_for_test:by_row", folder=own)
    assert by_row.of(Example("ada says", " a", "a")) == [Example("so ada says", None, " a")]
    assert by_row.fingerprint != changed.fingerprint
    (own / "own_changes_for_test.py").write_text(OWN.replace('"so "', '"thus "'))
    sys.modules.pop("own_changes_for_test")
    again = perturbation("own_changes_for_test:by_row", folder=own)
    assert again.fingerprint != by_row.fingerprint  # its source is its version


@pytest.mark.parametrize(
    "name, words",
    [("one", r"a function of \(prompt, answer\)"), ("number", "returned 7 for row"), ("fails", "failed on row .* IndexError"),
     ("othr_names", "Did you mean 'other_names'")],
)  # fmt: skip
def test_functions_that_are_none(own, name, words):
    with pytest.raises(UsageError, match=words):
        perturbation(f"own_changes_for_test:{name}", folder=own).of(Example("ada says", " a", "a"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_limem_by_a_function_is_limem_by_rows(own):
    """The function's perturbations are sampled and graded as rows would be: the same scores, greedily; and only they are sampled anew."""
    make_llama(own / "model", seed=3)
    names = ["ada", "bea", "cy", "dot", "eve", "fay", "gil", "hal", "zed"]
    rows = [{"prompt": f"{name} says", "completion": f" {name[0]}", "answer": name[0]} for name in names]
    write(own / "rows.jsonl", rows)
    (own / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(UsageError, match="no perturbations; name a function"):
        curate.run(own / "recipe.yaml")
    by_ours = {"sampling.perturb": "own_changes_for_test:other_names"}
    tokens = []
    for store in (own / "store", own / "fresh"):  # the rows' own answers are there, or not
        loaded = load_recipe(own / "recipe.yaml", set=by_ours, store=store)
        (sampled,) = (s for s in make_plan(loaded, progress=Progress(quiet=True)).steps if s.reads == "sample")
        tokens.append(sampled.tokens)
    assert tokens[0] > 0 and tokens[1] == pytest.approx(
        2 * tokens[0], rel=0.1
    )  # prompts: counted there, estimated here
    found, again = (curate.run(own / "recipe.yaml", set=by_ours) for _ in range(2))
    assert found.measured == {"sample": 9} and again.measured == {}
    columns = "SELECT prompt, accuracy, perturbed_accuracy, n_perturbed, limem FROM scored ORDER BY prompt"
    by_function = {row["prompt"]: row for row in found.store.sql(columns).to_dicts()}

    written = [{"prompt": r["prompt"], "completion": r["completion"], "answer": r["answer"], "problem": i, "perturbed": False}
               for i, r in enumerate(rows)]  # fmt: skip
    for i, row in enumerate(rows[:-1]):
        for prompt, answer in ((row["prompt"].replace("says", "sings"), row["answer"]), ("the " + row["prompt"], "t")):
            written.append({"prompt": prompt, "completion": " x", "answer": answer, "problem": i, "perturbed": True})
    write(own / "written.jsonl", written)
    other = curate.run(own / "recipe.yaml", set={"source": "written.jsonl"}, store=own / "other").store
    by_rows = other.sql("SELECT prompt, accuracy, limem FROM scored WHERE NOT perturbed").to_dicts()
    assert len(by_rows) == 9
    for row in by_rows:
        ours = by_function[row["prompt"]]
        assert (ours["accuracy"], ours["limem"]) == (row["accuracy"], row["limem"])
    rates = [by_function[f"{name} says"]["perturbed_accuracy"] for name in names]
    assert rates[-1] is None and by_function["zed says"]["n_perturbed"] == 0
    assert len(set(rates[:-1])) > 2 and np.nanmax([r["limem"] or 0 for r in by_rows]) > 0  # they tell something
    assert found.store.sql("SELECT count(*) FROM samples").item() == 9  # of the rows, not of their perturbations
