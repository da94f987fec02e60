"""The line for RL with verifiable rewards: prompts with answers, pass rates, a band, an export of prompts. One store, transformers, a tiny model."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import curate
from curate.cli import main
from curate.console import Progress
from curate.data import ExportRow, export
from curate.data.trainers import TRAINERS
from curate.errors import UsageError, ValidationError
from curate.recipe.load import load_recipe
from curate.rows import Example
from curate.scores.rates import bands
from curate.scores.stopping import undecided
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

WORDS = ["ada", "bea", "cy", "dot", "eve", "fay", "gil", "hal", "ivy", "jo", "kit", "lou"]
PAIRS = """
kind: preference
source: pairs.jsonl
models: {reference: model}
scores: [edit_distance]
select: {order_by: score desc, keep: {rows: 2}}
export: {to: out/pairs}
"""
RECIPE = """
kind: sft
source: {path: rows.jsonl, format: prompts}
models: {reference: model}
tokens: {max_length: 24}
engine: {sampler: transformers}
sampling: {samples: 8, temperature: 1.0, top_p: 1.0, max_new_tokens: 6, grader: {regex: "([a-m])"}}
scores: [pass_rate, pass_rate_low, pass_rate_high, {pass_at: {k: 4}}, {pass_at: {k: 8, as: pass_at_8}}, {pass_band: {low: 0.05, high: 0.6}}]
"""


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlvr")
    rows = [{"prompt": f"{word} says", "answer": word[0], "level": i, "w": i + 1} for i, word in enumerate(WORDS)]
    rows[4]["w"] = None
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "prompts.yaml").write_text(
        f"{RECIPE}select: {{where: pass_rate < 0.9, keep: {{rows: 6}}}}\nexport: {{to: out/prompts}}\n"
    )
    pairs = [{"prompt": f"say {word}", "chosen": word, "rejected": "no", "score": i} for i, word in enumerate(WORDS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "pairs.yaml").write_text(PAIRS)
    make_llama(folder / "model", seed=3)
    return folder / "recipe.yaml"


@pytest.fixture
def command(line, monkeypatch):
    """The exit code of a `curate` command in the line's folder."""

    def code(*words):
        monkeypatch.chdir(line.parent)
        monkeypatch.setattr(sys, "argv", ["curate", *words])
        try:
            main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
        return 0

    return code


@pytest.fixture(scope="module")
def measured(line):
    return curate.run(line)


def test_prompts_are_sampled_graded_and_scored(measured):
    scored = measured.store.sql("SELECT * FROM scored ORDER BY row_id")
    assert scored["completion"].null_count() == len(WORDS) and scored["answer"].null_count() == 0
    counted = measured.store.sql("SELECT row_id, avg(correct::INT) AS p FROM samples GROUP BY 1 ORDER BY 1")
    np.testing.assert_array_equal(scored["pass_rate"], counted["p"])
    assert scored["pass_rate"].n_unique() > 1  # there is something to tell apart
    np.testing.assert_array_equal(scored["pass_at_8"], scored["pass_rate"] > 0)
    values = measured.store.sql("SELECT name, value, n FROM dataset_values")
    named = dict(zip(values["name"], values["value"], strict=True))
    assert named["pass_rate_all_wrong"] == (scored["pass_rate"] == 0).mean()
    assert {"pass_at_4", "pass_at_8", "pass_band_undecided"} <= set(named)


def test_a_score_of_completions_is_refused_before_anything_runs(line, measured):
    with pytest.raises(ValidationError, match="12 rows are prompts .* have no completion, and target_nll"):
        make_plan(load_recipe(line, set=["scores=[accuracy, target_nll]"]), progress=Progress(quiet=True))


def test_more_samples_than_are_drawn_are_refused(line, measured):
    with pytest.raises(UsageError, match="k is 9 and sampling.samples 8"):
        make_plan(load_recipe(line, set=["scores=[{pass_at: {k: 9}}]"]), progress=Progress(quiet=True))


