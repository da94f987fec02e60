"""What people read: 80 columns, plain words for every score, and what a summary says where it has nothing to tell."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml

import curate
from curate.cli import main
from curate.console import table, wrapped
from curate.report.describe import differences
from curate.report.summary import summarise
from curate.scores import DATASET_VALUES, SCORES
from curate.scores.words import FAMILIES, OTHER, PLAIN, heading
from curate.store import Store
from tests.tiny_models import make_llama
from tests.workflow.pairs import pairs, write_rows


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with a recipe of many scores, run over twelve pairs with a long name."""
    folder = tmp_path_factory.mktemp("line")
    make_llama(folder / "a-model-of-a-rather-long-name", seed=0)
    write_rows(folder / "pairs-of-a-rather-long-name.jsonl", [r | {"note": "n" * 200} for r in pairs(12)])
    names = [
        "ranking_gap",
        {"flip_loss": {"beta": 0.5, "as": "flip_loss_under_a_name_of_its_own"}},
        "ches_ln",
        "squeezing_prone",
        "edit_distance",
    ]
    raw = {"kind": "preference", "source": "pairs-of-a-rather-long-name.jsonl", "models": {"reference": "a-model-of-a-rather-long-name"},
           "scores": names, "select": {"order_by": "ches_ln", "keep": {"rows": 6}}, "tokens": {"max_length": 64}}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    curate.run(folder / "recipe.yaml")
    return folder


