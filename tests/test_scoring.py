"""From measured columns to scores: which fingerprints make a series, and in which order."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.data import read
from curate.errors import UsageError
from curate.plan.requests import requested_scores
from curate.recipe.load import load_recipe
from curate.scores import SCORES, score
from curate.store import Measured, Store
from curate.workflow.columns import Columns, own_values, series_of


def measured(name: str, step: int | None) -> Measured:
    return Measured(name, "likelihood", "forward", run="sft", checkpoint=name, step=step)


def test_a_checkpoint_of_an_unknown_step_comes_last():
    """A model beside the numbered checkpoints (`merged/`) is the plan's last one, whatever number its place in the list is."""
    known = [measured("checkpoint-100", 100), measured("checkpoint-200", 200), measured("merged", None)]
    uses = {("", "target_nll", "checkpoints"): [m.fingerprint for m in known]}
    (series,) = series_of(known, uses, "checkpoints")
    assert series.columns["target_nll"] == ["checkpoint-100", "checkpoint-200", "merged"]
    assert series.steps == (100, 200, None)


def test_where_no_step_is_known_the_order_stands_for_it():
    known = [measured("b", None), measured("a", None)]
    (series,) = series_of(known, {("", "target_nll", "checkpoints"): ["b", "a"]}, "checkpoints")
    assert series.steps == (0, 1) and series.checkpoints == ("b", "a")


def test_scores_take_a_step_that_nobody_knows():
    accuracy = np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    first = SCORES["first_learned_step"].compute({"accuracy": accuracy}, steps=(100, 200, None))
    assert first.tolist()[0] == 200 and np.isnan(first[1])
    logps = {"chosen_logp": np.array([[-2.0, -1.0, -3.0]]), "rejected_logp": np.array([[-1.0, -2.0, -1.0]])}
    flipped = SCORES["flipped"].compute(logps, steps=(100, 200, None), params={"last": 200})
    assert flipped.tolist() == [1.0]

    @score(needs=("accuracy",), over="checkpoints")
    def given(accuracy, *, steps=None):
        return np.full(len(accuracy), steps.dtype.kind == "i", float)

    assert given.compute({"accuracy": accuracy}, steps=(0, 1, 2)).tolist() == [1.0, 1.0]


def test_a_users_columns_come_to_a_score_as_pythons_own_values(tmp_path):
    when = [datetime.datetime.fromisoformat("2026-01-02T03:04:05"), None, datetime.datetime.fromisoformat("2025-01-01")]
    tags, meta = [["a", "b"], ["c", "d"], None], [{"lang": "en"}, None, {"lang": "de"}]
    rows = {
        "prompt": ["q0", "q1", "q2"],
        "completion": ["x", "y", "z"],
        "tags": tags,
        "meta": meta,
        "when": when,
        "day": [datetime.date(2026, 1, 2)] * 3,
        "n": [1, None, 3],
        "ok": [True, False, None],
        "word": ["w", None, "v"],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    store = Store(tmp_path / "s", create=True)
    records = list(read(tmp_path / "rows.parquet", kind="sft"))
    store.add_source("a", "1", records)
    store.add_source("b", "1", [SimpleNamespace(index=0, row=records[0].row, columns={"mixed": [1]}),
                                SimpleNamespace(index=1, row=records[1].row, columns={"mixed": {"k": 2}})])  # fmt: skip
    ids = [r.row.row_id for r in records]
    nothing = SimpleNamespace(steps=[], recorded=None)
    store.add_source(
        "c", "1", [SimpleNamespace(index=i, row=r.row, columns={"when": when[i]}) for i, r in enumerate(records)]
    )
    columns = Columns(store, nothing, ids, ["a"])
    assert columns.own("tags").tolist() == tags and columns.own("tags").shape == (3,)
    assert columns.own("meta").tolist() == meta and columns.own("when").tolist()[:2] == ["2026-01-02T03:04:05", None]
    assert Columns(store, nothing, ids, ["c"]).own("when").tolist() == when  # rows that a program put in
    assert columns.own("word").tolist() == ["w", None, "v"] and columns.own("day")[0] == "2026-01-02"
    np.testing.assert_array_equal(columns.own("n"), [1.0, np.nan, 3.0])
    np.testing.assert_array_equal(columns.own("ok"), [1.0, 0.0, np.nan])
    assert Columns(store, nothing, ids, ["b"]).own("mixed").tolist() == [[1], {"k": 2}, None]

    @score(needs=("row.tags", "row.when"))
    def recent(tags, when):
        return [len(t or []) + (w.year if w else 0) for t, w in zip(tags, when, strict=True)]

    given = {"row.tags": columns.own("tags"), "row.when": Columns(store, nothing, ids, ["c"]).own("when")}
    assert recent.compute(given).tolist() == [2028.0, 2.0, 2025.0]
    assert recent.compute({"row.tags": tags, "row.when": when}).tolist() == [2028.0, 2.0, 2025.0]
    assert own_values([datetime.date(2026, 1, 2)]).tolist() == [datetime.datetime.fromisoformat("2026-01-02")]

    @score(needs=("row.tags",))
    def careless(tags):
        return [len(t) for t in tags]

    with pytest.raises(UsageError, match=r"careless .* failed on the columns row.tags: TypeError"):
        careless.compute({"row.tags": columns.own("tags")})


@pytest.mark.parametrize(
    "name", ["prompt_tokens", "Chosen_Tokens", "accuracy", "target_nll", "step", "random", "token_problem", "trained"]
)
def test_a_score_cannot_hide_a_column_that_something_else_reads(name):
    recipe = {"kind": "preference", "source": "x.jsonl", "scores": [{"ches": {"as": name}}]}
    with pytest.raises(UsageError, match=f"ches cannot be called '{name}'.*as: {name}_score"):
        requested_scores(load_recipe(recipe))


def test_measured_columns_that_are_scores_keep_their_names():
    for scores in (["accuracy"], ["target_nll", {"target_nll": {"as": "loss"}}]):
        loaded = load_recipe({"kind": "sft", "source": "x.jsonl", "scores": scores})
        assert [want.name for want in requested_scores(loaded)][:1] == scores[:1]
    codes = {"kind": "sft", "source": "x.jsonl", "scores": ["map_region", {"confidence": {"as": "map_region_name"}}]}
    with pytest.raises(UsageError, match="text column of the score map_region"):
        requested_scores(load_recipe(codes))
