"""What a recipe's SQL sees: the recipe's rows as `curate sql --recipe` has them, names that two columns have, numbers that come as text."""

from __future__ import annotations

import atexit
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from curate.errors import UsageError, ValidationError
from curate.rows import Example, Message
from curate.store import Store
from curate.workflow.select import SelectSpec, check_select, select, select_with_control


def record(i, row, /, **columns):
    return SimpleNamespace(index=i, row=row, columns=columns)


MADE: dict[str, Path] = {}  # stores as they were made, by what is in them: a test gets a copy


def made(tmp_path, lines, held=(), **more):
    """A store with a recipe "r": rows of the source a (prompt q<i>) with these columns, and held-out rows with these prompts."""
    key = repr((lines, held, more))
    if key not in MADE:
        MADE[key] = Path(tempfile.mkdtemp()) / "s"
        atexit.register(shutil.rmtree, MADE[key].parent, ignore_errors=True)
        make(MADE[key], lines, held, more)
    return Store(shutil.copytree(MADE[key], tmp_path / "s"))


def make(folder, lines, held, more):
    store = Store(folder, create=True)
    rows = [Example(f"q{i}", "yes", "1") for i in range(len(lines))]
    store.add_source(
        "a", "1", [record(i, row, **columns) for i, (row, columns) in enumerate(zip(rows, lines, strict=True))]
    )
    store.add_source("h", "1", [record(i, Example(p, "no", "2")) for i, p in enumerate(held)], role="heldout")
    store.register_recipe("r", "", sources=["a", "h"], roles={"train": ["a"], "heldout": ["h"]})
    store.write_scores("r", [row.row_id for row in rows], more or {"loss": [float(i) for i in range(len(rows))]})


def kept(store, recipe="r", sources=("a",), **spec):
    found = select(store, SelectSpec(**spec), worst={"loss": "high"}, recipe=recipe, sources=sources)
    prompts = dict(store.sql("SELECT row_id, prompt FROM data.rows").rows())
    return "".join(sorted(prompts[r][-1] for r, k in zip(found.row_ids, found.kept, strict=True) if k)), found


# ---- one definition of what is seen -------------------------------------------------------------------------------------------------


def test_a_recipes_sql_sees_its_held_out_rows(tmp_path):
    store = made(tmp_path, [{}] * 4, held=["q1", "q3", "q9"])
    seen = "SELECT r.prompt FROM rows r JOIN occurrences o USING (row_id) WHERE o.role = 'heldout'"
    assert kept(store, where=f"prompt NOT IN ({seen})")[0] == "02"
    asked = store.sql(
        f"SELECT prompt FROM scored WHERE role = 'train' AND prompt NOT IN ({seen}) ORDER BY ALL", recipe="r"
    )
    assert asked["prompt"].to_list() == ["q0", "q2"]
    assert kept(store)[0] == "0123"  # held-out rows are no candidates


def test_a_file_is_to_each_recipe_what_the_recipe_takes_it_for(tmp_path):
    store = made(tmp_path, [{}] * 2, held=["q7", "q8"])
    store.add_source(
        "h", "1", [record(i, Example(p, "no", "2")) for i, p in enumerate(["q7", "q8"])]
    )  # another recipe trains on it
    store.register_recipe("other", "", sources=["h"], roles={"train": ["h"]})
    assert kept(store)[0] == "01"
    assert store.sql("SELECT role, count(*) FROM scored GROUP BY ALL ORDER BY ALL", recipe="r").rows() == [
        ("heldout", 2),
        ("train", 2),
    ]
    assert kept(store, recipe="other", sources=["h"])[0] == "78"


