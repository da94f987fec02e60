"""Selection by hand tables (the pure part), and through a store (SQL, errors, reasons, datasets)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from curate.errors import UsageError, ValidationError
from curate.rows import Pair
from curate.store import Measured, Store
from curate.store.expressions import check_expression, order_keys, split_top
from curate.workflow.select import Candidates, Reason, SelectSpec, decide, select, whole

nan = float("nan")
WORST = {"loss": "high", "gap": "low", "either": "none"}


def candidates(
    n, *, passed=None, scores=None, order=None, unknown=None, groups=None, tokens=None, weight=None, excused=None
):
    array = lambda given, default: np.asarray(given if given is not None else default, float)  # noqa: E731
    return Candidates(
        [f"r{i}" for i in range(n)],
        array(passed, np.ones(n)),
        {name: np.asarray(values, float) for name, values in (scores or {}).items()},
        np.asarray(order if order is not None else range(n)),
        unknown or [None] * n,
        groups or [None] * n,
        array(tokens, np.zeros(n)),
        array(weight, np.ones(n)),
        {name: np.asarray(values, bool) for name, values in (excused or {}).items()},
    )


# (spec, arrays, which rows are kept)
TABLE = [
    ({}, {}, "0123"),
    ({"where": "x"}, {"passed": [1, 0, 1, 0]}, "02"),
    ({"where": "x", "unknown": "drop"}, {"passed": [1, nan, 1, 0]}, "02"),
    ({"where": "x", "unknown": "keep"}, {"passed": [1, nan, 1, 0]}, "012"),
    ({"drop_worst": {"loss": 0.25}}, {"scores": {"loss": [1, 9, 2, 3]}}, "023"),  # high is worst
    ({"drop_worst": {"gap": 0.25}}, {"scores": {"gap": [1, 9, 2, 3]}}, "123"),  # low is worst
    ({"drop_worst": {"loss": 0.5}}, {"scores": {"loss": [5, 5, 5, 5]}}, "23"),  # ties go by row id
    (
        {"where": "x", "drop_worst": {"loss": 0.5}},
        {"passed": [1, 0, 1, 0], "scores": {"loss": [1, 9, 2, 8]}},
        "0",
    ),  # of what where left
    (
        {"drop_worst": {"loss": 0.25, "gap": 0.25}},
        {"scores": {"loss": [9, 1, 1, 1], "gap": [1, 2, 3, 4]}},
        "123",
    ),  # the same row twice
    ({"drop_worst": {"loss": 0.25, "gap": 0.25}}, {"scores": {"loss": [9, 1, 1, 1], "gap": [4, 1, 3, 4]}}, "23"),
    (
        {"drop_worst": {"loss": 0.5}, "unknown": "keep"},
        {"scores": {"loss": [nan, 9, 2, nan]}},
        "03",
    ),  # half of four, among the known
    ({"drop_worst": {"loss": 0.5}, "unknown": "drop"}, {"scores": {"loss": [nan, 9, 2, 1]}}, "3"),
    (
        {"drop_worst": {"loss": 0.25}},
        {"scores": {"loss": [nan, 9, 2, 1]}, "excused": {"loss": [1, 0, 0, 0]}},
        "023",
    ),  # its NULL is a value
    ({"drop_worst": {"loss": 0.1}}, {"scores": {"loss": [1, 9, 2, 3]}}, "0123"),  # 0.4 rows is none
    ({"keep": {"share": 0.5}, "order_by": "k"}, {"order": [4, 1, 3, 2]}, "13"),
    ({"keep": {"share": 0.6}}, {}, "01"),  # 2.4 rows
    ({"keep": {"share": 0.625}}, {}, "012"),  # 2.5 rows: halves up
    ({"keep": {"rows": 3}, "order_by": "k"}, {"order": [4, 1, 3, 2]}, "123"),
    ({"keep": {"rows": 9}}, {}, "0123"),
    ({"keep": {"rows": 0}}, {}, ""),
    ({"keep": {"tokens": 10}}, {"tokens": [4, 6, 1, 1]}, "01"),
    ({"keep": {"tokens": 9}}, {"tokens": [4, 6, 1, 1]}, "0"),  # stops before the budget is passed
    ({"keep": {"tokens": 9}, "unknown": "drop"}, {"tokens": [4, nan, 1, 9]}, "02"),
    ({"keep": {"rows": 1}, "per": "g"}, {"groups": ["a", "b", "a", None]}, "013"),
    ({"keep": {"share": 0.5}, "per": "g"}, {"groups": ["a", "a", "b", "b"], "order": [2, 1, 4, 3]}, "13"),
    ({"per": {"g": {"a": 0.5, "b": 1.0}}}, {"groups": ["a", "a", "b", "b"]}, "023"),
    ({"per": {"g": {"a": 0.5}}, "keep": {"share": 0.0}}, {"groups": ["a", "a", "b", "b"]}, "0"),
    ({"keep": {"rows": 3}, "duplicates": "as_found"}, {"weight": [2, 2, 1, 1]}, "0"),  # 2, then 4 > 3: a prefix
    ({"keep": {"share": 0.5}, "duplicates": "as_found"}, {"weight": [2, 1, 1, 2]}, "01"),
    ({"order_by": "k", "keep": {"rows": 2}, "unknown": "drop"}, {"unknown": ["k", None, None, None]}, "12"),
    (
        {"order_by": "k", "keep": {"rows": 2}, "unknown": "keep"},
        {"unknown": ["k", None, None, None], "order": [4, 1, 2, 3]},
        "12",
    ),
    (
        {"drop_worst": {"loss": 0.25}, "keep": {"share": 0.5}},
        {"scores": {"loss": [9, 1, 1, 1]}},
        "12",
    ),  # of what is left: 1.5 of 3
]


@pytest.mark.parametrize("spec, arrays, kept", TABLE)
def test_by_hand(spec, arrays, kept):
    found = decide(candidates(4, **arrays), SelectSpec(**spec), WORST)
    assert "".join(str(i) for i in np.flatnonzero(found.kept)) == kept
    assert all(found.reasons)
    assert found.counts["kept"] == len(kept)
    assert sum(found.counts["dropped_by"].values()) == 4 - len(kept)


def test_reasons():
    spec = SelectSpec(
        where="a  <\n b", drop_worst={"loss": 0.4}, order_by="k desc", keep={"share": 0.5}, unknown="drop"
    )
    arrays = candidates(
        6, passed=[0, nan, 1, 1, 1, 1], scores={"loss": [0, 0, 0.00031, 0, 0, nan]}, order=[0, 0, 0, 2, 1, 0]
    )
    found = decide(arrays, spec, {"loss": "high"})
    assert found.reasons == [
        Reason("where", "where: a < b is false"),
        Reason("unknown", "where: a < b is unknown"),
        Reason("drop_worst", "worst 40% by loss", 0.00031, 0.0),
        Reason("drop_worst", "worst 40% by loss", 0.0, 0.0),
        Reason("keep", "kept: within keep share 0.5 by k desc", 1, 1),
        Reason("unknown", "loss is unknown"),
    ]
    assert found.rank.tolist() == [0, 0, 0, 0, 1, 0]
    beyond = decide(candidates(3, groups=["x"] * 3), SelectSpec(keep={"rows": 1}, per="g"), {})
    assert beyond.reasons[2] == Reason("keep", "beyond keep 1 rows of g x in the order read", 3, 1)
    tokens = decide(candidates(2, tokens=[900, 200]), SelectSpec(keep={"tokens": 1000}), {})
    assert tokens.reasons[1] == Reason("keep", "beyond keep 1,000 tokens in the order read", 1100, 1000)
    assert str(tokens.reasons[1]) == "beyond keep 1,000 tokens in the order read (1100 against 1000)"


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_rows_does_not_matter(seed):
    random = np.random.default_rng(seed)
    n = 40
    loss, tokens, groups = (
        random.integers(0, 5, n).astype(float),
        random.integers(1, 9, n).astype(float),
        random.choice(["a", "b"], n).tolist(),
    )
    spec = SelectSpec(drop_worst={"loss": 0.3}, order_by="k", keep={"tokens": 30}, per="g")
    rows = candidates(n, scores={"loss": loss}, tokens=tokens, groups=groups, order=random.permutation(n))
    kept = {r for r, k in zip(rows.row_ids, decide(rows, spec, WORST).kept, strict=True) if k}
    p = random.permutation(n)
    shuffled = Candidates(
        [rows.row_ids[i] for i in p],
        rows.passed[p],
        {"loss": loss[p]},
        rows.order[p],
        [None] * n,
        [groups[i] for i in p],
        tokens[p],
        rows.weight[p],
    )
    again = decide(shuffled, spec, WORST)
    assert {r for r, k in zip(shuffled.row_ids, again.kept, strict=True) if k} == kept


@pytest.mark.parametrize("spec, arrays", [
    ({"where": "x"}, {"passed": [1, nan]}),
    ({"drop_worst": {"loss": 0.1}}, {"scores": {"loss": [1, nan]}}),
    ({"order_by": "k"}, {"unknown": [None, "k"]}),
    ({"keep": {"tokens": 5}}, {"tokens": [1, nan]}),
])  # fmt: skip
def test_unknown_is_an_error_by_default(spec, arrays):
    with pytest.raises(ValidationError, match=r"unknown for 1 of 2 rows \(the first: row r1\)|is unknown for 1 of 2"):
        decide(candidates(2, **arrays), SelectSpec(**spec), WORST)


def test_groups_without_a_share():
    arrays = candidates(2, groups=["a", "b"])
    with pytest.raises(UsageError, match="no share for 'b'"):
        decide(arrays, SelectSpec(per={"g": {"a": 0.5}}), {})
    with pytest.raises(UsageError, match="no row has g = 'c'; found a, b"):
        decide(arrays, SelectSpec(per={"g": {"c": 0.5}}), {})


def test_whole_rounds_halves_up():
    assert [whole(x) for x in (0.4, 0.5, 1.5, 2.5, 0.3 * 5, 0.1 * 15, 2.4999)] == [0, 1, 2, 3, 2, 2, 2]


def test_order_keys_and_splitting():
    assert order_keys("flip_loss desc, abs(a - b), c ASC nulls first") == [
        ("flip_loss", "DESC NULLS LAST"),
        ("abs(a - b)", "ASC NULLS LAST"),
        ("c", "ASC NULLS FIRST"),
    ]
    assert order_keys("coalesce(a, 0) DESC") == [("coalesce(a, 0)", "DESC NULLS LAST")]
    assert split_top("f(a, b), 'x,y', [1, 2]") == ["f(a, b)", " 'x,y'", " [1, 2]"]


@pytest.mark.parametrize(
    "text", ["a; DROP TABLE x", "a) FROM rows --", "a = 1 -- all", "1) OR (1", "(a", "'open", " ", "a /* b"]
)
def test_no_second_statement(text):
    with pytest.raises(UsageError, match=r"select\.where"):
        check_expression(text, "select.where")
    check_expression("prompt = 'a; -- (b' AND (x > 1)", "select.where")


PAIRS = [Pair(f"q{i}", "yes" * i, "no") for i in range(8)]
IDS = [p.row_id for p in PAIRS]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s", create=True)
    record = lambda i, row, **columns: SimpleNamespace(index=i, row=row, columns=columns)  # noqa: E731
    store.add_source(
        "a",
        "1",
        [record(i, PAIRS[i], topic="even" if i % 2 == 0 else "odd") for i in range(6)]
        + [record(6, PAIRS[1], topic="again")],
    )
    store.add_source("b", "1", [record(0, PAIRS[6]), record(1, PAIRS[0])])
    store.add_source("held", "1", [record(0, PAIRS[7])], role="heldout")
    lengths = {"prompt_tokens": [2.0] * 7, "chosen_tokens": [1, 2, 3, 4, 5, 6, 7], "rejected_tokens": [1.0] * 7}
    store.write_shard(Measured("len", "length", "tokens"), 0, IDS[:7], lengths)
    store.ingest()
    store.register_recipe("r", "", sources=["a", "b", "held"], uses=["len"], plain=["len"])
    first = [5.0, nan, 3.0, nan, 1.0, 0.0, 2.0]
    never = [False, True, False, True, False, False, False]
    store.write_scores(
        "r",
        IDS[:7],
        {
            "flip_loss": [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
            "gap": [1, 2, 3, 4, 5, 6, nan],
            "first": first,
            "never": never,
        },
    )
    return store


def kept(store, spec, **more):
    found = select(
        store,
        SelectSpec(**spec),
        worst={"flip_loss": "high", "gap": "low", "neither": "none", "uncomputed": "low"},
        recipe="r",
        **more,
    )
    return "".join(str(IDS.index(r)) for r, k in zip(found.row_ids, found.kept, strict=True) if k)


@pytest.mark.parametrize("spec, wanted", [
    ({}, "0123456"),  # held-out rows are never selected
    ({"where": "chosen_tokens + rejected_tokens < 6"}, "0123"),
    ({"where": "topic = 'even' OR source = 'b'"}, "0246"),
    ({"where": "flip_loss > (SELECT median(flip_loss) FROM scored)"}, "012"),
    ({"where": "flip_loss > 0.15", "drop_worst": {"flip_loss": 0.34}, "order_by": "flip_loss", "keep": {"rows": 2}}, "45"),
    ({"order_by": "source DESC, flip_loss", "keep": {"rows": 3}}, "456"),
    ({"order_by": "flip_loss desc", "keep": {"share": 0.5}, "per": "source"}, "0126"),
    ({"per": {"source": {"a": 0.5, "b": 1.0}}}, "0126"),
    ({"keep": {"tokens": 10}, "order_by": "flip_loss DESC"}, "01"),
    ({"where": "gap < 9", "unknown": "drop"}, "012345"),
])  # fmt: skip
def test_through_a_store(store, spec, wanted):
    assert kept(store, spec) == wanted


def test_sources_narrow(store):
    assert kept(store, {}, sources=["b"]) == "06"


def test_a_null_that_is_a_value(store):
    spec = {"order_by": "first", "keep": {"rows": 3}}
    with pytest.raises(ValidationError, match="first is unknown for 2 of 7 rows"):
        kept(store, spec)
    assert kept(store, spec, null_is_known={"first": "never"}) == "456"
    with pytest.raises(ValidationError, match="first is unknown"):
        kept(store, spec, null_is_known={"first": "a_score_of_another_recipe"})


@pytest.mark.parametrize("spec, told", [
    ({"where": "flop_loss > 1"}, r"select\.where: no column 'flop_loss'; did you mean 'flip_loss'"),
    ({"where": "flip_loss >"}, r"select\.where: this is not one whole SQL expression: flip_loss >"),
    ({"where": "prompt > 3"}, r"select\.where: prompt > 3: cannot compare"),
    ({"order_by": "flip_los desc"}, r"select\.order_by: no column 'flip_los'"),
    ({"per": "sorce"}, r"select\.per: no column 'sorce'; did you mean 'source'"),
    ({"drop_worst": {"flip_lass": 0.1}}, "did you mean 'flip_loss'"),
    ({"drop_worst": {"neither": 0.1}}, "neither end of 'neither'"),
    ({"drop_worst": {"uncomputed": 0.1}}, "no column 'uncomputed' is there yet"),
])  # fmt: skip
def test_errors_name_the_key(store, spec, told):
    with pytest.raises(UsageError, match=told):
        kept(store, spec)


def test_a_selection_is_kept_with_reasons(store):
    spec = SelectSpec(order_by="flip_loss", keep={"rows": 2})
    found = store.write_selection("best", select(store, spec, worst={}, recipe="r"), recipe="r", spec=spec.as_dict())
    assert found.counts["dropped_by"] == {"keep": 5}
    assert [(k.row_id, k.rank, k.source, k.columns) for k in found.kept(["flip_loss"])] == [
        (IDS[5], 2, "a", {"topic": "odd", "flip_loss": 0.2}),
        (IDS[6], 1, "b", {"flip_loss": 0.1}),
    ]
    assert [k.row for k in found.kept()] == [PAIRS[5], PAIRS[6]]
    view = store.sql("SELECT kept, rank, reason FROM selections WHERE selection = 'best' AND row_id = ?", [IDS[0]])
    assert view.row(0) == (False, 7, "beyond keep 2 rows by flip_loss")
    counted = store.sql("SELECT rule, reason, count(*), min(value), max(cut) FROM selections GROUP BY ALL ORDER BY ALL")
    assert counted.rows() == [
        ("keep", "beyond keep 2 rows by flip_loss", 5, 3.0, 2.0),
        ("keep", "kept: within keep 2 rows by flip_loss", 2, 1.0, 2.0),
    ]
    store.write_selection("best", select(store, SelectSpec(keep={"rows": 1}), worst={}, recipe="r"), recipe="r")
    assert store.sql("SELECT count(*) FROM selections").item() == 7
    assert store.selection().name == "best"
    with pytest.raises(UsageError, match="There are: best"):
        store.selection("worst")


def test_duplicates_once_or_as_found(store):
    def picked(duplicates):
        spec = SelectSpec(where="prompt IN ('q0', 'q1', 'q2')", duplicates=duplicates)
        selection = store.write_selection(
            "d", select(store, spec, worst={}, recipe="r"), recipe="r", spec=spec.as_dict()
        )
        return selection, [(IDS.index(k.row_id), k.source, k.index, k.columns.get("topic")) for k in selection.kept()]

    selection, once = picked("once")
    assert once == [(0, "a", 0, "even"), (1, "a", 1, "odd"), (2, "a", 2, "even")]
    repeats = [
        (IDS.index(d.row_id), d.source, d.index, d.reason)
        for d in selection.dropped()
        if d.reason.startswith("duplicate")
    ]
    assert repeats == [
        (0, "b", 1, f"duplicate of {IDS[0]}, which is kept from a:0"),
        (1, "a", 6, f"duplicate of {IDS[1]}, which is kept from a:1"),
    ]
    selection, found = picked("as_found")
    assert found == [
        (0, "a", 0, "even"),
        (0, "b", 1, None),
        (1, "a", 1, "odd"),
        (1, "a", 6, "again"),
        (2, "a", 2, "even"),
    ]
    assert not any(d.reason.startswith("duplicate") for d in selection.dropped())


def test_to_dataset(store):
    spec = SelectSpec(order_by="flip_loss", keep={"rows": 2})
    selection = store.write_selection(
        "best", select(store, spec, worst={}, recipe="r"), recipe="r", spec=spec.as_dict()
    )
    dataset = selection.to_dataset(["flip_loss"])
    assert dataset["prompt"][:] == ["q5", "q6"]
    assert dataset["chosen"][0] == PAIRS[5].chosen
    assert dataset["flip_loss"][:] == [0.2, 0.1]
