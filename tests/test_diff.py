"""Budgets of groups, random orders, controls, and two selections compared."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from curate.cli import app
from curate.errors import UsageError
from curate.recipe.schema import Recipe
from curate.report.diff import compare
from curate.rows import Pair
from curate.store import Measured, Store
from curate.workflow.run import selection_text
from curate.workflow.select import SelectSpec, select_with_control

PAIRS = [Pair(f"q{i}", "yes", "no") for i in range(40)]
IDS = [p.row_id for p in PAIRS]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s", create=True)
    columns = [{"topic": "ab"[i % 2]} for i in range(40)]
    store.add_source(
        "a",
        "1",
        [SimpleNamespace(index=i, row=p, columns=c) for i, (p, c) in enumerate(zip(PAIRS, columns, strict=True))],
    )
    tokens = {"prompt_tokens": [1.0] * 40, "chosen_tokens": list(range(1, 41)), "rejected_tokens": [1.0] * 40}
    store.write_shard(Measured("len", "length", "tokens"), 0, IDS, tokens)
    store.ingest()
    store.register_recipe("r", "", sources=["a"], roles={"train": ["a"]}, uses=["len"], plain=["len"])
    store.write_scores("r", IDS, {"loss": np.arange(40.0)})
    return store


def decided(store, name=None, **spec):
    given = SelectSpec(**spec)
    found, control = select_with_control(store, given, worst={"loss": "high"}, recipe="r", sources=["a"])
    if name:
        return store.write_selection(name, found, recipe="r", spec=given.as_dict(), control=control)
    return found, control


def test_groups_have_budgets_of_their_own(store):
    per = {"topic": {"a": {"rows": 3}, "b": {"tokens": 20}}}
    selection = decided(store, "x", per=per, order_by="loss")
    kept = [IDS.index(k.row_id) for k in selection.kept()]
    assert kept == [0, 1, 2, 3, 4, 5]  # a: 0, 2, 4; b: 1, 3, 5 with 4 + 6 + 8 tokens, the next would pass 20
    text = selection_text(selection)
    assert "(33 tokens)" in text and "A budget of tokens is for each group of `per`; tokens kept: a 15, b 18." in text


def test_an_order_that_is_random_repeats(store):
    first, _ = decided(store, order_by="random", keep={"rows": 10})
    again, _ = decided(store, order_by="random", keep={"rows": 10})
    other, _ = decided(store, order_by="random", keep={"rows": 10}, seed=1)
    assert first.kept.tolist() == again.kept.tolist() != other.kept.tolist()
    assert first.kept.tolist() != [True] * 10 + [False] * 30
    assert {r.text for r in first.reasons} == {
        "kept: within keep 10 rows in random order (seed 0)",
        "beyond keep 10 rows in random order (seed 0)",
    }


def test_controls_are_as_many_from_the_same_candidates(store):
    spec = {"where": "chosen_tokens > 4", "order_by": "loss desc", "keep": {"rows": 9}}
    found, control = decided(store, control="random", **spec)
    assert control.kept.sum() == found.kept.sum() == 9
    assert not control.kept[:4].any() and control.reasons[0].rule == "where"
    assert control.kept.tolist() == decided(store, control="random", **spec)[1].kept.tolist()
    assert control.kept.tolist() != decided(store, control="random", seed=1, **spec)[1].kept.tolist()
    assert {r.text for r in control.reasons[4:]} == {
        "control: drawn at random (seed 0)",
        "control: not among those drawn at random (seed 0)",
    }


def test_a_length_matched_control_has_the_lengths_of_the_selection(store):
    found, control = decided(
        store, control="length_matched", where="chosen_tokens > 0", order_by="chosen_tokens % 7", keep={"rows": 20}
    )
    tokens = np.arange(1, 41)
    strata = np.digitize(tokens, np.quantile(tokens, np.arange(1, 10) / 10))
    assert (
        np.bincount(strata[found.kept], minlength=10).tolist()
        == np.bincount(strata[control.kept], minlength=10).tolist()
    )
    assert found.kept.tolist() != control.kept.tolist()


def test_a_control_of_groups_and_of_tokens(store):
    found, control = decided(store, control="random", per={"topic": {"a": {"rows": 3}, "b": {"rows": 8}}})
    assert (
        [control.kept[0::2].sum(), control.kept[1::2].sum()]
        == [3, 8]
        == [found.kept[0::2].sum(), found.kept[1::2].sum()]
    )
    assert control.kept.tolist() != found.kept.tolist()
    found, control = decided(store, control="random", where="chosen_tokens < 5", keep={"rows": 3})
    assert any("are the selection's own, so it tells little" in note for note in control.counts["notes"])
    found, control = decided(store, control="random", keep={"tokens": 200}, order_by="loss")
    total = np.arange(1, 41) + 2
    assert 0 < total[control.kept].sum() <= total[found.kept].sum() <= 200


def test_a_control_is_kept_beside_its_selection(store):
    selection = decided(store, "x", order_by="loss", keep={"rows": 5}, control="random")
    assert selection.control.name == "x_control" and selection.control.counts["kept"] == 5
    assert store.selection().name == "x"
    assert "Its control 'x_control': 5 rows." in selection_text(selection)
    assert decided(store, "x", keep={"rows": 5}).control is None
    with pytest.raises(UsageError, match="no selection 'x_control'"):
        store.selection("x_control")
    decided(store, "y_control")
    with pytest.raises(UsageError, match="a selection of that name"):
        decided(store, "y", control="random")


@pytest.mark.parametrize("given, told", [
    ({"select": {"exclude": "heldout"}}, "needs `heldout:`"),
    ({"select": {"seed": 3}}, "nothing here is random"),
    ({"select": {"where": "true"}, "export": {"to": "o", "control": True}}, "needs `select.control`"),
    ({"select": {"per": {"topic": {"a": {"rows": 1, "tokens": 2}}}}}, "exactly one of share, rows, tokens"),
])  # fmt: skip
def test_keys_that_would_do_nothing_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate({"kind": "sft", **given})


def test_unset_new_keys_leave_an_old_selection_current():
    old = {
        "where": "loss < 1",
        "drop_worst": {},
        "order_by": None,
        "keep": None,
        "per": None,
        "duplicates": "once",
        "unknown": "error",
    }
    select_of = lambda **keys: Recipe.model_validate({"kind": "sft", "select": keys}).select.settings()  # noqa: E731
    assert select_of(where="loss < 1") == old
    assert select_of(where="loss < (SELECT 1)") != {
        **old,
        "where": "loss < (SELECT 1)",
    }  # it sees more rows than it did


def test_two_selections_compared(store, capsys):
    decided(store, "low", order_by="loss", keep={"rows": 10})
    decided(store, "short", where="chosen_tokens >= 6", order_by="loss", keep={"rows": 20})
    found = compare(store, "low", "short", rows=2)
    assert found.counts == {"both": 5, "only_a": 5, "only_b": 15, "neither": 15, "unknown_to_b": 0, "unknown_to_a": 0}
    assert [(r["kept_by"], r["rule"], r["rows"]) for r in found.by_rule] == [("low", "where", 5), ("short", "keep", 15)]
    assert [(IDS.index(r["row_id"]), r["kept_by"]) for r in found.rows] == [
        (0, "low"),
        (1, "low"),
        (10, "short"),
        (11, "short"),
    ]
    assert "where: chosen_tokens >= 6 is false" in found.text()
    app(["diff", str(store.folder), "low", "short", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["counts"]["both"] == 5
    with pytest.raises(UsageError, match="no selection 'lwo'"):
        compare(store, "lwo", "short")


def test_sql_says_which_column_a_name_is(store, capsys):
    store.add_source(
        "a",
        "2",
        [SimpleNamespace(index=i, row=p, columns={"source": "web", "meta": {"k": 1}}) for i, p in enumerate(PAIRS)],
    )
    ask = lambda *args: app(["sql", str(store.folder), *args], standalone_mode=False)  # noqa: E731
    ask("SELECT source, user_source, meta FROM scored LIMIT 1", "--csv")
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["source,user_source,meta", 'a,web,"{""k"": 1}"']
    assert "Write `user_source` for your column 'source'" in printed.err
    ask("SELECT scored.source, user_source FROM scored LIMIT 1", "--json")
    assert not capsys.readouterr().err