def test_the_held_out_set_is_excluded_by_prompt(tmp_path):
    store = Store(tmp_path / "s", create=True)
    user, system = Message(role="user", content="Add 1 and  2."), Message(role="system", content="Be brief.")
    rows = [
        Example("Add 1 and 2.", "3", None),
        Example(" add 1 and 2.", "3", None),
        Example((system, user), (Message(role="assistant", content="3"),), None),
        Example("", "free text", None),
        Example("Add 2 and 2.", "4", None),
    ]
    held = [Example("Add 1 and 2.\n", "three", None), Example("", "other text", None), rows[4]]
    store.add_source("a", "1", [record(i, row) for i, row in enumerate(rows)])
    store.add_source("h", "1", [record(i, row) for i, row in enumerate(held)], role="heldout")
    store.register_recipe("r", "", sources=["a", "h"], roles={"train": ["a"], "heldout": ["h"]})
    found = select(store, SelectSpec(exclude="heldout"), worst={}, recipe="r", sources=["a"])
    assert found.kept.tolist() == [False, True, False, True, False]
    told = [reason.text for reason in found.reasons]
    assert told[0] == told[2] == "exclude: its prompt is in the held-out set"
    assert told[4] == "exclude: the same row is in the held-out set"
    assert found.counts["dropped_by"] == {"exclude": 3}


def test_a_row_that_is_held_out_too_counts_once_in_training(tmp_path):
    store = made(tmp_path, [{}] * 2)
    store.add_source("h", "2", [record(0, Example("q0", "yes", "1"))], role="heldout")
    spec = SelectSpec(duplicates="as_found", keep={"rows": 2})
    assert select(store, spec, worst={}, recipe="r", sources=["a"]).kept.tolist() == [True, True]


# ---- names that two columns have ----------------------------------------------------------------------------------------------------

CLASHING = ("source", "kind", "index", "role", "position", "style", "label", "answer", "loss", "Source", "row_id")


@pytest.mark.parametrize("name", CLASHING)
def test_a_column_with_one_of_our_names_is_refused_with_both_ways_to_write_it(tmp_path, name):
    names = [other for other in CLASHING if other == name or other.lower() != name.lower()]
    store = made(tmp_path, [dict.fromkeys(sorted(names), v) for v in ("x", "y", "x")])
    for spec in (
        {"where": f"{name} = 'x'"},
        {"order_by": f"{name} desc"},
        {"per": name},
        {"where": f"lower({name}) = 'x' AND true"},
    ):
        with pytest.raises(
            UsageError, match=rf"is a column of curate's and one of yours.*`user_{name}`.*`scored\.{name.lower()}`"
        ):
            kept(store, **spec)
    assert kept(store, where=f"user_{name} = 'x'")[0] == "02"
    assert kept(store, where=f"scored.{name} IS NOT NULL OR true")[0] == "012"
    assert kept(store, where="prompt <> 'q1'")[0] == "02"  # a clash that is not used is nobody's business


def test_names_inside_a_subquery_are_looked_up_there(tmp_path):
    store = made(tmp_path, [{"source": v} for v in ("x", "y", "x")], held=["q1"])
    with pytest.raises(UsageError, match=r"`user_source` for your column 'source', `occurrences\.source`"):
        kept(store, where="row_id IN (SELECT row_id FROM occurrences WHERE source = 'x')")
    assert kept(store, where="row_id IN (SELECT row_id FROM occurrences WHERE user_source = 'x')")[0] == "02"
    assert (
        kept(store, where="row_id IN (SELECT row_id FROM rows WHERE source = 'a')")[0] == "012"
    )  # `rows` has no column of yours
    assert kept(store, where="row_id IN (SELECT o.row_id FROM occurrences o WHERE o.source = 'a')")[0] == "012"


def test_user_columns_that_differ_by_case_and_one_called_user_source(tmp_path):
    store = made(tmp_path, [{"source": "x", "user_source": "own", "Topic": "a", "topic": "b"}] * 2)
    assert kept(store, where="user_source = 'own'")[0] == "01"  # it keeps its name
    with pytest.raises(UsageError, match="`user_user_source` for your column 'source'"):
        kept(store, where="source = 'x'")
    with pytest.raises(UsageError, match="'topic' could be your column 'Topic' or 'topic'"):
        kept(store, where="topic = 'b'")
    assert kept(store, where="user_topic = 'b' AND scored.Topic = 'a'")[0] == "01"


