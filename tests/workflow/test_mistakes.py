"""What a user can get wrong is one clear error, before anything is measured."""

from __future__ import annotations

import pytest

import curate
import curate.plan.missing
from curate.errors import ModelError, UsageError, ValidationError
from tests.workflow.pairs import pairs, write_rows


@pytest.mark.parametrize(
    ("over", "error", "says"),
    [
        ({"scores": ["flip_los"]}, UsageError, "did you mean 'flip_loss'"),
        ({"scores": [{"flip_loss": {"bta": 1}}]}, UsageError, "did you mean 'beta'"),
        ({"scores": ["accuracy"]}, UsageError, "accuracy is for sft rows, this recipe's kind is preference"),
        ({"scores": ["nowhere.at_all:score"]}, UsageError, "no module 'nowhere'"),
        ({"models": {"reference": "no/where/model"}}, ModelError, "no such model folder"),
        ({"source": {"path": "paris.jsonl"}}, ValidationError, "pairs.jsonl"),
        ({"select": {"where": "chosen_token < 5"}}, UsageError, "chosen_tokens"),
        ({"select": {"drop_worst": {"ranking_gp": 0.1}}}, UsageError, "did you mean 'ranking_gap'"),
        ({"select": None}, UsageError, "needs a `select:` section"),
        ({"source": None}, UsageError, "there is no `source`"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_a_mistake_is_one_clear_error(recipe, over, error, says):
    path = recipe(**over)
    with pytest.raises(error) as raised:
        curate.run(path)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no rows at all"),
        ([{"prompt": "a", "chosen": True, "rejected": "b"}] * 2, "none of the 2 rows can be used"),
        (
            [*pairs(3), {"prompt": "a", "chosen": True, "rejected": "b"}],
            "row 4: 'chosen' is true (bool), expected text or messages.",
        ),
    ],
)
def test_bad_rows_are_named_with_the_next_command(recipe, tmp_path, rows, says):
    write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValidationError) as raised:
        curate.run(recipe())
    assert says in str(raised.value)
    if len(rows) == 4:
        assert "--set source.on_bad_row=drop" in str(raised.value)
        result = curate.run(recipe(), set={"source.on_bad_row": "drop"})
        assert result.measured["forward"] == 3


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"select": {"where": "chosen_token < 5"}, "export": None}, "select.where: .*chosen_tokens"),
        ({"select": {"order_by": "ches_lm desc"}, "export": None}, "select.order_by: .*ches_ln"),
        ({"select": {"per": "topi"}, "export": None}, "select.per: .*topic"),
        ({"select": {"drop_worst": {"ches_lm": 0.1}}, "export": None}, "did you mean 'ches_ln'"),
        ({"export": {"to": "out", "columns": ["ches_lm"]}}, "export.columns: .*did you mean 'ches_ln'"),
        ({"export": {"to": "out", "weight": "edit_distanc"}}, "export.weight: .*did you mean 'edit_distance'"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_a_misspelt_column_is_said_before_anything_is_measured(recipe, tmp_path, over, says):
    with pytest.raises(UsageError, match=says):
        curate.run(recipe(**over))
    assert curate.Store(tmp_path / "store").measured() == []