def test_scores_alone_refuse_pass_at_of_the_rows_that_went_on(adaptive, command, capsys):
    """Of rows that are sampled until their band is decided, the undecided alone have k answers: a mean over these is of a choice by answers."""
    store = adaptive[0].store.folder
    assert (
        command(
            "score", "recipe.yaml", "--set", f"store={store}", "--set", ADAPTIVE, "--set", "scores=[{pass_at: {k: 4}}]"
        )
        == 2
    )
    assert "k is 4 and sampling.samples.from 2" in capsys.readouterr().err


ADAPTIVE = "sampling.samples={from: 2, to: 8, until: band, band: [0.7, 0.9]}"
ANSWERS = "SELECT row_id, sample, text, correct FROM samples ORDER BY ALL"


@pytest.fixture(scope="module")
def adaptive(line, tmp_path_factory):
    """Rows sampled until their band is decided, in a store of their own; and every call of the engine: (rows, answers, number of the first)."""
    from curate.passes.sampling.hf import HfSampler

    asked, original = [], HfSampler.sample

    def sample(self, prompts, sampling):
        asked.append((len(prompts), sampling.n, {prompt.first for prompt in prompts}))
        return original(self, prompts, sampling)

    HfSampler.sample = sample
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            result = curate.run(
                line,
                set=[ADAPTIVE, "scores=[pass_rate, pass_band]"],
                store=tmp_path_factory.mktemp("s"),
                progress=Progress(),
            )
    finally:
        HfSampler.sample = original
    return result, asked, said.getvalue()


def test_a_row_is_sampled_until_its_band_is_decided(measured, adaptive):
    """Its answers are the first of those that eight would have been, and it stops at the first look that decides."""
    result, asked, said = adaptive
    fewer, all_of_them = (r.store.sql(ANSWERS).rows_by_key("row_id") for r in (result, measured))
    assert {len(answers) for answers in fewer.values()} == {2, 4, 8}
    for row_id, answers in fewer.items():
        assert answers == all_of_them[row_id][: len(answers)]
        marks = [mark for _, _, mark in answers]
        stops = next((n for n in (2, 4) if not undecided(marks[:n], 0.7, 0.9)), 8)
        assert len(answers) == stops
    assert [(n, first) for _, n, first in asked] == [(2, {0}), (2, {2}), (4, {4})] and asked[0][0] == len(WORDS)
    n = sum(map(len, fewer.values()))
    assert sum(rows * each for rows, each, _ in asked) == n
    assert f"{n} answers of model were enough, {96 - n} of 96 ({(96 - n) / 96:.0%}) were saved" in said


def test_the_band_of_the_samples_is_the_band_of_the_score(adaptive):
    counts = adaptive[0].store.sql("SELECT n_correct, n_samples, pass_band FROM scored ORDER BY row_id")
    codes = bands(counts["n_correct"].to_numpy(), counts["n_samples"].to_numpy(), 0.7, 0.9)
    np.testing.assert_array_equal(counts["pass_band"], codes)


def test_a_number_of_samples_draws_what_stopping_left_out(line, measured, adaptive):
    """And the other way round nothing is drawn: the answers that are kept decide."""
    result, asked, _ = adaptive
    before, store = len(asked), result.store.folder
    assert (
        curate.run(line, set=["scores=[pass_rate]"], store=store).store.sql(ANSWERS).equals(measured.store.sql(ANSWERS))
    )
    kept = curate.run(line, set=[ADAPTIVE.replace("0.7", "0.5"), "scores=[pass_rate]"], store=store)
    assert kept.store.sql("SELECT max(n_samples) FROM scored").item() <= 8 and len(asked) == before