def test_a_clash_with_a_column_to_come_is_said_before_measuring(tmp_path):
    store = made(tmp_path, [{"prompt_tokens": i} for i in range(3)])
    spec = SelectSpec(where="prompt_tokens < 2")
    with pytest.raises(
        UsageError,
        match="select.where: 'prompt_tokens' is a column of curate's and one of yours. Write `user_prompt_tokens`",
    ):
        check_select(store, spec, worst={}, planned=["prompt_tokens"], recipe="r")
    frame = check_select(
        store, SelectSpec(where="user_prompt_tokens < 2"), worst={}, planned=["prompt_tokens"], recipe="r"
    )
    assert {"prompt_tokens", "user_prompt_tokens"} <= set(frame.columns)


def test_columns_of_another_recipes_sources_are_not_in_the_way(tmp_path):
    store = made(tmp_path, [{"topic": "x"}] * 2)
    store.add_source("b", "1", [record(0, Example("other", "yes", "1"), loss="high", source="web")])
    assert kept(store, where="loss < 1 AND source = 'a'")[0] == "0"


# ---- numbers as text ------------------------------------------------------------------------------------------------------------------

RATINGS = [{"rating": r} for r in ("9.5", "10", "8", "7.5", "10")]


@pytest.mark.parametrize("spec", [
    {"order_by": "rating desc"},
    {"order_by": "loss, rating"},
    {"order_by": "coalesce(rating, '0')"},
    {"where": "rating > '9'"},
    {"where": "rating BETWEEN '7' AND '9'"},
    {"where": "loss < 9 AND NOT ('9' <= rating)"},
    {"where": "rating = (SELECT max(rating) FROM scored)"},
    {"where": "row_id IN (SELECT row_id FROM occurrences ORDER BY rating DESC LIMIT 2)"},
    {"where": "rank() OVER (ORDER BY rating DESC) < 3"},
])  # fmt: skip
def test_numbers_that_are_text_are_refused_where_their_order_matters(tmp_path, spec):
    with pytest.raises(UsageError, match=r"is text, and all of its values are numbers.*::DOUBLE`"):
        kept(made(tmp_path, RATINGS), **spec)


def test_the_way_out_and_what_is_left_alone(tmp_path):
    store = made(
        tmp_path,
        [{**r, "day": f"2024-01-0{i}", "code": v} for i, (r, v) in enumerate(zip(RATINGS, "ab1cd", strict=True))],
    )
    assert kept(store, order_by="rating::DOUBLE desc", keep={"rows": 2})[0] == "14"
    assert kept(store, order_by="rating::VARCHAR desc", keep={"rows": 2})[0] == "02"  # text, as said
    assert kept(store, per="rating", keep={"rows": 1})[0] == "0123"
    assert kept(store, where="rating IN ('8', '10')")[0] == "124"
    assert kept(store, where="day > '2024-01-02'", order_by="day desc, code")[0] == "34"
    with pytest.raises(UsageError, match="::DOUBLE"):
        kept(store, where="rating > 9")


def test_mixed_types_and_gaps_are_numbers_as_text_too(tmp_path):
    store = made(tmp_path, [{"rating": r} for r in (9, "10", None, "n/a", "")])
    with pytest.raises(UsageError, match=r"2 of 3 of its values are numbers.*`TRY_CAST\(rating AS DOUBLE\)`"):
        kept(store, order_by="rating desc")
    assert kept(store, order_by="TRY_CAST(rating AS DOUBLE) desc", unknown="drop", keep={"rows": 1})[0] == "1"


def test_nulls_stand_where_the_order_says(tmp_path):
    store = made(tmp_path, [{"rating": r} for r in (9, None, 3)])
    for order, first in (
        ("rating desc nulls first", "1"),
        ("rating nulls first", "1"),
        ("rating nulls last", "2"),
        ("rating desc", "0"),
    ):
        assert kept(store, order_by=order, keep={"rows": 1}, unknown="keep")[0] == first


def test_nan_is_unknown(tmp_path):
    store = made(tmp_path, [{"rating": r} for r in ("9", "NaN", "3", "inf")])
    with pytest.raises(ValidationError, match=r"rating::DOUBLE is unknown for 1 of 4 rows"):
        kept(store, order_by="rating::DOUBLE desc")
    assert kept(store, order_by="rating::DOUBLE desc", keep={"rows": 2}, unknown="keep")[0] == "03"
    with pytest.raises(ValidationError, match="is unknown for 1 of 4 rows"):
        kept(store, where="rating::DOUBLE > 5")
    assert (
        kept(store, where="rating::DOUBLE > 5 OR prompt = 'q1'")[0] == "013"
    )  # as SQL has it: unknown or true is true
    assert kept(store, where="rating::DOUBLE > 5", unknown="drop")[0] == "03"


