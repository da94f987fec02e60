"""The ready jobs on tiny models: what they print is what the store holds, and a recipe that cannot work is refused with its next step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import curate
from curate.errors import UsageError
from pipelines.filter_preferences import filter_preferences, shortened
from pipelines.prioritize_sft import prioritize_sft
from tests import forked
from tests.tiny_models import make_llama

REPOSITORY = Path(__file__).resolve().parent.parent
PAIRS = [
    {
        "prompt": f"add {a} and {b}.",
        "chosen": f" it is {a + b}.",
        "rejected": f" it is {a + b + 1}, {'i think ' * (a % 3)}sure.",
    }
    for a in range(1, 5)
    for b in range(1, 4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    make_llama(folder / "run" / "checkpoint-1", seed=1)
    make_llama(folder / "run" / "checkpoint-2", seed=2)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    questions = [{"question": f"add {a} and 2.", "answer": f"it is #### {a + 2}"} for a in range(1, 9)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


@pytest.fixture(scope="module")
def preference(folder):
    recipe = folder / "pairs.yaml"
    recipe.write_text(
        "kind: preference\nstore: store_pairs\nsource: pairs.jsonl\nmodels: {reference: run/checkpoint-1}\n"
        "scores: [ranking_gap, ches_ln]\nselect: {drop_worst: {ches_ln: 0.25}}\nexport: {to: kept, columns: scores}\n"
    )
    return recipe


@pytest.fixture(scope="module")
def sft(folder):
    recipe = folder / "questions.yaml"
    recipe.write_text(
        "kind: sft\nstore: store_questions\nsource: questions.jsonl\nmodels: {checkpoints: run}\nengine: {sampler: transformers}\n"
        "sampling: {samples: 2, max_new_tokens: 8, grader: gsm8k}\nscores: [premem_accuracy, fluent, accuracy]\n"
        'select: {where: "premem_accuracy < 0.5 AND fluent = 0"}\nexport: {to: hard}\n'
    )
    return recipe


def test_filtering_shows_what_it_dropped_and_why(preference, folder):
    text = filter_preferences(preference, show=2, quiet=True)
    assert text.startswith("9 of 12 pairs kept.")
    store = curate.Store(folder / "store_pairs")
    worst = store.sql("SELECT row_id, ches_ln FROM scored ORDER BY ches_ln DESC LIMIT 3")
    dropped = store.sql("SELECT row_id FROM selections WHERE NOT kept")["row_id"].to_list()
    assert set(dropped) == set(worst["row_id"])  # the highest quarter, as the score declares
    shown = [line.split()[2] for line in text.splitlines() if line.startswith("dropped ") and line[8].isdigit()]
    assert len(shown) == 2
    assert set(shown) <= set(dropped)
    assert "chosen    it is" in text
    assert f"curate explain {folder / 'store_pairs'} {shown[0]}" in text
    from datasets import load_from_disk

    assert len(load_from_disk(folder / "kept")["train"]) == 9


def test_filtering_again_measures_nothing_and_says_the_same(preference):
    first = filter_preferences(preference, quiet=True)
    assert curate.run(preference).measured == {}
    assert filter_preferences(preference, quiet=True) == first


def test_a_recipe_that_selects_nothing_is_refused(preference, folder):
    bare = folder / "bare.yaml"
    bare.write_text(
        "kind: preference\nstore: store_pairs\nsource: pairs.jsonl\nmodels: {reference: run/checkpoint-1}\nscores: [ranking_gap]\n"
    )
    with pytest.raises(UsageError, match=r"without a `select:` section"):
        filter_preferences(bare, quiet=True)


def test_prioritising_measures_the_series_and_exports_the_rows_that_are_not_solved(sft, folder):
    text = prioritize_sft(sft, quiet=True)
    store = curate.Store(folder / "store_questions")
    hard = store.sql("SELECT count(*) AS n FROM scored WHERE premem_accuracy < 0.5 AND fluent = 0").item()
    assert f"{hard} of 8 rows picked" in text
    assert store.sql("SELECT count(DISTINCT checkpoint) AS n FROM trajectories").item() == 2
    for checkpoint in ("checkpoint-1", "checkpoint-2"):
        assert checkpoint in text
    assert "CAREFUL" not in text


def test_prioritising_says_when_rows_were_fluent_from_the_start(sft):
    """τ far above every NLL: all rows are fluent from the start, and get 0 by the formula."""
    text = prioritize_sft(
        sft,
        overrides=[
            "scores=[{premem_accuracy: {threshold: 1000}}, {fluent: {threshold: 1000}}]",
            "select.where=premem_accuracy < 0.5",
        ],
        quiet=True,
    )
    assert "8 of 8 rows picked" in text
    assert "CAREFUL: 8 of them were fluent from the start" in text


def test_prioritising_without_the_flag_is_refused(sft):
    with pytest.raises(UsageError, match="`fluent`"):
        prioritize_sft(sft, overrides=["scores=[premem_accuracy]", "select={}"], quiet=True)


@pytest.mark.parametrize("name", ["filter_preferences", "prioritize_sft"])
def test_as_a_job_it_exits_as_the_command_line_does(name, tmp_path):
    script = REPOSITORY / "pipelines" / f"{name}.py"
    done = forked.run(script, tmp_path / "none.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("UsageError: ")
    assert "Traceback" not in done.stderr


def test_long_texts_and_conversations_are_shown_on_one_line():
    assert shortened("a\n  b") == "a b"
    assert shortened("x" * 200) == "x" * 159 + "…"
    assert shortened(({"role": "user", "content": "hi"}, {"role": "assistant", "content": "so\nlong"})) == "so long"


def rounds_of(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """The job's exit code, and what it printed: in this process, as `python pipelines/prioritize_sft.py` would."""
    from pipelines import prioritize_sft as job

    monkeypatch.setattr(sys, "argv", ["prioritize_sft.py", *map(str, arguments)])
    code = job.main()
    return code, *capsys.readouterr()


