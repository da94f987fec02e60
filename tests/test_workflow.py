"""The whole line on small rows and a tiny model: results, resuming, fingerprints, growing sources, errors. Killed processes are really killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

import curate
import curate.missing
from curate import workflow
from curate.errors import CurateError, ModelError, StoreError, UsageError, ValidationError
from curate.passes import forward
from curate.progress import Progress
from curate.recipe import load_recipe
from curate.workflow import make_plan
from tests.tiny_models import make_llama

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = ["ada", "bea", "cy", "dot", "eve", "fay", "gil", "hal", "ivy", "jo", "kit", "lea"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "reference", seed=0)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "reference", seed=1)


def pairs(n: int, *, start: int = 0) -> list[dict]:
    rng = np.random.default_rng(7)
    words = [" ".join(rng.choice(WORDS, 1 + i % 5)) for i in range(3 * (start + n))]
    return [
        {
            "prompt": f"{words[3 * i]} {i}:",
            "chosen": f" {words[3 * i + 1]}.",
            "rejected": f" {words[3 * i + 2]}!",
            "topic": "ab"[i % 2],
        }
        for i in range(start, start + n)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path, model):
    """A recipe file over 40 pairs; keyword arguments go over its keys."""

    def recipe(**over) -> Path:
        if not (tmp_path / "pairs.jsonl").exists():
            write_rows(tmp_path / "pairs.jsonl", pairs(40))
        raw = {
            "kind": "preference",
            "source": {"path": "pairs.jsonl"},
            "models": {"reference": str(model)},
            "tokens": {"max_length": 128},
            "scores": [
                "ranking_gap",
                {"flip_loss": {"beta": 0.1}},
                {"flip_loss": {"beta": 0.5, "as": "flip_loss_b5"}},
                "ches",
                "ches_ln",
                "edit_distance",
            ],
            "select": {"drop_worst": {"ches_ln": 0.1}, "order_by": "flip_loss desc", "keep": {"share": 0.5}},
            "export": {"to": "out", "columns": "scores"},
        }
        raw.update(over)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}, sort_keys=False))
        return path

    return recipe


def scored(
    store, columns="row_id, ranking_gap, flip_loss, ches, ches_ln, edit_distance, chosen_logp, rejected_logp"
) -> pl.DataFrame:
    return store.sql(f"SELECT {columns} FROM scored ORDER BY row_id")


def test_the_line_from_rows_to_a_dataset(recipe, model, tmp_path):
    result = curate.run(recipe())
    frame = scored(result.store)
    assert len(frame) == 40 and frame.null_count().sum_horizontal().item() == 0
    # the scores are what a plain transformers loop says
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, module = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64),
    )
    row = result.store.sql("SELECT * FROM scored WHERE source = 'pairs.jsonl' ORDER BY position LIMIT 1").to_dicts()[0]

    def logp(response: str) -> float:
        prompt, full = (
            tokenizer(row["prompt"]).input_ids,
            [*tokenizer(row["prompt"] + response).input_ids, tokenizer.eos_token_id],
        )
        with torch.no_grad():
            table = module(torch.tensor([full])).logits[0].log_softmax(-1)
        return sum(float(table[t - 1, full[t]]) for t in range(len(prompt), len(full)))

    assert row["chosen_logp"] == pytest.approx(logp(row["chosen"]), rel=1e-5)
    assert row["ranking_gap"] == pytest.approx(logp(row["rejected"]) - logp(row["chosen"]), rel=1e-4)
    assert row["flip_loss"] == pytest.approx(np.log1p(np.exp(-0.1 * row["ranking_gap"])), rel=1e-9)
    assert row["flip_loss_b5"] == pytest.approx(np.log1p(np.exp(-0.5 * row["ranking_gap"])), rel=1e-9)
    # 10% of 40 dropped as the worst, then half of the 36 that are left
    assert result.selection.counts["kept"] == 18
    worst = result.store.sql(
        "SELECT min(ches_ln) AS low FROM scored JOIN selections USING (row_id) WHERE reason LIKE 'worst%'"
    )["low"][0]
    rest = result.store.sql(
        "SELECT max(ches_ln) AS high FROM scored JOIN selections USING (row_id) WHERE reason NOT LIKE 'worst%'"
    )["high"][0]
    assert worst >= rest
    assert result.selection.counts["dropped_by"] == {"keep": 18, "drop_worst": 4}
    import datasets

    exported = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    assert len(exported) == 18 and {"prompt", "chosen", "rejected", "topic", "flip_loss_b5"} <= set(
        exported.column_names
    )
    assert result.dataset.column_names == exported.column_names and result.dataset["row_id"] == exported["row_id"]
    shown = repr(result) + repr(result.plan)  # what a notebook prints: for people, without the rows
    assert "18 of 40 rows kept" in shown and exported["row_id"][0] not in shown and "object at" not in shown
    assert result.store.sql("SELECT outcome, version FROM runs").rows() == [("done", curate.__version__)]


def test_nothing_measured_once_is_measured_again(recipe, monkeypatch):
    path = recipe()
    first = curate.run(path)
    assert first.measured == {"tokens": 40, "forward": 40}
    again = curate.run(path, set={"scores": [{"flip_loss": {"beta": 1.0}}, "ches_ln"], "select": {}, "export": None})
    assert again.measured == {}  # β and the selection are free to change
    assert scored(again.store, "row_id, chosen_logp").equals(scored(first.store, "row_id, chosen_logp"))


def test_what_changes_a_value_never_reuses_it(recipe, other_model):
    path = recipe(select=None, export=None)
    curate.run(path)

    def missing(change: dict) -> int:
        plan = make_plan(load_recipe(path, set=change), progress=Progress(quiet=True))
        return {step.reads: step.missing for step in plan.steps}["forward"]

    assert missing({"engine.token_budget": 64}) == 0
    for change in (
        {"tokens.max_length": 12},
        {"tokens.truncation": "keep_end"},
        {"engine.dtype": "bfloat16"},
        {"models.reference": str(other_model)},
    ):
        assert missing(change) == 40, change


def test_a_new_chat_template_is_a_new_tokenizer(recipe, model, tmp_path):
    import shutil

    copy = shutil.copytree(model, tmp_path / "copy")
    path = recipe(models={"reference": str(copy)}, select=None, export=None)
    curate.run(path)
    assert (
        curate.run(recipe(select=None, export=None)).measured == {}
    )  # the same content in another place is the same model
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    changed = curate.run(recipe(models={"reference": str(copy)}, select=None, export=None))
    assert changed.measured == {"tokens": 40, "forward": 40}


def test_another_end_of_answers_is_another_accuracy(tmp_path, model):
    """generation_config.json says what ends a sampled answer; the fingerprint of the weights covers config.json alone."""
    shutil.copytree(model, tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b", "answer": "b"}])
    raw = {
        "kind": "sft",
        "source": "rows.jsonl",
        "models": {"reference": "model"},
        "scores": ["accuracy", "target_nll"],
    }
    raw["engine"] = {"sampler": "transformers"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    generation = tmp_path / "model" / "generation_config.json"

    def prints(ends) -> dict:
        generation.unlink(missing_ok=True)
        if ends is not None:
            generation.write_text(json.dumps({"eos_token_id": ends}))
        return workflow.make_plan(load_recipe(tmp_path / "recipe.yaml"), progress=Progress(quiet=True)).uses

    accuracy, nll = ("", "accuracy", None), ("", "target_nll", None)
    none, same, other = prints(None), prints(config["eos_token_id"]), prints([config["eos_token_id"], 5])
    assert none == same and none[accuracy] != other[accuracy] and none[nll] == other[nll]


def test_a_source_that_grew_is_measured_only_where_it_is_new(recipe, tmp_path):
    path = recipe(select=None, export=None)
    before = scored(curate.run(path).store)
    write_rows(tmp_path / "pairs.jsonl", pairs(47))
    grown = curate.run(path)
    assert grown.measured == {"tokens": 7, "forward": 7}
    after = scored(grown.store)
    assert len(after) == 47
    assert after.filter(pl.col("row_id").is_in(before["row_id"].to_list())).equals(before)


def test_no_selection_or_export_of_rows_that_have_changed_since(recipe, tmp_path):
    """One step at a time over a source that grew: what was made of the rows before is refused, with the command that makes it anew."""
    loaded = load_recipe(recipe(select={"order_by": "flip_loss", "unknown": "keep"}))
    step = lambda *steps: workflow.run_steps(loaded, steps, progress=Progress(quiet=True))  # noqa: E731
    step("measure", "score", "select")
    write_rows(tmp_path / "pairs.jsonl", pairs(47))
    with pytest.raises(UsageError, match=r"as scores of 'recipe' comes from other .*rows.*curate score"):
        step("select")
    with pytest.raises(UsageError, match=r"as selection of 'recipe' comes from other .*rows.*curate select"):
        step("export")
    step("score")  # before the new rows are measured: their scores are NULL
    step("measure")
    with pytest.raises(UsageError, match=r"as scores of 'recipe' comes from other .*measurements.*curate score"):
        step("select")
    step("score")
    step("select")
    assert step("export").exported.n_rows == 47


def test_a_reference_is_step_0_of_the_run_that_was_measured_last(tmp_path, model, other_model):
    """Two runs from one base in one store: its values are measured once, and stand in the series of the recipe that asks."""
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}:", "completion": f" {WORDS[i]}"} for i in range(4)])
    for run in "ab":
        shutil.copytree(other_model, tmp_path / "runs" / run / "checkpoint-7")
        models = {"reference": str(model), "checkpoints": f"runs/{run}"}
        text = yaml.safe_dump({"kind": "sft", "source": "rows.jsonl", "models": models, "scores": ["loss_drop"]})
        (tmp_path / f"{run}.yaml").write_text(text)
        store = curate.run(tmp_path / f"{run}.yaml").store
        found = store.sql("SELECT DISTINCT run, step FROM trajectories ORDER BY step", recipe=run).rows()
        assert found == [(run, 0), (run, 7)]


def test_duplicate_rows_are_measured_once_and_said(recipe, tmp_path, capsys):
    write_rows(tmp_path / "pairs.jsonl", pairs(10) + pairs(4))
    result = curate.run(recipe(select={}, export=None), progress=Progress())
    assert result.measured == {"tokens": 10, "forward": 10}
    assert "4 of them occur more than once" in capsys.readouterr().err
    assert result.store.sql("SELECT sum(n_occurrences)::INT FROM scored").item() == 14


def test_two_folders_that_name_their_rows_alike(recipe, tmp_path):
    """In one store they would replace each other's rows: an error that names the other folder, and nothing is lost."""
    path = recipe(export=None, select=None, scores=["edit_distance"])
    result = curate.run(path)
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "pairs.jsonl", pairs(5))
    (other / "second.yaml").write_text(path.read_text())
    with pytest.raises(UsageError, match=r"'pairs.jsonl' from another folder \(recipe 'recipe', .*--store"):
        curate.run(other / "second.yaml", store=result.store.folder)
    assert result.store.sql("SELECT count(*) AS n FROM occurrences")["n"][0] == 40
    full = {"source.path": str(other / "pairs.jsonl")}
    assert (
        curate.run(other / "second.yaml", store=result.store.folder, set=full).store.sql(
            "SELECT count(*) AS n FROM occurrences"
        )["n"][0]
        == 45
    )