def test_random_in_sql_is_refused(tmp_path):
    for spec in ({"order_by": "random()"}, {"where": "random() < 0.5"}):
        with pytest.raises(UsageError, match="`order_by: random`"):
            kept(made(tmp_path / next(iter(spec)), [{}] * 3), **spec)


# ---- what is likely not meant is said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, told", [
    ({"where": "topic = 'z'"}, "where: topic = 'z' is true for none of 4 rows: nothing is left to select from."),
    ({"where": "topic = 'z'"}, "none of 4 rows is kept."),
    ({"where": "topic NOT IN ('z')"}, "where: topic NOT IN ('z') is true for all 4 rows: it drops none."),
    ({"drop_worst": {"loss": 0.05}}, "drop_worst: 5% of 4 rows by loss is not one row: it drops none."),
    ({"where": "topic = 'x'", "per": "topic"}, "per: no row of topic y is left to keep any of: the rules before drop all 2."),
    ({"where": "topic = 'x'", "per": {"topic": {"x": 0.5, "y": 0.5}}}, "per: no row of topic y is left"),
    ({"per": "nullif(topic, 'y')"}, "per: nullif(topic, 'y') is NULL for 2 rows: they are a group of their own, `NULL`."),
    ({"per": "topic", "keep": {"share": 0.1}}, "keep: topic x: share 0.1 keeps none of 2 rows."),
    ({"keep": {"rows": 9}}, "keep: 9 rows is more than there is (4 rows left): all of it is kept."),
    ({"exclude": "heldout"}, "exclude: heldout drops no row"),
])  # fmt: skip
def test_what_is_empty_is_said(tmp_path, spec, told):
    store = made(tmp_path, [{"topic": t} for t in "xxyy"], held=["other"])
    notes = kept(store, **spec)[1].counts["notes"]
    assert any(told in note for note in notes), notes


def test_a_share_for_a_group_that_is_not_there_is_said_before_measuring(tmp_path):
    store = made(tmp_path, [{"topic": t} for t in "xxyy"])
    with pytest.raises(UsageError, match="no row has topic = 'z'; found x, y"):
        check_select(
            store,
            SelectSpec(per={"topic": {"x": 1.0, "z": 0.5}}, keep={"share": 1.0}),
            worst={},
            planned=["new"],
            recipe="r",
        )


def test_which_part_of_where_is_false(tmp_path):
    store = made(tmp_path, [{"n": n, "topic": t} for n, t in ((1, "x"), (9, "x"), (2, "y"))])
    reasons = kept(store, where="topic = 'x' AND n   < 5")[1].reasons
    assert [(r.rule, r.text, r.value, r.cut) for r in reasons] == [
        ("keep", "kept: no rule drops it", None, None),
        ("where", "where: n < 5 is false", 9.0, 5.0),
        ("where", "where: topic = 'x' is false", None, None),
    ]


# ---- lists and mappings ---------------------------------------------------------------------------------------------------------------------

NESTED = [
    {"meta": {"lang": "en", "n": 1, "by": {"who": "ann"}}, "tags": ["x", "y"], "odd": {"a": 1}},
    {"meta": {"lang": "de", "n": 2.5}, "tags": [], "odd": [1]},
    {"meta": None, "tags": ["x"], "odd": {"A": 1, "a": 2}},
]


@pytest.mark.parametrize("where, wanted", [
    ("meta.lang = 'en'", "0"),
    ("meta.n > 1.5", "1"),
    ("meta.by.who = 'ann'", "0"),
    ("len(tags) > 1", "0"),
    ("'x' IN tags", "02"),
    ("list_contains(tags, 'y')", "0"),
    ("odd->>'a' = '1'", "0"),
    ("meta IS NULL", "2"),
])  # fmt: skip
def test_where_looks_into_lists_and_mappings(tmp_path, where, wanted):
    assert kept(made(tmp_path, NESTED), where=where, unknown="drop")[0] == wanted