def test_rounds_from_the_command_line(sft, folder, monkeypatch, capsys):
    """With a trainer of the user's own that copies a finished run; rows of the pool by a function of the user's own."""
    copy = f'{sys.executable} -c "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[3])" {folder / "run"} {{data}} {{out}}'
    pool = folder / "more.jsonl"
    pool.write_text(
        "".join(json.dumps({"question": f"add {a} and 7.", "answer": f"#### {a + 7}"}) + "\n" for a in (3, 4, 5))
    )
    (folder / "mine.py").write_text("def last(hard, pool, take, seed):\n    return [len(pool) - 1][:take]\n")
    given = [sft, "--rounds", 1, "--take", 1, "--pool", pool, "--train", copy, "--quiet", "--out", folder / "rounds"]
    code, text, _ = rounds_of(monkeypatch, capsys, *given, "--like", "mine:last", "--json")
    assert code == 0
    first, second = json.loads(text)
    assert (first["rows"], first["collected"], second["rows"]) == (8, 1, 9)
    data = (folder / "rounds" / "round-2" / "data.jsonl").read_text().splitlines()
    assert json.loads(data[-1]) == {"prompt": "add 5 and 7.", "completion": "#### 12", "answer": "12"}
    code, text, _ = rounds_of(monkeypatch, capsys, *given, "--like", "mine:last")
    assert code == 0
    head, _, *lines = text.splitlines()
    assert head.split() == ["round", "rows", "train", "premem", "heldout", "hard", "fluent", "undecided", "collected"]
    assert [line.split()[1] for line in lines[:2]] == ["8", "9"]
    code, _, error = rounds_of(monkeypatch, capsys, *given)  # the default: like states
    assert code == 2 and "asked for differently (like)" in error


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--take", "1", "--model", "m"], "--pool FILE or --generate TEMPLATE"),
        (["--take", "1", "--pool", "p"], "--model BASE or --train"),
        (["--pool", "p", "--model", "m"], "--take N"),
        (["--take", "1", "--pool", "p", "--train", "train.py"], "{data} and {out}"),
    ],
)
def test_rounds_say_what_is_missing(sft, monkeypatch, capsys, given, wanted):
    code, text, error = rounds_of(monkeypatch, capsys, sft, "--rounds", 1, *given)
    assert code == 2 and text == "" and wanted in error


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            ["--pool", "questons.jsonl"],
            "questons.jsonl: there is no such file or folder. Did you mean 'questions.jsonl'?",
        ),
        (
            ["--pool", "questions.jsonl", "--like", "group:cell"],
            "like group:cell: questions.jsonl has no column 'cell'",
        ),
        (["--pool", "questions.jsonl", "--like", "nobody:picks"], "no module 'nobody'"),
    ],
)
def test_a_pool_that_cannot_be_collected_from_is_said_before_the_first_training(
    sft, folder, monkeypatch, capsys, given, wanted
):
    monkeypatch.chdir(folder)  # which a pool is relative to, as in a shell
    arguments = ["--rounds", 1, "--take", 1, "--train", "false {data} {out}", "--out", folder / "never", *given]
    code, text, error = rounds_of(monkeypatch, capsys, sft, *arguments)
    assert code in (1, 2) and text == "" and wanted in error
    assert not (folder / "never").exists()


def test_ctrl_c_is_one_line(sft, monkeypatch, capsys):
    def interrupted(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("curate.jobs.collect.rounds.grow", interrupted)
    code, text, error = rounds_of(
        monkeypatch, capsys, sft, "--rounds", 1, "--take", 1, "--pool", sft.with_name("questions.jsonl"), "--model", "m"
    )
    assert (code, text) == (130, "") and error.startswith("Stopped.") and error.count("\n") == 1


def test_the_default_trainer_leaves_checkpoints_along_the_run(tmp_path):
    pytest.importorskip("trl", reason="the default trainer needs the extra `prove`")
    import torch
    from safetensors.torch import load_file

    from curate.jobs.demo import task
    from curate.jobs.demo.model import BASE
    from curate.models.checkpoints import find_checkpoints
    from pipelines.train_sft import train

    rows = task.splits(seed=1, train=8)["train"]
    data = task.write_jsonl(tmp_path / "data.jsonl", rows)
    train(data, tmp_path / "run", model=str(BASE), epochs=4, rate=1e-3, batch=4, checkpoints=2, seed=0)
    found = find_checkpoints(str(tmp_path / "run"), tmp_path)
    assert [checkpoint.step for checkpoint in found] == [4, 8]
    weights = [load_file(Path(checkpoint.path) / "model.safetensors")["model.norm.weight"] for checkpoint in found]
    assert not torch.equal(*weights)
