"""The recipe: strict, with errors that name file, line, key and the nearest right key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from curate.errors import UsageError
from curate.recipe.load import load_recipe
from curate.recipe.schema import Recipe, schema

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: preference\nsorce: a.jsonl", "line 2: 'sorce' is not a key of a recipe; did you mean 'source'?"),
        (
            "kind: preference\nselect:\n  dropworst: {}",
            "line 3: 'select.dropworst' is not a key of a recipe; did you mean 'drop_worst'?",
        ),
        ("kind: sft\nsampling: {tempreature: 1}", "did you mean 'temperature'?"),
        ("kind: pairs", "line 1: kind: input should be 'preference' or 'sft'; found 'pairs'"),
        ("source: a.jsonl", "'kind' is missing"),
        ("kind: sft\nsampling: {samples: many}", "line 2: sampling.samples: input should be a valid integer"),
        (
            "kind: sft\nselect: {keep: {share: 1.5}}",
            "select.keep.share: input should be less than or equal to 1; found 1.5",
        ),
        (
            "kind: sft\nselect: {keep: {share: 0.5, rows: 3}}",
            "keep takes exactly one of share, rows, tokens; found share, rows",
        ),
        ("kind: preference\nscores: [ches, ches]", "two entries are called 'ches'"),
        (
            "kind: preference\nscores: [ches, {edit_distance: {as: Ches}}]",
            "two entries are called 'Ches' and 'ches'",
        ),
        ("kind: preference\nscores: [{ches: {as: source}}]", "'source' is a column that `scored` has of every row"),
        ("kind: preference\nscores: [{ches: {as: Index}}]", "'Index' is a column that `scored` has of every row"),
        ("kind: preference\nscores: [{ches: {as: 'a b'}}]", "`as: a_b`"),
        ("kind: [", "line 1, column 8: not valid YAML"),
        ("- 1", "a recipe is a mapping"),
        ("kind: sft\nselect: {per: {a: {x: 1}, b: {x: 1}}}", "per takes one column; found a, b"),
        (
            "kind: sft\ntargets: {t: {path: a, of: completion, limmit: 3}}",
            "targets.t.limmit' is not a key of a recipe; did you mean 'limit'?",
        ),
        (
            "kind: sft\ntargets: {t: {path: a, of: chosn}}",
            "targets.t.of: input should be 'chosen', 'rejected', 'margin' or 'completion'; found 'chosn'",
        ),
        (
            "kind: sft\ngradients: {parameters: 0}",
            "gradients.parameters: input should be 'all' or 'lora' or greater than or equal to 1; found 0",
        ),
        (
            "kind: sft\ngradients: {parameters: true}",
            "gradients.parameters: input should be 'all' or 'lora' or a valid integer; found True",
        ),
        ("kind: sft\nforecast: sgd", "forecast: input should be a mapping; found 'sgd'"),
        (
            "kind: sft\nmodels: {checkpoints: {repo: a/b, revisions: main}}",
            "revisions: [step1000, step2000]}; found {repo: a/b, revisions: main}",
        ),
        ("kind: sft\nmodels: {checkpoints: {recordings: sft}}", "named in one word, without a space: recordings:RUN"),
    ],
)
def test_a_wrong_recipe_names_line_key_and_the_nearest(write, text, says):
    path = write(text)
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_every_wrong_key_is_named_at_once(write):
    with pytest.raises(UsageError) as error:
        load_recipe(write("kind: sft\nsorce: a\nmodles: {}"))
    assert len(str(error.value).splitlines()) == 2


def test_missing_file_offers_the_nearest(write):
    path = write("kind: sft")
    with pytest.raises(UsageError, match="Did you mean .*recipe.yaml"):
        load_recipe(path.with_name("recip.yaml"))


def test_set_overrides_nested_keys_and_lists(write):
    path = write("kind: preference\nsource: a.jsonl\nscores:\n  - flip_loss: {beta: 0.1}")
    loaded = load_recipe(path, set=["select.keep.share=0.5", "source.on_bad_row=drop", "scores.0.flip_loss.beta=0.5"])
    assert loaded.recipe.select.keep.share == 0.5
    assert loaded.recipe.source.path == "a.jsonl" and loaded.recipe.source.on_bad_row == "drop"
    assert loaded.recipe.scores[0].params == {"beta": 0.5}
    assert yaml.safe_load(loaded.text)["select"] == {"keep": {"share": 0.5}}
    assert load_recipe(path, set={"tokens.max_length": 12}).recipe.tokens.max_length == 12


@pytest.mark.parametrize(
    ("entry", "says"),
    [("nosign", "expected key=value"), ("kind.x=1", "it has no key 'x'"), ("a.b=1", "did you mean|allowed")],
)
def test_a_wrong_override_says_so(write, entry, says):
    with pytest.raises(UsageError, match=says):
        load_recipe(write("kind: sft"), set=[entry])


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("gradients.parameters=lra", "gradients.parameters: input should be 'all' or 'lora' or a valid integer"),
        ("targets={t: {path: a, of: chosn}}", "targets.t.of: input should be 'chosen'"),
        ("models={on_broken_checkpoint: skp}", "models.on_broken_checkpoint: input should be 'error' or 'skip'"),
        ("models.checkpoints={repo: a/b}", "models.checkpoints: revisions of a hub repository"),
        ("export.format=trll", "export.format: input should be 'trl'"),
    ],
)
def test_a_wrong_value_of_an_override_names_the_whole_key(write, entry, says):
    with pytest.raises(UsageError) as error:
        load_recipe(write("kind: sft\nexport: {to: out}"), set=[entry])
    assert says in str(error.value)


def test_two_settings_of_a_score_and_a_users_own(write):
    loaded = load_recipe(
        write("kind: preference\nscores: [flip_loss, {flip_loss: {beta: 0.5, as: flip_loss_b5}}, 'my.scores:novelty']")
    )
    assert [(s.score, s.name, s.params) for s in loaded.recipe.scores] == [
        ("flip_loss", "flip_loss", {}),
        ("flip_loss", "flip_loss_b5", {"beta": 0.5}),
        ("my.scores:novelty", "novelty", {}),
    ]


def test_paths_are_relative_to_the_recipe(write):
    loaded = load_recipe(write("kind: sft"))
    assert loaded.store == loaded.folder / "store"
    assert loaded.resolve("a/b.jsonl") == loaded.folder / "a/b.jsonl"
    assert loaded.name == "recipe"


def test_the_shipped_schema_is_the_models_schema():
    shipped = REPOSITORY / "curate" / "recipe" / "recipe.schema.json"
    assert json.loads(shipped.read_text()) == schema(), (
        "write it anew: python -m curate init --schema > curate/recipe/recipe.schema.json"
    )


def test_every_recipe_that_ships_is_valid():
    files = [
        *REPOSITORY.glob("configs/*.yaml"),
        *REPOSITORY.glob("curate/recipe/starters/*.yaml"),
        *REPOSITORY.glob("curate/jobs/demo/*.yaml"),
    ]
    assert len(files) >= 5
    for file in files:
        assert isinstance(load_recipe(file).recipe, Recipe), file


def test_the_interface_documents_example_is_valid(write):
    """The recipe of the README, key by key, as users will copy it."""
    text = (REPOSITORY / "README.md").read_text()
    block = next((b.split("```")[0] for b in text.split("```yaml")[1:] if "kind:" in b), None)
    assert block is not None, "the README shows a recipe"
    assert load_recipe(write(block)).recipe.scores


def test_a_key_that_does_nothing_is_refused():
    """There is no report yet: a recipe that asks for one is told so before anything runs."""
    with pytest.raises(UsageError, match="report"):
        load_recipe({"kind": "sft", "report": {"to": "report.html"}})
