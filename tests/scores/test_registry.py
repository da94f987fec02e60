"""The score decorator and registry: declarations, parameters, errors that name the nearest right thing, a user's own."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from curate.errors import UsageError
from curate.scores import DATASET_VALUES, SCORES, Need, Positive, Range, dataset_value, resolve, score

NOW = {
    "ranking_gap", "ranking_correct", "ranking_correct_ln", "flip_loss", "break_even_agreement", "implicit_reward_gap",
    "edit_distance", "ches", "ches_ln", "last_state_product", "accuracy", "target_nll", "difficulty", "premem_accuracy",
    "fluent", "confidence", "variability", "correctness", "forgetting_events", "first_learned_step", "never_learned",
    "loss_drop", "learning_impact", "phase", "limem", "map_region", "neighbour_excess", "flipped", "flip_step", "never_flipped",
    "batch_forecast", "margin_forecast", "head_forecast", "displacement_contribution", "influence",
    "influence_cosine", "influence_group", "pass_rate", "pass_rate_low", "pass_rate_high", "pass_at", "pass_band",
}  # fmt: skip
NO_DEFAULT = {name: {"target": "refusals"} for name in ("influence", "influence_cosine", "influence_group")}
ONE_OF = {"limem": ("perturbed_accuracy",)}  # of what else it may read, it must have one


def columns_of(s):
    """The columns that a score cannot do without."""
    return (*s.needs, *ONE_OF.get(s.name, ()))


def test_every_name_of_the_interface_so_far():
    assert set(SCORES) >= NOW
    assert all(SCORES[name].name == name and resolve(name) is SCORES[name] for name in SCORES)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_score_says_what_it_is(name):
    s = SCORES[name]
    assert (
        s.unit
        and s.high_means
        and s.source
        and s.description.endswith((".", ":"))
        and s.worst in ("high", "low", "none")
    )
    assert s.kind in ("preference", "sft") or name in NO_DEFAULT
    assert s.null_where == "" or s.null_where in SCORES


@pytest.mark.parametrize("name", sorted(SCORES))
def test_no_rows_and_unknown_rows(name):
    """No rows give no values; rows of which nothing is known are unknown, never 0."""
    s = SCORES[name]
    k = 3 if s.over else None
    for rows in (0, 2):
        shape = (rows, k) if k else (rows,)
        columns = {need: np.full(shape, np.nan) for need in columns_of(s)}
        with np.errstate(all="raise"):
            result = s.compute(columns, steps=[0, 5, 9][: k or 0] or None, params=NO_DEFAULT.get(name))
        assert result.shape == (rows,) and np.isnan(result).all()


@pytest.mark.parametrize("name", sorted(n for n in SCORES if SCORES[n].over is None))
def test_one_unknown_column_makes_the_score_unknown(name):
    s = SCORES[name]
    for unknown in columns_of(s):
        columns = {need: np.array([np.nan if need == unknown else 3.0]) for need in columns_of(s)}
        assert np.isnan(s.compute(columns)).all()


@pytest.mark.parametrize("name", sorted(n for n in SCORES if n not in ("learning_impact", "phase", "map_region")))
def test_a_row_does_not_depend_on_the_others(name):
    s = SCORES[name]
    rng = np.random.default_rng(0)
    shape = (40, 4) if s.over else (40,)
    columns = {need: np.where(rng.random(shape) < 0.15, np.nan, rng.random(shape).round(1)) for need in columns_of(s)}
    whole = s.compute(columns, steps=[0, 1, 2, 3], params=NO_DEFAULT.get(name))
    order = rng.permutation(40)
    mixed = {need: values[order] for need, values in columns.items()}
    shuffled = s.compute(mixed, steps=[0, 1, 2, 3], params=NO_DEFAULT.get(name))
    np.testing.assert_array_equal(shuffled, whole[order])


@pytest.mark.parametrize("name", sorted(n for n in SCORES if SCORES[n].per_checkpoint))
def test_the_last_of_a_scores_values_over_checkpoints_is_the_score(name):
    s, rng = SCORES[name], np.random.default_rng(1)
    columns = {need: np.where(rng.random((30, 4)) < 0.1, np.nan, rng.random((30, 4))) for need in s.needs}
    each = s.compute_each(columns, steps=[0, 1, 2, 3])
    assert each.shape == (30, 4) and len(np.unique(each[~np.isnan(each)])) > 2
    np.testing.assert_array_equal(each[:, -1], s.compute(columns, steps=[0, 1, 2, 3]))


@pytest.mark.parametrize("name", sorted(SCORES))
def test_arguments_are_not_changed(name):
    s = SCORES[name]
    shape = (4, 3) if s.over else (4,)
    columns = {need: np.linspace(0.1, 0.9, int(np.prod(shape))).reshape(shape) for need in columns_of(s)}
    before = {need: values.copy() for need, values in columns.items()}
    result = s.compute(columns, steps=[1, 2, 3], params=NO_DEFAULT.get(name))
    assert all(not np.shares_memory(result, values) for values in columns.values())
    assert all((columns[need] == before[need]).all() for need in columns)


@pytest.mark.parametrize(
    "name, cost",
    [("edit_distance", "free"), ("ches_ln", "forward"), ("flip_loss", "forward"), ("implicit_reward_gap", "forward"),
     ("accuracy", "sampling"), ("premem_accuracy", "sampling"), ("fluent", "forward"), ("influence", "direction"), ("head_forecast", "direction")],
)  # fmt: skip
def test_cost_comes_from_the_needs(name, cost):
    assert SCORES[name].cost == cost


def test_costs_agree_with_the_measurements():
    """What scores believe a column costs is what its measurement reads."""
    from curate.measurements import providers
    from curate.scores.declared import cost_of

    reads = {"tokens": "free", "forward": "forward", "sample": "sampling", "neighbours": "forward"}
    for s in SCORES.values():
        for need in s.needs:
            role, column = s.need(need, s.check(NO_DEFAULT.get(s.name, {})))
            if role == "row":  # the user's own
                continue
            for kind in ("preference", "sft") if s.kind == "any" else (s.kind,):
                provider = providers(column, kind)
                assert provider is not None, f"{s.name} needs {column}, which no measurement gives"
                assert cost_of(column) == cost_of(Need.read(need).column) == reads.get(provider.reads, provider.reads)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"bta": 1}, "did you mean 'beta'"),
        ({"zzz": 1}, "it takes beta"),
        ({"beta": 0}, "above 0"),
        ({"beta": "0.1"}, "expected a number"),
        ({"beta": True}, "expected a number"),
        ({"beta": float("nan")}, "expected a number"),
    ],
)
def test_wrong_parameters(wrong, words):
    with pytest.raises(UsageError, match=words) as error:
        SCORES["flip_loss"].check(wrong)
    assert "flip_loss" in str(error.value)


def test_parameters_are_filled_in_and_become_floats():
    assert SCORES["flip_loss"].check({}) == {"beta": 0.1}
    found = SCORES["flip_loss"].check({"beta": 1})
    assert found == {"beta": 1.0} and isinstance(found["beta"], float)
    assert SCORES["premem_accuracy"].check({"threshold": {"easy": 1, "hard": 0.2}}) == {
        "threshold": {"easy": 1.0, "hard": 0.2},
        "per": "group",
    }
    with pytest.raises(UsageError, match="above 0"):
        SCORES["premem_accuracy"].check({"threshold": -1})
    with pytest.raises(UsageError, match="mapping"):
        SCORES["premem_accuracy"].check({"threshold": "low"})
    with pytest.raises(UsageError, match="at least 0 and at most 1"):
        SCORES["correctness"].check({"level": 1.5})
    with pytest.raises(UsageError, match="true or false"):
        SCORES["ches"].check({"eos_state": 1})


def test_a_need_takes_the_default_of_a_parameter_that_nobody_gave():
    """Dataset values are asked with the parameters that the recipe's scores happen to share."""
    assert DATASET_VALUES["premem_values"].need("row.{per}", {}) == ("row", "group")
    assert SCORES["premem_accuracy"].need("row.{per}", {"per": "topic"}) == ("row", "topic")