def test_shapes_of_several_sources_are_one(tmp_path):
    store = made(tmp_path, [{"meta": {"lang": "en"}, "tags": []}])
    store.add_source("b", "1", [record(0, Example("q1", "yes", "1"), meta={"n": 3}, tags=["x"])])
    store.register_recipe("r", "", sources=["a", "b"], roles={"train": ["a", "b"]})
    both = store.sql("SELECT meta, tags FROM scored ORDER BY position", recipe="r").rows()
    assert both == [({"lang": "en", "n": None}, []), ({"lang": None, "n": 3}, ["x"])]


def test_numbers_that_are_text_inside_a_mapping(tmp_path):
    store = made(tmp_path, [{"meta": {"rating": r}} for r in ("9.5", "10", "8")])
    with pytest.raises(
        UsageError, match=r"meta\.rating is text, and all of its values are numbers.*`meta\.rating::DOUBLE`"
    ):
        kept(store, order_by="meta.rating desc")
    assert kept(store, order_by="meta.rating::DOUBLE desc", keep={"rows": 1})[0] == "1"


# ---- names of curate's own in the query -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "passed", "held", "tokens"])
def test_a_column_that_is_not_there_is_no_name_of_the_query_s(tmp_path, name):
    store = made(tmp_path, [{}] * 4, held=["q1"])
    for rule in ({"where": f"{name} > 0"}, {"per": name}, {"order_by": name}):
        with pytest.raises(UsageError, match=f"no column '{name}'"):
            kept(store, exclude="heldout", **rule)


def test_a_column_of_any_name_is_the_users(tmp_path):
    assert kept(made(tmp_path, [{"times read": i} for i in range(4)]), where='"times read" > 1')[0] == "23"


def test_a_row_is_taken_from_the_training_files_of_its_recipe(tmp_path):
    store = Store(tmp_path / "s", create=True)
    row = Example("q0", "yes", "1")
    store.add_source("h", "1", [record(0, row, of="h")])  # another recipe trains on it
    store.add_source("a", "1", [record(0, row, of="a")])
    store.add_source("h", "1", [record(0, row, of="h")], role="heldout")
    store.register_recipe("r", "", sources=["a", "h"], roles={"train": ["a"], "heldout": ["h"]})
    for duplicates in ("once", "as_found"):
        spec = SelectSpec(duplicates=duplicates)
        decisions = select(store, spec, worst={}, recipe="r", sources=["a"])
        store.write_selection("r", decisions, recipe="r", spec=spec.as_dict(), inputs_hash="")
        assert [(k.source, k.columns) for k in store.selection("r").kept()] == [("a", {"of": "a"})]
        assert not list(store.selection("r").dropped())


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"where": "foo > 5"}, "select.where: no column 'foo'"),
        ({"where": "loss > 0 AND foo BETWEEN 1 AND 2"}, "select.where: no column 'foo'"),
        ({"order_by": "foo desc"}, "select.order_by: no column 'foo'"),
        ({"where": "word::INT > 5"}, "select.where: .*could not convert"),
    ],
)
def test_a_mistake_in_a_runs_transaction_is_told_as_anywhere(tmp_path, spec, told):
    store = made(tmp_path, [{"word": "a"}, {"word": "b"}])
    with pytest.raises(UsageError, match=told), store.transaction():
        kept(store, **spec)


def test_a_comparison_with_what_surrounds_a_subquery(tmp_path):
    where = "EXISTS (SELECT 1 FROM occurrences o WHERE o.row_id = scored.row_id AND o.index >= scored.position)"
    assert kept(made(tmp_path, [{}] * 3), where=where)[0] == "012"


# ---- what orders nothing, groups without a value, text that is to have a bad end --------------------------------------------------------