def test_two_recipes_of_one_store_stay_apart(recipe, tmp_path):
    curate.run(recipe(select=None, export=None))
    write_rows(tmp_path / "more.jsonl", pairs(5, start=100))
    other = tmp_path / "second.yaml"
    other.write_text(recipe().read_text().replace("pairs.jsonl", "more.jsonl"))
    second = curate.run(other, set={"select": None, "export": None})
    assert second.measured == {"tokens": 5, "forward": 5}
    assert len(second.store.scored(recipe="second")) == 5 and len(second.store.scored(recipe="recipe")) == 40
    assert len(second.store.scored(recipe="recipe", source="pairs.jsonl")) == 40


def test_order_and_token_budget_change_no_value(recipe, tmp_path):
    first = scored(curate.run(recipe(select=None, export=None)).store)
    write_rows(tmp_path / "pairs.jsonl", pairs(40)[::-1])
    small = curate.run(recipe(select=None, export=None), set={"engine.token_budget": 64}, store=tmp_path / "other")
    second = scored(small.store)
    assert first["row_id"].equals(second["row_id"])
    scale = np.abs(first["ches"].to_numpy()).max()
    for name in ("ranking_gap", "chosen_logp"):
        np.testing.assert_allclose(first[name].to_numpy(), second[name].to_numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first["ches"].to_numpy(), second["ches"].to_numpy(), atol=1e-5 * scale)


