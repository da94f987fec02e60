"""What is up to date is said to be and left as it is; what is not is made again."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import yaml

import curate
from curate.console import Progress
from curate.errors import UsageError
from curate.store import Measured
from tests.tiny_models import make_llama
from tests.workflow.pairs import pairs


class Said(Progress):
    def __init__(self):
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs(12))))
    make_llama(tmp_path / "model", seed=0)
    raw = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"reference": "model"},
        "engine": {"device": "cpu"},
        "scores": ["ranking_gap"],
        "select": {"drop_worst": {"ranking_gap": 0.2}},
        "export": {"to": "out", "columns": "scores"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "recipe.yaml"


def run(recipe, **settings):
    said = Said()
    result = curate.run(recipe, set=settings, progress=said)
    return result, {
        word
        for word in ("Scores", "Selection", "The export")
        if any(s.startswith(word) and "up to date" in s for s in said.lines)
    }


def test_what_is_up_to_date_is_left_as_it_is(recipe):
    first, said = run(recipe)
    assert not said
    file = recipe.parent / "out" / "data" / "train-00000.parquet"
    written = file.stat().st_mtime_ns
    again, said = run(recipe)
    assert said == {"Scores", "Selection", "The export"}
    assert file.stat().st_mtime_ns == written
    assert again.scores == first.scores and again.values == first.values and again.exported == first.exported
    assert again.selection.counts == first.selection.counts and again.to_json()["export"] == first.to_json()["export"]
    with pytest.raises(UsageError, match="ranking_gab"):  # the rules are not checked again, other columns are
        run(recipe, **{"export.columns": ["ranking_gab"]})
    (recipe.parent / "out" / "train" / "cache-1.arrow").write_text("a cache of `map`")
    assert run(recipe)[1] == {"Scores", "Selection", "The export"}
    file.write_bytes(b"damaged")
    assert run(recipe)[1] == {"Scores", "Selection"} and file.stat().st_size > 100
    assert run(recipe, **{"export.columns": "none"})[1] == {"Scores", "Selection"}
    assert run(recipe, **{"select.drop_worst": {"ranking_gap": 0.4}})[1] == {"Scores"}
    with (recipe.parent / "pairs.jsonl").open("a") as rows:
        rows.write("\n" + json.dumps({"prompt": "new", "chosen": " row", "rejected": " here"}))
    assert not run(recipe)[1]


def test_another_beta_or_name_of_a_checkpoint_makes_scores_and_dataset_values_anew(recipe):
    """Both reach dataset values by no score's setting."""
    for step in (1, 2):
        make_llama(recipe.parent / "run" / f"checkpoint-{step}", seed=step)
    series = {"models.checkpoints": "run", "scores": ["ranking_gap", "flipped"]}
    first, _ = run(recipe, **series)
    assert "Scores" in run(recipe, **series)[1]
    other, said = run(recipe, **series, **{"forecast.beta": 5.0})
    assert "Scores" not in said and other.values != first.values
    assert "Scores" not in run(recipe, **series)[1]
    (recipe.parent / "run" / "checkpoint-2").rename(recipe.parent / "run" / "checkpoint-20")
    renamed, said = run(recipe, **series)
    assert "Scores" not in said and {value.step for value in renamed.values} >= {20}


def test_in_a_store_with_imports_nothing_is_taken_for_up_to_date(recipe):
    first, _ = run(recipe)
    assert run(recipe)[1]
    ids = first.store.row_ids_of()
    first.store.put_values(
        [Measured("p" * 20, "mine", "import")],
        pa.table({"fingerprint": ["p" * 20] * len(ids), "row_id": ids, "größe": [1.0] * len(ids)}),
    )
    assert not run(recipe)[1] & {"Scores", "Selection"}


def test_a_rule_with_a_query_of_its_own_is_asked_again(recipe):
    asks = {"select.where": "n_occurrences <= (SELECT max(n_occurrences) FROM scored)"}
    run(recipe, **asks)
    assert not run(recipe, **asks)[1]


def test_a_score_of_the_users_own_is_computed_again(recipe):
    own = "from curate import score\n\n\n@score(needs=('chosen_logp',))\ndef mine_up_to_date(logp):\n    return logp\n"
    (recipe.parent / "mine_current.py").write_text(own)
    mine = {"scores": ["ranking_gap", "mine_current:mine_up_to_date"]}
    run(recipe, **mine)
    assert not run(recipe, **mine)[1]
