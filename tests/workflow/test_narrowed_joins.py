"""A query that names its columns joins the tables of those alone, and sees what every other query sees."""

import json

import pytest

from curate.store import Store
from curate.workflow.run import run
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrowed")
    make_llama(folder / "model", seed=0)
    rows = [{"prompt": f"q{i}", "chosen": f" a{i}", "rejected": f" b{i}", "logp": i / 7} for i in range(9)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "twice.jsonl").write_text("\n".join(map(json.dumps, [*rows[:3], rows[0]])))
    for name in ("rows", "twice"):
        recipe = f"kind: preference\nsource: {name}.jsonl\nmodels: {{reference: model}}\nscores: [ranking_gap]\nselect: {{}}\n"
        (folder / f"{name}.yaml").write_text(recipe)
        run(folder / f"{name}.yaml", store=folder / "store")
    return Store(folder / "store")


@pytest.mark.parametrize("recipe", ["rows", "twice"])
@pytest.mark.parametrize(
    "columns", ["ranking_gap", "chosen_logp, Chosen_Tokens", "logp, n_occurrences, source, index", "user_logp"]
)
def test_the_same_values(store, recipe, columns):
    text = f"SELECT row_id, {columns} FROM scored ORDER BY position"
    if columns == "user_logp":
        with pytest.raises(Exception, match="user_logp"):
            store.sql(text, recipe=recipe, names_columns=True)
        return
    assert store.sql(text, recipe=recipe, names_columns=True).equals(store.sql(text, recipe=recipe))
    assert store.sql(text, recipe=recipe).height == (9 if recipe == "rows" else 3)


def test_rows_that_occur_more_than_once_are_counted(store):
    counted = "SELECT n_occurrences FROM scored ORDER BY position"
    assert store.sql(counted, recipe="twice")["n_occurrences"].to_list() == [2, 1, 1]
    assert store.sql(counted, recipe="rows")["n_occurrences"].to_list() == [1] * 9


def test_rows_of_one_of_two_sources_are_not_all_rows(store):
    assert len(store.row_ids_of(["rows.jsonl"])) == 9 and len(store.row_ids_of(["twice.jsonl"])) == 3
    assert store.row_ids_of(["rows.jsonl"], role="heldout") == []
    assert len(store.coverage([], ["twice.jsonl"]).lacking) == 0 and store.coverage([], ["twice.jsonl"]).n == 3