DRIVER = """
    import os, signal, sys
    import curate.missing, curate.store, curate.storage.shards as shards
    from curate.passes import forward
    curate.missing.SHARD_ROWS.update(tokens=8, forward=8)
    how, at, log = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    rows_run, writes = forward.measure, shards.write_parquet
    done = 0

    def measured(model, encoded, *args, **kwargs):
        with open(log, "a") as file:
            file.write(f"{len(encoded)}\\n")
        return rows_run(model, encoded, *args, **kwargs)

    def written(table, path):
        global done
        done += 1
        if done == at and how == "before the rename":
            half = path.with_name(f".{path.name}.{os.getpid()}-x.tmp")
            half.parent.mkdir(parents=True, exist_ok=True)
            half.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        writes(table, path)
        if done == at and how == "after the rename":
            os.kill(os.getpid(), signal.SIGKILL)

    forward.measure, shards.write_parquet = measured, written
    sys.argv = ["curate", "run", sys.argv[4], "--quiet"]
    from curate.cli import main
    main()
"""


@pytest.mark.parametrize(("how", "at"), [("before the rename", 7), ("after the rename", 12)])
def test_killed_at_any_moment_the_same_recipe_goes_on(recipe, tmp_path, monkeypatch, how, at):
    """40 rows in shards of 8: 5 token shards, then likelihood and hidden for each of 5 forward shards."""
    path, log, script = recipe(select=None, export=None), tmp_path / "log", tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    command = [sys.executable, str(script), how, str(at), str(log), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = len(list((tmp_path / "store" / "shards").glob("*/*.parquet")))
    assert kept == (at - 1 if how == "before the rename" else at)
    rows = [int(n) for n in log.read_text().split()]
    measure = forward.measure

    def counted(model, encoded, *args, **kwargs):
        rows.append(len(encoded))
        return measure(model, encoded, *args, **kwargs)

    monkeypatch.setattr(forward, "measure", counted)
    for name in ("tokens", "forward"):
        monkeypatch.setitem(curate.missing.SHARD_ROWS, name, 8)
    killed = curate.run(path).store
    assert not list((tmp_path / "store" / "shards").glob("**/*.tmp"))
    assert 40 <= sum(rows) <= 48  # at most one shard was run twice
    assert [r for (r,) in killed.sql("SELECT outcome FROM runs ORDER BY id").rows()] == ["killed", "done"]
    whole = curate.run(path, store=tmp_path / "whole").store
    assert scored(killed).equals(scored(whole))  # to the last bit


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
            "row 3: 'chosen' is true (bool), expected text or messages.",
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


def test_a_policy_measures_flips_and_implicit_rewards(recipe, model, other_model, tmp_path):
    scores = ["implicit_reward_gap", "ranking_gap"]
    alone = curate.run(recipe(models={"reference": str(other_model)}, scores=["ranking_gap"], select=None, export=None))
    policy_gap = scored(alone.store, "row_id, ranking_gap")["ranking_gap"].to_numpy()
    both = recipe(
        models={"reference": str(model), "policy": str(other_model)}, scores=scores, select=None, export=None
    ).rename(tmp_path / "both.yaml")
    again = curate.run(both)
    assert again.measured == {"forward": 40}  # the policy was measured before, as the other recipe's reference
    frame = again.store.sql("SELECT * FROM scored ORDER BY row_id")
    expected = 0.1 * (policy_gap - frame["ranking_gap"].to_numpy())
    np.testing.assert_allclose(frame["implicit_reward_gap"], -expected, rtol=1e-9, atol=1e-9)
    names = set(again.store.sql("SELECT DISTINCT name FROM dataset_values")["name"])
    assert {"flips_wrong_right", "flips_right_wrong", "flipped_to_right", "ranking_accuracy"} <= names


def test_plain_columns_of_pairs_are_the_references_even_where_checkpoints_are_named(
    recipe, model, other_model, tmp_path
):
    both = {"reference": str(model), "checkpoints": [str(other_model)]}
    of = {}
    for name, models in (
        ("both", both),
        ("reference", {"reference": str(model)}),
        ("last", {"checkpoints": [str(other_model)]}),
    ):
        path = recipe(models=models, scores=["ranking_gap"], select=None, export=None, store=name)
        of[name] = scored(curate.run(path).store, "row_id, ranking_gap")
    assert of["both"].equals(of["reference"]) and not of["both"].equals(of["last"])


def test_a_series_is_measured_in_step_order_from_the_reference_on(tmp_path, model, other_model):
    rows = [{"prompt": f"ada {i}:", "completion": " bea."} for i in range(4)]
    write_rows(tmp_path / "rows.jsonl", rows)
    raw = {"kind": "sft", "source": "rows.jsonl", "tokens": {"max_length": 64}, "scores": ["confidence"]}
    raw["models"] = {"reference": str(model), "checkpoints": [str(other_model)]}
    (tmp_path / "series.yaml").write_text(yaml.safe_dump(raw))
    result = curate.run(tmp_path / "series.yaml")
    assert [s.subject.step for s in result.plan.steps if s.reads == "forward"] == [0, 1]
    assert result.store.sql("SELECT DISTINCT step FROM trajectories ORDER BY 1")["step"].to_list() == [0, 1]
    zero = make_llama(tmp_path / "run" / "checkpoint-0", seed=4)
    with pytest.raises(UsageError, match="run/checkpoint-0 is, with other weights"):
        curate.run(tmp_path / "series.yaml", set={"models.checkpoints": str(zero.parent)})
    alone = curate.run(
        tmp_path / "series.yaml", set={"models.checkpoints": str(zero.parent), "models.reference": str(zero)}
    )
    assert [s.subject.step for s in alone.plan.steps if s.reads == "forward"] == [0]


def test_models_with_tokenizers_of_their_own_are_tokenised_on_their_own(recipe, model, tmp_path):
    """A score of the user's own may ask for the policy's token counts; a shared pass would give it the reference's."""
    policy = make_llama(tmp_path / "policy", seed=2)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_tokens(["ada", "bea", "cy"])
    tokenizer.save_pretrained(policy)
    (tmp_path / "own_scores.py").write_text(
        "import curate\n\n\n@curate.score(needs=('prompt_tokens', 'policy.prompt_tokens'), kind='preference', unit='tokens', worst='none')\n"
        "def saved(prompt_tokens, policy_prompt_tokens):\n    return prompt_tokens - policy_prompt_tokens\n"
    )
    models = {"reference": str(model), "policy": str(policy)}
    result = curate.run(recipe(models=models, scores=["own_scores:saved"], select=None, export=None))
    assert result.plan.steps[0].reads == result.plan.steps[1].reads == "tokens"
    frame = result.store.sql("SELECT prompt, saved FROM scored")
    spared = [2 * p.count("ada") + 2 * p.count("bea") + p.count("cy") for p in frame["prompt"]]
    assert frame["saved"].to_list() == spared and max(spared) > 0


def test_the_column_of_token_problems_is_text_even_where_there_are_none(recipe):
    store = curate.run(recipe(select=None, export=None)).store
    assert store.sql("SELECT count(*) AS n FROM scored WHERE token_problem LIKE 'x%'")["n"].item() == 0


def test_a_row_that_cannot_be_measured_goes_where_a_rule_uses_its_score(recipe, tmp_path, capsys):
    write_rows(tmp_path / "pairs.jsonl", [*pairs(4), {"prompt": "ada " * 200, "chosen": " bea.", "rejected": " cy!"}])
    for number, (rule, kept) in enumerate([
        ({"keep": {"share": 1.0}}, 5),  # no rule uses a score
        ({"where": "edit_distance >= 0"}, 4),
        ({"drop_worst": {"ches_ln": 0.01}}, 4),
        ({"order_by": "flip_loss"}, 4),
        ({"where": "token_problem IS NULL"}, 4),
    ]):  # fmt: skip
        over = {"select": {**rule, "unknown": "drop"}, "export": {"to": f"out{number}"}}
        found = curate.run(recipe(**over), progress=Progress())
        assert (found.selection.counts["kept"], found.exported.n_rows) == (kept, kept), rule
    said = capsys.readouterr().err
    assert (
        "1 row cannot be measured" in said and "treats them by select.unknown; `where: token_problem IS NULL`" in said
    )


def test_rows_beyond_the_models_positions_are_said(recipe, tmp_path, capsys, monkeypatch):
    long = " ada" * 200  # more than the model's 128 positions in whatever way it is split
    beyond = [(long, " bea", " cy"), ("dot", long, " cy"), ("dot", " bea", long)]
    cut = ("ada " * 1100, " bea", " cy")  # its prompt fills max_length: nothing is measured on it
    more = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in [*beyond, cut]]
    write_rows(tmp_path / "pairs.jsonl", [*pairs(4), *more])
    loaded = load_recipe(recipe(scores=["ranking_gap"], select=None, export=None, tokens={"max_length": 1024}))
    says = "of 8 rows are longer than the 128 positions of reference: their values are beyond what it was trained on. "
    says += "Set `tokens.max_length: 128`."
    quiet = Progress(quiet=True)
    before = make_plan(loaded, progress=quiet).to_json()["notes"]
    assert before[0].startswith("By their characters about 1 of the missing rows cannot be measured (max_length 1024, ")
    assert before[1:] == [f"By their characters about 3 {says}"]
    for _ in range(2):  # where nothing is left to measure, too
        result = workflow.run_steps(loaded, workflow.STEPS, progress=Progress())
        assert f"\n3 {says}\n" in "\n" + capsys.readouterr().err
        assert result.to_json()["notes"] == make_plan(loaded, progress=quiet).notes() == [f"3 {says}"]
    fits = load_recipe(recipe(scores=["ranking_gap"], select=None, export=None, tokens={"max_length": 128}))
    assert not any("positions" in note for note in make_plan(fits, progress=quiet).notes())
    monkeypatch.setattr("curate.fingerprints.FingerprintCache.positions", lambda cache, folder: None)
    assert not make_plan(loaded, progress=quiet).notes()