@pytest.mark.parametrize("text", ["1", "'loss'", "loss, 2 desc", "1 + 1", "lower('A')", "NULL", "CAST(1 AS BIGINT)"])
def test_a_constant_orders_nothing(tmp_path, text):
    store = made(tmp_path, [{"topic": "x"}] * 3)
    for ask in (
        lambda: kept(store, order_by=text),
        lambda: check_select(store, SelectSpec(order_by=text), worst={}, planned=[], recipe="r"),
    ):
        with pytest.raises(
            UsageError,
            match=r"select.order_by: .* is the same for every row, so it orders nothing. Write the name of a column",
        ):
            ask()
    if "," not in text:
        with pytest.raises(UsageError, match=r"select.per: .* makes one group of all rows"):
            kept(store, per=text)
        with pytest.raises(UsageError, match=r"select.per: .* makes one group of all rows"):
            kept(store, per={text: {"loss": 0.5}}, keep={"share": 1.0})


def test_what_is_no_constant_orders(tmp_path):
    store = made(tmp_path, [{"topic": "x"}, {"topic": "y"}])
    assert kept(store, order_by="-loss", keep={"rows": 1})[0] == "1"
    assert kept(store, order_by="loss + 1 desc", keep={"rows": 1})[0] == "1"
    assert kept(store, order_by="random", keep={"rows": 2})[0] == "01"


def test_rows_without_a_group_are_not_those_of_the_group_none(tmp_path):
    topics = [None, None, None, "None", "None", "NULL"]
    store = made(tmp_path, [{"topic": t} for t in topics])
    found, told = kept(
        store, per={"topic": {"None": {"rows": 1}, "NULL": {"rows": 1}, "(NULL)": {"rows": 2}}}, order_by="loss"
    )
    assert found == "0135" and told.counts["kept_per_group"] == {"(NULL)": 2, "None": 1, "NULL": 1}
    assert any("a group of their own, `(NULL)`" in note for note in told.counts["notes"])
    assert {r.text.split(" by ")[0] for r, k in zip(told.reasons, told.kept, strict=True) if k} == {
        "kept: within keep 2 rows of topic (NULL)", "kept: within keep 1 rows of topic None", "kept: within keep 1 rows of topic NULL"}  # fmt: skip
    with pytest.raises(UsageError, match=r"no share for '\(NULL\)'"):
        kept(store, per={"topic": {"None": 0.5, "NULL": 0.5}})
    control = select_with_control(
        store, SelectSpec(per="topic", keep={"rows": 1}, control="random"), worst={}, recipe="r", sources=("a",)
    )[1]
    assert control.counts["kept_per_group"] == {"(NULL)": 1, "None": 1, "NULL": 1}


def test_a_budget_called_none_is_of_null_where_no_text_is_none(tmp_path):
    store = made(tmp_path, [{"topic": t} for t in (None, None, "x")])
    for name in ("None", "NULL"):
        found, told = kept(store, per={"topic": {name: {"rows": 1}, "x": 1.0}})
        assert found == "02" and told.counts["kept_per_group"] == {name: 1, "x": 1}


@pytest.mark.parametrize("values, cast, share", [
    (["0.7", "0.1", "0.9", "0.5"], "rating::DOUBLE", "0.75"),
    (["1,700", "900", "12,000.5", "1,234,567"], "replace(rating, ',', '')::DOUBLE", "0.75"),
    (["1,700", "900", "n/a", "5"], "TRY_CAST(replace(rating, ',', '') AS DOUBLE)", "0.75"),
])  # fmt: skip
def test_the_worst_of_numbers_that_are_text(tmp_path, values, cast, share):
    """The message's own ways out are run: by rank and by a bound."""
    store = made(tmp_path, [{"rating": v} for v in values])
    spec = SelectSpec(drop_worst={"rating": 0.25}, worst={"rating": "low"})
    with pytest.raises(UsageError, match="values are numbers.*without quotes") as refused:
        select(store, spec, worst={}, recipe="r", sources=("a",))
    assert f"`where: {cast} >= …`" in str(refused.value) and f"`order_by: {cast} desc`" in str(refused.value)
    assert f"`keep: {{share: {share}}}`" in str(refused.value)
    assert len(kept(store, order_by=f"{cast} desc", keep={"share": 0.75}, unknown="keep")[0]) == 3
    numbers = [float(v.replace(",", "")) for v in values if v != "n/a"]
    assert len(kept(store, where=f"{cast} >= {sorted(numbers)[1]}", unknown="drop")[0]) == len(numbers) - 1
    with pytest.raises(UsageError, match="values are numbers") as refused:
        kept(store, order_by="rating desc")
    assert f"Write `{cast}`" in str(refused.value)


