"""A recipe means what its writer wrote: YAML 1.1's booleans, octals, dates and sixties are text, names keep their zeros, keys stand once."""

from __future__ import annotations

import pytest
import yaml

from curate.errors import UsageError
from curate.measurements.grading import grader
from curate.recipe.load import load_recipe
from curate.recipe.yaml import plain_scalar, read_yaml

#  written without quotes -> meant
MEANT = [
    ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("OFF", "OFF"), ("y", "y"), ("012", "012"), ("0o17", 15), ("0x1F", 31), ("12:30", "12:30"),
    ("2026-01-01", "2026-01-01"), ("1e-6", 1e-6), ("1E5", 1e5), ("1_000", 1000), (".5", 0.5), ("-3", -3), ("+1.5", 1.5), ("1.10", 1.1),
    ("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("nullish", "nullish"), ("1.2.3", "1.2.3"), ("007.5", "007.5"),
    (".inf", float("inf")), ("-.INF", -float("inf")),
]  # fmt: skip


@pytest.mark.parametrize(("written", "meant"), MEANT)
def test_words_without_quotes(written, meant):
    assert plain_scalar(written) == meant and type(plain_scalar(written)) is type(meant)
    assert read_yaml(f"a: [{written or '~'}]")[0] == {"a": [meant]}
    assert read_yaml(f"a: '{written}'")[0] == read_yaml(f"a: !!str {written or chr(39) * 2}")[0] == {"a": written}


def test_keys_are_text_and_merge_keys_work():
    found = {"no": 1, "1.10": 2, "2026-01-01": 3, "012": 4, "~": 5, "on": {"x": 1, "y": 2}, "base": {"x": 1}}
    text = "no: 1\n1.10: 2\n2026-01-01: 3\n012: 4\n~: 5\nbase: &b {x: 1}\non: {<<: *b, y: 2}\n"
    assert read_yaml(text)[0] == found


RECIPE = """\
kind: sft
source: {path: rows.jsonl, split: 1.10, revision: 0123456, columns: {prompt: no, completion: 2}}
heldout: [2026]
sampling: {stop: [no, 1.10, 012, ~~], system: on}
select:
  per: {lang: {no: 0.5, 1.10: 0.25, 2026-01-01: 1, 012: 1e-1}}
scores: [{premem_accuracy: {threshold: 1e-1}}]
"""


def loaded(tmp_path, text, **more):
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml", **more)


def test_names_are_what_is_written(tmp_path):
    recipe = loaded(tmp_path, RECIPE, set=["source.limit=1_000", "server.model=1.10", "export.to=no"])
    r = recipe.recipe
    assert (r.source.split, r.source.revision, r.source.limit) == ("1.10", "0123456", 1000)
    assert r.source.columns == {"prompt": "no", "completion": "2"} and r.heldout.path == ["2026"]
    assert r.sampling.stop == ["no", "1.10", "012", "~~"] and r.sampling.system == "on"
    assert r.select.per == {"lang": {"no": 0.5, "1.10": 0.25, "2026-01-01": 1.0, "012": 0.1}}
    assert (r.server.model, r.export.to, r.scores[0].params) == ("1.10", "no", {"threshold": 0.1})
    # the store and the card have it so that both readings of YAML give it back
    assert yaml.safe_load(recipe.text) == read_yaml(recipe.text)[0] == recipe.raw
    assert loaded(tmp_path, recipe.text).recipe == r


WRONG = [
    ("kind: sft\nscores: []\nselect: {where: a}\nscores: [accuracy]\n", "line 4, column 1: .*the key 'scores' stands twice, in lines 2 and 4"),
    ("kind: sft\nselect:\n  keep: {share: 0.5, share: 0.9}\n", "the key 'share' stands twice, in lines 3 and 3"),
    ("kind: sft\n[a, b]: 1\n", "a key is a word"),
    ("kind: sft\nsource: {path: ~}\n", "source.path.*"),
    ("kind: sft\nsource: {path: a, limit: no}\n", "source.limit.*found 'no'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_cannot_be_meant_is_said(tmp_path, text, said):
    with pytest.raises(UsageError, match=said):
        loaded(tmp_path, text)


def test_a_graders_switch_is_true_or_false():
    with pytest.raises(UsageError, match="ignore_case is 'no', expected true or false"):
        grader({"exact": {"ignore_case": "no"}})