def test_a_score_of_the_users_own(recipe, tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "import curate\n\n\n@curate.score(needs=('chosen_tokens', 'rejected_tokens', 'row.topic'), kind='preference', unit='tokens', worst='high')\n"
        "def longer(chosen_tokens, rejected_tokens, topic, *, plus: float = 0.0):\n    "
        "return (chosen_tokens - rejected_tokens) * (topic == 'a') + plus\n"
    )
    result = curate.run(
        recipe(scores=[{"my_scores:longer": {"plus": 2}}], select={"drop_worst": {"longer": 0.1}}, export=None)
    )
    frame = result.store.sql("SELECT longer, chosen_tokens - rejected_tokens AS d, topic FROM scored")
    expected = [2.0 + (d if topic == "a" else 0) for d, topic in frame.select("d", "topic").iter_rows()]
    assert frame["longer"].to_list() == expected
    assert result.measured == {"tokens": 40}  # it needs no model run


def test_limit_takes_the_first_rows(recipe):
    result = curate.run(recipe(select=None, export=None), set={"source.limit": 6})
    assert result.measured == {"tokens": 6, "forward": 6}


def test_groups_weights_and_resampling(recipe, tmp_path):
    path = recipe(
        select={"keep": {"share": 1.0}, "per": {"topic": {"a": 0.5, "b": 1.0}}},
        export={"to": "out", "columns": ["ches"], "weight": "edit_distance", "resample": 60},
    )
    result = curate.run(path)
    assert result.selection.counts["kept_per_group"] == {"a": 10, "b": 20}
    import datasets

    assert len(datasets.load_from_disk(str(tmp_path / "out"))["train"]) == 60