def test_text_that_only_looks_like_thousands_is_text(tmp_path):
    store = made(tmp_path, [{"rating": v} for v in ("1,2", "1,23", "12,34", "a,bcd")])
    assert kept(store, order_by="rating", keep={"rows": 1})[0] == "0"


@pytest.mark.parametrize("rule", [{"where": "ches_ln < 1"}, {"drop_worst": {"ches_ln": 0.1}}, {"order_by": "ches_ln"}])
def test_a_score_that_the_recipe_does_not_ask_for_is_said(tmp_path, rule):
    store = made(tmp_path, [{}] * 3)
    with pytest.raises(UsageError, match="the score 'ches_ln' is not among the recipe's `scores`; add it there"):
        check_select(store, SelectSpec(**rule), worst={"loss": "high"}, planned=["loss"], recipe="r")


@pytest.mark.parametrize("rule, said", [
    ("score > 'abc'", r"score > 'abc': could not convert string 'abc' to INT64\. Write a value of the column's type"),
    ("ches > 'abc'", r"ches > 'abc': could not convert string 'abc' to DOUBLE\."),
    ("nosuchfn(score)", r"nosuchfn\(score\): no function nosuchfn\(\) in SQL\."),
    ("lenght(topic) > 2", r"lenght\(topic\) > 2: no function lenght\(\) in SQL. Did you mean length\(\)\?"),
    ("sum(score) > 3", "an aggregate has one value for all rows"),
    ("count(*) > 3", "an aggregate has one value for all rows"),
    ("score >", "this is not one whole SQL expression: score >$"),
])  # fmt: skip
def test_what_no_row_can_answer_is_said_of_the_rule_before_anything_is_measured(tmp_path, rule, said):
    store = Store(tmp_path / "store", create=True)
    rows = [Example(f"q{i}", "yes") for i in range(2)]
    found = [SimpleNamespace(index=i, row=row, columns={"topic": "x", "score": i}) for i, row in enumerate(rows)]
    store.add_source("a", "1", found)
    store.register_recipe("r", "", sources=["a"])
    with pytest.raises(UsageError, match=rf"select.where: .*{said}") as error:
        check_select(store, SelectSpec(where=rule), worst={}, planned=["ches"], recipe="r")
    told = [str(error.value)]
    if "ches" not in rule:
        with pytest.raises(UsageError, match=rf"select.where: .*{said}") as error:
            select(store, SelectSpec(where=rule), worst={}, recipe="r", sources=["a"])
        told.append(str(error.value))
    assert not [one for one in told if "Error" in one or "LINE" in one or "\n" in one]


def test_a_value_that_cannot_be_cast_is_said_of_the_rule(tmp_path):
    store = Store(tmp_path / "store", create=True)
    store.add_source("a", "1", [SimpleNamespace(index=0, row=Example("q", "yes"), columns={"topic": "x"})])
    store.register_recipe("r", "", sources=["a"])
    with pytest.raises(UsageError, match=r"select.order_by: topic::INT: could not convert string 'x' to INT32"):
        select(store, SelectSpec(order_by="topic::INT"), worst={}, recipe="r", sources=["a"])


def test_a_query_without_end_is_stopped(tmp_path):
    """Ctrl-C while DuckDB works: the query ends, and the store is as it was."""
    store = Store(tmp_path / "store", create=True)
    endless = "SELECT count(*) FROM range(10000000000) a, range(10000000000) b"
    stop = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    stop.start()
    with pytest.raises(KeyboardInterrupt):
        store.sql(endless)
    stop.join()
    assert len(store.sql("SELECT 1")) == 1


def test_an_answer_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("curate.store.asking._memory", lambda: 16 << 20)
    store = Store(tmp_path / "store", create=True)
    with pytest.raises(UsageError, match="half of this machine's memory. Ask for fewer rows"):
        store.sql("SELECT * FROM range(100000000000)")
    with pytest.raises(UsageError, match="^could not convert string 'x' to INT32"):  # while the answer is taken
        store.sql("SELECT CASE WHEN range = 400000 THEN 'x' ELSE '1' END::INT FROM range(500000)")