REFUSED = [
    (["sampling.samples={from: 8, to: 8}"], "from is 8 and to 8"),
    (["sampling.samples={from: 2, to: 8, band: [0.8, 0.2]}"], "low to high"),
    ([ADAPTIVE, "sampling.temperature=0"], "at temperature 0 all answers are the same"),
    ([ADAPTIVE, "kind=preference", "scores=[]"], "not graded"),
    ([ADAPTIVE, "sampling.perturb=a:b"], "sampling.perturb"),
]


@pytest.mark.parametrize(("settings", "why"), REFUSED)
def test_what_cannot_decide_a_band_is_refused(line, settings, why):
    with pytest.raises(UsageError, match=why):
        load_recipe(line, set=settings)


def test_the_commands_of_the_docs_write_every_layout(line, measured, command):
    """docs/export.md: one command a layout."""
    text = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    commands = re.findall(r"^\$ curate (export \S+\.yaml .*)$", text, re.M)
    assert {re.search(r"layout=(\w+)", words)[1] for words in commands} == {"trl", *TRAINERS}
    for recipe in ("pairs", "prompts"):
        curate.run(line.parent / f"{recipe}.yaml")
    for words in commands:
        assert command(*shlex.split(words)) == 0, words
    kept = measured.store.sql("SELECT row_id FROM selections WHERE selection = 'prompts' AND kept")["row_id"].to_list()
    grpo = pq.read_table(line.parent / "out" / "grpo" / "data" / "train-00000.parquet").to_pylist()
    verl = pq.read_table(line.parent / "out" / "verl" / "data" / "train-00000.parquet").to_pylist()
    assert sorted(row["row_id"] for row in grpo) == sorted(kept) and len(kept) == 6
    assert [row["answer"] for row in grpo] == [row["reward_model"]["ground_truth"] for row in verl]
    assert verl[0]["prompt"] == [{"role": "user", "content": grpo[0]["prompt"]}] and verl[0]["data_source"] == "rows"
    assert "completion" not in grpo[0]
    there = curate.run(line.parent / "prompts.yaml", set=["export.layout=verl", "export.to=out/verl"])
    assert len(there.dataset) == 6 and there.dataset.column_names[0] == "prompt"  # the selection's, in TRL's columns


def test_the_starter_runs_as_it_is_written(line, measured, command):
    """`curate init rlvr`, with nothing changed but where the rows and the model are, and a grader that a model of letters can meet."""
    assert command("init", "rlvr", "rl.yaml", "--quiet") == 0
    small = ["sampling.max_new_tokens=6", "sampling.grader={regex: '([a-m])'}", "engine.sampler=transformers"]
    places = ["source.path=rows.jsonl", "models.reference=model"]
    small += ["sampling.top_k=30", "sampling.system=Be brief.", "sampling.stop=['!!']"]
    easy_first = ["select.where=pass_rate < 0.8", "select.order_by=pass_rate desc", "export.order=order_by"]
    result = curate.run(line.parent / "rl.yaml", set=[*places, *small, *easy_first])
    exported = pq.read_table(line.parent / "out" / "rl" / "data" / "train-00000.parquet")
    assert {"prompt", "answer", "pass_rate", "pass_band", "pass_at"} <= set(exported.column_names)
    before, ends = result.exported.warnings  # what pass rates are of, and the export does not have
    assert (
        "sampled with sampling.system before every prompt" in before and "with sampling.stop, which no setting" in ends
    )
    assert len(exported) == result.exported.n_rows and (line.parent / "out" / "rl_control").is_dir()
    rates = exported["pass_rate"].to_pylist()
    assert rates == sorted(rates, reverse=True) and len(set(rates)) > 1
    args = json.loads((line.parent / "out" / "rl" / "trainer_args.json").read_text())
    assert args == {"temperature": 1.0, "top_p": 1.0, "max_completion_length": 6, "top_k": 30, "shuffle_dataset": False}