def test_a_misspelt_score_gets_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'flip_loss'"):
        resolve("flip_los")
    with pytest.raises(UsageError, match="curate scores"):
        resolve("qqqq")


OWN = """
import numpy as np
from curate import score

@score(needs=("chosen_tokens", "policy.chosen_logp"), optional=("row.votes",), unit="tokens", worst="high", high_means="long")
def novelty(chosen_tokens, policy_chosen_logp, votes=None, *, scale=2.0):
    "Twice the length."
    return scale * chosen_tokens

@score(needs=("chosen_tokens",))
def wrong_shape(chosen_tokens):
    return chosen_tokens.sum()

def plain(x):
    return x
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own_scores_for_test.py").write_text(OWN)
    (tmp_path / "own_broken_for_test.py").write_text("import nowhere_at_all_xyz\n")
    yield tmp_path
    for name in ("own_scores_for_test", "own_broken_for_test"):
        sys.modules.pop(name, None)


def test_a_users_own_score(own):
    path = list(sys.path)
    s = resolve("own_scores_for_test:novelty", folder=own)
    assert sys.path == path
    assert s.columns == (("", "chosen_tokens"), ("policy", "chosen_logp"), ("row", "votes"))
    assert s.cost == "forward" and "novelty" not in SCORES
    columns = {"chosen_tokens": [1, 2], "policy.chosen_logp": [0, 0]}
    assert s.compute(columns, params={"scale": 3}).tolist() == [3.0, 6.0]
    assert s.compute({**columns, "row.votes": ["a", "b"]}).tolist() == [2.0, 4.0]
    with pytest.raises(UsageError, match=r"policy\.chosen_logp, which nobody measured"):
        s.compute({"chosen_tokens": [1, 2]})
    with pytest.raises(UsageError, match="different numbers of rows"):
        s.compute({"chosen_tokens": [1, 2], "policy.chosen_logp": [0]})


@pytest.mark.parametrize(
    "spec, words",
    [
        ("no_such_module_xyz.scores:novelty", "there is no module 'no_such_module_xyz'"),
        ("own_scores_for_test:novlty", "Did you mean 'novelty'"),
        ("own_scores_for_test:plain", "decorated with @curate.score"),
        ("own_broken_for_test:novelty", "nowhere_at_all_xyz"),
        ("own_scores_for_test:", "package.module:object"),
    ],
)
def test_a_users_own_score_that_is_not_there(own, spec, words):
    with pytest.raises(UsageError, match=words):
        resolve(spec, folder=own)


def test_a_score_must_return_one_number_a_row(own):
    with pytest.raises(UsageError, match=r"returned shape \(\), expected one number a row: \(2,\)"):
        resolve("own_scores_for_test:wrong_shape", folder=own).compute({"chosen_tokens": [1, 2]})


def test_series_columns_are_checked():
    with pytest.raises(UsageError, match=r"accuracy has shape \(2,\), expected \(rows, checkpoints\)"):
        SCORES["correctness"].compute({"accuracy": [0.5, 1]})


def test_declarations_that_contradict_the_function():
    with pytest.raises(TypeError, match="keyword-only"):

        @score(needs=("chosen_logp",))
        def two(chosen_logp, beta=0.1):
            return chosen_logp

    with pytest.raises(TypeError, match="tuples"):
        score(needs="chosen_logp")(lambda chosen_logp: chosen_logp)


def test_ranges_and_dataset_values_of_ones_own():
    assert str(Range(0, above=True)) == "above 0" and str(Range(0, 1)) == "at least 0 and at most 1"

    @dataset_value(needs=("accuracy",))
    def mine(accuracy, *, beta: Positive = 1.0):
        return []

    assert mine.compute({"accuracy": [1.0]}, params={"beta": 2}) == [] and "mine" not in DATASET_VALUES
    with pytest.raises(UsageError, match="dataset value mine"):
        mine.check({"beta": -1})