def test_results_speak_json_and_text(recipe):
    result = curate.run(recipe())
    from curate.show import to_json

    shown = json.loads(to_json(result.to_json()))
    assert shown["selection"]["kept"] == 18 and shown["measured"] == {"tokens": 40, "forward": 40}
    assert "18 of 40 rows kept" in result.text()

    plan = make_plan(load_recipe(recipe()), progress=Progress(quiet=True))
    assert plan.missing == 0 and "Everything is measured already." in plan.text()
    assert all(issubclass(e, CurateError) for e in (ModelError, StoreError, UsageError, ValidationError))


def test_flags_in_words_and_what_to_do(recipe, tmp_path):
    """The signs of `explain` are those that `squeezing_prone` counts; the card counts the pairs; settings for TRL lie beside them."""
    from curate.explain import explain_row

    path = recipe(
        scores=["ches", {"squeezing_prone": {"share": 0.25}}, {"flip_loss": {"beta": 0.3}}],
        select={},
        export={"to": "out", "columns": "scores"},
    )
    result = curate.run(path)
    found = result.store.sql("SELECT row_id, squeezing_prone AS n, valley_depth FROM scored ORDER BY n DESC")
    assert set(found["n"]) == {0.0, 1.0, 2.0} and found["valley_depth"].null_count() == 0
    for row_id, n in zip(found["row_id"], found["n"], strict=True):
        explained = explain_row(result.store, row_id)
        assert len(explained.flags) == n
        assert ("an NLL term on the chosen response" in explained.text()) == (n > 0)
    flagged = int((found["n"] > 0).sum())
    assert f"{flagged} of the kept pairs are squeezing-prone" in (tmp_path / "out" / "README.md").read_text()
    settings = json.loads((tmp_path / "out" / "trainer_args.json").read_text())
    assert (settings["beta"], settings["loss_type"], settings["max_length"]) == (0.3, ["sigmoid", "sft"], 128)


def test_on_policy_gap_samples_the_prompts_of_pairs(recipe):
    over = {
        "engine.sampler": "transformers",
        "sampling": {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 5},
        "source.limit": 8,
    }
    result = curate.run(recipe(scores=["on_policy_gap"], select=None, export=None), set=over)
    assert result.measured == {"tokens": 8, "sample": 8, "forward": 8}
    drawn = result.store.sql(
        "SELECT row_id, sum(logp) / sum(n_tokens) AS own FROM samples GROUP BY row_id ORDER BY row_id"
    )
    frame = result.store.sql("SELECT * FROM scored ORDER BY row_id")
    expected = drawn["own"].to_numpy() - (frame["rejected_logp"] / frame["rejected_tokens"]).to_numpy()
    np.testing.assert_allclose(frame["on_policy_gap"].to_numpy(), expected, rtol=1e-9)


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