def test_imported_counts_have_pass_rates_and_say_nothing_of_rollouts(line, tmp_path, command):
    """`curate import … correct=c samples=n`: a band of counts, and no settings of a sampling that was another's."""
    (line.parent / "counts.csv").write_text("index,c,n,ckpt\n0,1,5,a\n1,5,5,a\n")
    recipe = {
        "kind": "sft", "store": str(tmp_path / "store"), "source": {"path": str(line.parent / "rows.jsonl"), "format": "prompts", "limit": 2},
        "scores": ["pass_rate"], "select": {"where": "pass_rate BETWEEN .2 AND .8"}, "export": {"to": str(tmp_path / "out")},
    }  # fmt: skip
    with pytest.raises(UsageError, match="nothing was imported"):
        curate.run(recipe)
    named = [
        "--source",
        str(line.parent / "rows.jsonl"),
        "--map",
        "row=index",
        "checkpoint=ckpt",
        "correct=c",
        "samples=n",
    ]
    assert command("import", str(tmp_path / "store"), "counts.csv", *named, "--quiet") == 0
    result = curate.run(recipe)
    assert result.exported.n_rows == 1 and not (tmp_path / "out" / "trainer_args.json").exists()


def test_an_equal_control_beside_the_selection(line, measured):
    """`export.control: random` needs no `select.control`, and draws from all rows, those that `where` drops too."""
    result = curate.run(
        line.parent / "prompts.yaml",
        set=["export.control=random", "export.to=out/chosen", "select.where=pass_rate = 0"],
    )
    kept = set(result.store.sql("SELECT row_id FROM scored WHERE pass_rate = 0")["row_id"])
    control = pq.read_table(line.parent / "out" / "chosen_control" / "data" / "train-00000.parquet")
    assert len(control) == result.exported.n_rows == 6 and not set(control["row_id"].to_pylist()) <= kept
    lacking = ["select.where=coalesce(w, 0) > 0", "export.control=random", "export.weight=w"]
    with pytest.raises(ValidationError, match="its control is not: .* unknown in 1 .* select.control=random"):
        curate.run(
            line.parent / "prompts.yaml", set=[*lacking, "select.keep.rows=11"]
        )  # no row of `where` is without a weight
    result = curate.run(line.parent / "prompts.yaml", set=[*lacking, "select.control=random", "export.control=true"])
    [unread] = result.exported.warnings
    assert "trainer of these rows takes no weights" in unread
    assert not (line.parent / "out" / "prompts" / "trl_trainers.py").exists()
    with pytest.raises(UsageError, match="export.control"):
        load_recipe(line, set=["export={to: out, control: random}"])
    with pytest.raises(UsageError, match="select.control is length_matched"):
        load_recipe(line, set=["select={control: length_matched}", "export={to: out, control: random}"])


def test_completions_are_left_out_where_prompts_are_asked_for(tmp_path):
    rows = [ExportRow(Example("q", "so #### 4", answer="4"), "1"), ExportRow(Example("r", answer="5"), "2")]
    result = export(tmp_path / "out", rows, format="prompts")
    assert result.layout == "trl prompts, standard"
    read = pq.read_table(tmp_path / "out" / "data" / "train-00000.parquet").to_pylist()
    assert read == [{"prompt": "q", "row_id": "1", "answer": "4"}, {"prompt": "r", "row_id": "2", "answer": "5"}]


def test_questions_are_asked_as_a_chat_whichever_way_they_were_read(line, tmp_path):
    """`tokens.chat: auto` takes prompts with answers as it takes question/answer rows."""
    make_llama(tmp_path / "chatty", seed=3, template=True)
    set_ = [f"models.reference={tmp_path / 'chatty'}"]
    texts = [
        make_plan(
            load_recipe(line, set=[*set_, f"source.format={format}"], store=tmp_path / format),
            progress=Progress(quiet=True),
        ).text()
        for format in ("prompts", "question_answer")
    ]
    assert all("through the chat template of chatty" in text for text in texts)