def said(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["curate", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 200])
def test_nothing_is_wider_than_the_terminal(scored, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(scored)
    row = Store("store").sql("SELECT row_id FROM rows LIMIT 1").item()
    commands = [
        ["scores"],
        *(["scores", name] for name in ("batch_forecast", "map_region")),
        ["summary", "store"],
        ["summary", "store", "--all"],
    ]
    commands += [["explain", "store", row], ["status", "store"], ["plan", "recipe.yaml"]]
    widest = {}
    for command in commands:
        out = said(monkeypatch, capsys, *command)
        widest[command[0]] = max(max(map(len, out.splitlines())), widest.get(command[0], 0))
    assert max(widest.values()) <= width
    assert width == 80 or widest["explain"] > 80  # a wide terminal is used


def test_every_score_has_a_line_in_plain_words():
    """It says what a high value, or each value, means, without formulas and abbreviations, and fits into two lines of 80 columns."""
    assert PLAIN.keys() == SCORES.keys()
    for name, text in PLAIN.items():
        assert SCORES[name].plain == text
        assert re.match(r"(High|1|0 hard|0 all wrong|By how many|Where it stands|The group)", text), name
        assert (
            text.endswith(".") and len(text) <= 150 and not re.search(r"[⟨Σσπβτ∇‖±²]|logp|NLL|eNTK|CHES|nll|EOS", text)
        ), name
    assert {s.path.partition(":")[0].rpartition(".")[2] for s in SCORES.values()} <= FAMILIES.keys()


def test_scores_and_explain_speak_those_words(scored, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    listed = said(monkeypatch, capsys, "scores")
    assert all(text in listed for text in PLAIN.values())
    store = scored / "store"
    row = Store(store).sql("SELECT row_id FROM rows LIMIT 1").item()
    told = said(monkeypatch, capsys, "explain", store, row)
    assert (
        PLAIN["ches_ln"] in told
        and "flip_loss_under_a_name_of_its_own (beta 0.5): " in told
        and PLAIN["flip_loss"] in told
    )
    found = json.loads(said(monkeypatch, capsys, "explain", store, row, "--json"))
    assert [s["plain"] for s in found["scores"]][2] == PLAIN["ches_ln"]


def test_dataset_values_stand_under_plain_headings(scored, monkeypatch, capsys):
    short, every = (said(monkeypatch, capsys, "summary", scored / "store", *more) for more in ([], ["--all"]))
    assert (
        "How often the model ranks the chosen response first" in short
        and "What an ideal DPO policy would reach" in short
    )
    assert "idealised_ranking_accuracy_ln_b0.01" not in short and "`--all` lists the 16 of them" in short
    assert "idealised_ranking_accuracy_ln_b0.01" in every and "--all" not in every
    assert len(json.loads(said(monkeypatch, capsys, "summary", scored / "store", "--json"))["values"]) == 20
    of_ours = ("ranking_accuracy_ln", "heldout_idealised_ranking_accuracy_max", "squeezing_prone_two", "flips_wrong_right", "premem_threshold_a",
               "premem_zeros_fluent", "map_hard", "heldout_accuracy", "target_nll", "phase_learned",
               "pass_rate_mixed", "pass_at_8", "heldout_pass_band_inside")  # fmt: skip
    assert all(heading(name) != OTHER for name in of_ours) and heading("mine") == OTHER
    assert len(DATASET_VALUES) == 13  # a new one gets a heading


def test_a_summary_tells_not_scored_from_nothing_known(tmp_path, monkeypatch, capsys):
    """ "No dataset values yet: `curate score RECIPE`" was said after just that."""
    write_rows(tmp_path / "pairs.jsonl", pairs(4))
    path = tmp_path / "recipe.yaml"
    path.write_text("kind: preference\nsource: pairs.jsonl\nmodels: {reference: model}\nscores: [edit_distance]\n")
    make_llama(tmp_path / "model", seed=0)
    assert "no recipe has been scored into this store yet" in summarise(Store(tmp_path / "empty", create=True)).text()
    said(monkeypatch, capsys, "measure", path, "-q")
    assert "recipe 'recipe' is not scored yet" in summarise(Store(tmp_path / "store")).text()
    said(monkeypatch, capsys, "score", path, "-q")
    found = summarise(Store(tmp_path / "store"))
    assert found.text().startswith(
        "Scored by recipe 'recipe': edit_distance (4 of 4 rows).\nThere are no values about the whole set"
    )
    assert found.to_json()["scores"] == [{"name": "edit_distance", "known": 4, "rows": 4}]


def test_entries_are_told_apart_by_the_setting_that_differs():
    def entry(run="", weights="w1", **params):
        return {
            "measurement": "accuracy",
            "run": run,
            "checkpoint": "c",
            "model": "m",
            "model_fingerprint": weights,
            "params": params,
        }

    measured = [
        entry(sampling={"samples": 8, "top_p": 0.95}),
        entry(sampling={"samples": 16, "top_p": 0.95}),
        entry(run="sft"),
    ]
    assert differences(measured) == [" (samples 8)", " (samples 16)", ""]
    assert differences([entry(a=1), entry(a=1, weights="w2")]) == [" (weights w1)", " (weights w2)"]
    assert differences([entry(a=1), entry()]) == [" (a 1)", " (a unset)"]


def test_tables_fold_every_column_but_numbers():
    rows = [("a long name of a thing", 1234567, "path/to/some/where/far/away.jsonl"), ("b", -1.5, "x")]
    head = ("name", "n", "file")
    folded = table(rows, head=head, width=40).splitlines()
    assert max(map(len, folded)) <= 40 and any("1,234,567" in line for line in folded)
    assert "".join(line[25:].strip() for line in folded[2:5]) == "path/to/some/where/far/away.jsonl"
    assert table(rows, head=head, width=200).splitlines()[2].startswith("a long name of a thing  1,234,567  path/to")
    assert (
        len(table([("x" * 50, "y" * 50)], head=("a", "b"), width=40, whole=True).splitlines()[2]) > 50
    )  # sql: a row is a line
    assert wrapped("  - " + "word " * 30, "  ", width=40).splitlines()[1].startswith("    word")


def test_every_value_of_a_dataset_stands_under_a_heading_of_its_own():
    """`Other values` are a user's, or imported."""
    columns = {"accuracy": np.array([[0.0, 1.0]] * 4), "target_nll": np.array([[0.2, 0.1]] * 4)}
    values = [
        v
        for one in DATASET_VALUES.values()
        if set(one.needs) <= set(columns)
        for v in one.compute(columns, steps=[0, 1])
    ]
    assert {value.name for value in values} >= {"fluent", "accuracy", "premem_accuracy"}
    assert not [value.name for value in values if heading(value.name) == OTHER]
