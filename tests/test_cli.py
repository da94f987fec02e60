"""The command line as a user has it: every command, JSON that parses, exit codes 0, 1, 2 and 130, and errors that say what to do next.

Most commands run through `main()` in this process, which is what the installed command calls; what only a process of its own can show
(Ctrl-C, a pipe that closes, a store that another DuckDB client holds) runs in one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from curate.cli import main
from tests import forked
from tests.tiny_models import make_llama

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = [
    "demo",
    "init",
    "doctor",
    "validate",
    "plan",
    "run",
    "measure",
    "score",
    "select",
    "export",
    "import",
    "scores",
    "explain",
    "summary",
    "status",
    "sql",
    "schedule",
]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def curate(monkeypatch, capsys) -> Callable[..., Said]:
    """curate("run", path, "--json") -> what a shell would see."""

    def curate(*args: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["curate", *map(str, args)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "This is a bug" not in said.err, said.err
        return Said(code, said.out, said.err)

    return curate


def pairs(n: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"ada {i}:", "chosen": f" bea {i * 7}.", "rejected": " cy" * (1 + i % 3) + "!", "topic": "ab"[i % 2]}
        for i in range(start, start + n)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, model: Path, **over) -> Path:
    raw = {
        "kind": "preference",
        "source": {"path": "pairs.jsonl"},
        "models": {"reference": str(model)},
        "tokens": {"max_length": 128},
        "scores": ["ranking_gap", {"flip_loss": {"beta": 0.1}}, "edit_distance"],
        "select": {"order_by": "flip_loss desc", "keep": {"rows": 4}},
        "export": {"to": "out", "columns": "scores"},
    }
    raw |= over
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "reference", seed=0)


@pytest.fixture(scope="module")
def done(tmp_path_factory, model) -> Path:
    """A recipe that has been run: 10 pairs, 4 kept. Its store is only read by the tests."""
    import curate

    folder = tmp_path_factory.mktemp("done")
    write_rows(folder / "pairs.jsonl", pairs(10))
    curate.run(write_recipe(folder / "recipe.yaml", model))
    return folder / "recipe.yaml"


# ---- every command ------------------------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_every_command_helps(curate):
    listed = curate("--help").out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    for name in COMMANDS:
        helped = curate(name, "--help")
        assert helped.code == 0 and "Usage: " in helped.out
        assert "--quiet" in helped.out, f"{name} has no --quiet"
        assert "--json" in helped.out or name == "schedule", f"{name} has no --json"
        if "RECIPE" in helped.out.splitlines()[0]:
            assert "--set" in helped.out and "--store" in helped.out, name


def test_init_writes_recipes_that_load(curate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("preference", "sft", "rlvr"):
        assert curate("init", kind, f"{kind}.yaml", "--json").json == {"kind": kind, "file": f"{kind}.yaml"}
        missing = curate("plan", f"{kind}.yaml")
        assert missing.code == 1 and "no such file or folder beside the recipe" in missing.err
    again = curate("init", "sft", "sft.yaml")
    assert again.code == 2 and "--force" in again.err
    assert curate("init", "dpo").code == 2
    assert curate("init", "--schema").json["title"] == "curate recipe"


def test_doctor_and_scores(curate):
    found = curate("doctor", "--json").json
    assert {"topic", "state", "text", "hint"} == set(found[0])
    assert "python" in curate("doctor").out
    scores = curate("scores", "--json").json
    assert {"ranking_gap", "premem_accuracy"} <= {s["name"] for s in scores}
    assert all(s["unit"] is not None and s["worst"] and s["high_means"] and s["source"] for s in scores)
    assert "arXiv:2405.19534" in curate("scores", "flip_loss").out
    wrong = curate("scores", "flip_los")
    assert wrong.code == 2 and "did you mean 'flip_loss'" in wrong.err


def test_every_step_speaks_text_and_json(curate, tmp_path, model):
    write_rows(tmp_path / "pairs.jsonl", pairs(10))
    recipe = write_recipe(tmp_path / "recipe.yaml", model)
    assert curate("validate", recipe, "--json").json["n_bad"] == 0
    plan = curate("plan", recipe, "--json").json
    assert [(s["pass"], s["rows"], s["missing"]) for s in plan["steps"]] == [("tokens", 10, 10), ("forward", 10, 10)]
    early = curate("select", recipe)
    assert early.code == 2 and "curate score" in early.err
    assert curate("measure", recipe, "--json").json["measured"] == {"tokens": 10, "forward": 10}
    assert curate("score", recipe, "--quiet", "--json").json["scores"] == ["ranking_gap", "flip_loss", "edit_distance"]
    assert curate("select", recipe, "--json").json["selection"]["kept"] == 4
    exported = curate("export", recipe)
    assert exported.code == 0 and "Exported 4 rows" in exported.out and (tmp_path / "out" / "README.md").is_file()
    elsewhere = curate("run", recipe, "--store", tmp_path / "other", "--set", "select.keep.rows=3", "--quiet")
    assert elsewhere.code == 0 and elsewhere.err == "" and "3 of 10 rows kept" in elsewhere.out
    assert (tmp_path / "other" / "curate.duckdb").is_file()


def test_questions_to_a_store(curate, done):
    store = done.parent / "store"
    assert curate("status", store, "--json").json["rows"] == 10
    assert "flip_loss" not in curate("status", store).out and "recipe (4 kept)" in curate("status", store).out
    names = {v["name"] for v in curate("summary", store, "--json").json["values"]}
    assert "ranking_accuracy" in names
    rows = curate("sql", store, "SELECT row_id, flip_loss FROM scored ORDER BY flip_loss DESC", "--json").json
    assert len(rows) == 10 and all(isinstance(r["flip_loss"], float) for r in rows)
    assert curate("sql", store, "SELECT count(*) AS n FROM rows", "--csv").out == "n\n10\n"
    explained = curate("explain", store, rows[0]["row_id"][:8], "--json").json
    assert explained["decision"]["kept"] and explained["row"]["index"] is not None
    text = curate("explain", store, "pairs.jsonl:0").out
    assert text == curate("explain", store, "pairs.jsonl#1").out and "(preference, pairs.jsonl, row 1)" in text
    assert "selection 'recipe': " in text and "kept: kept" not in text and "ranking_gap" in text


def test_a_refused_command_is_no_run(curate, model, tmp_path):
    """`status` names it while it is the last one; a run that broke is listed as before."""
    write_rows(tmp_path / "pairs.jsonl", pairs(4))
    select, store = {"order_by": "ranking_gap"}, tmp_path / "store"
    path = write_recipe(tmp_path / "recipe.yaml", model, scores=["ranking_gap"], select=select)
    assert curate("measure", path).code == 0
    assert curate("select", path).code == 2  # nothing is scored yet
    told = curate("status", store, "--json").json
    assert [(r["id"], r["command"], r["outcome"]) for r in told["runs"]] == [(1, "measure", "done")]
    assert told["refused"]["command"] == "select" and "curate score" in told["refused"]["message"]
    text = curate("status", store).out
    assert "\nThe last command, `curate select` (recipe, " in text
    assert "was refused: Not every score of 'recipe' is computed yet: `curate score" in text
    assert curate("run", path, "--set", "models.reference=nowhere").code == 1
    told = curate("status", store, "--json").json
    assert [(r["id"], r["outcome"]) for r in told["runs"]] == [(3, "failed"), (1, "done")]
    assert told["refused"] is None and "The last command" not in curate("status", store).out
    query = "SELECT outcome FROM runs ORDER BY id"
    assert [r["outcome"] for r in curate("sql", store, query, "--json").json] == ["done", "refused", "failed"]


def test_a_table_for_people_cuts_long_texts_and_json_does_not(curate, done):
    query = "SELECT repeat('long ', 100) AS t, 1 AS n"
    assert max(map(len, curate("sql", done.parent / "store", query).out.splitlines())) < 80
    assert len(curate("sql", done.parent / "store", query, "--json").json[0]["t"]) == 500


def test_import_and_its_mistakes(curate, tmp_path):
    logs = tmp_path / "logs.csv"
    logs.write_text(
        "id,run,step,k,n,ppl,acc\n" + "".join(f"{i},a,{s},{i % 3},4,1.5,0.5\n" for i in range(6) for s in (1, 2))
    )
    places = ["run=run", "checkpoint=step"]
    brought = curate(
        "import", tmp_path / "s", logs, "--map", "row=id", *places, "samples=n", "correct=k", "perplexity=ppl", "--json"
    )
    assert brought.json["rows"] == 6 and brought.json["checkpoints"] == 2
    assert curate("summary", tmp_path / "s").code == 0
    for mapping, says in (
        (["row=idd", "accuracy=acc"], "Did you mean row=id?"),
        (["rows=id", "accuracy=acc"], "did you mean row=?"),
        (["runs=run", "test_accuracy=acc"], "did you mean run=?"),
        (["row"], "expected ours=theirs"),
        (["row=id", "correct=k"], "go together"),
    ):
        wrong = curate("import", tmp_path / "s", logs, "--map", *mapping)
        assert wrong.code == 2 and says in wrong.err
    forgotten = curate("import", tmp_path / "s", logs, "--map", *places, "test_accuracy=acc")
    assert forgotten.code == 1 and "row=" in forgotten.err  # many lines for one run and checkpoint: no dataset value


# ---- what a user does wrong ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("select.kep.rows=3", 2, "did you mean 'keep'"),
        ("selct={}", 2, "did you mean 'select'"),
        ("scores=[flip_los]", 2, "did you mean 'flip_loss'"),
        ("scores=[{flip_loss: {bta: 1}}]", 2, "did you mean 'beta'"),
        ("tokens.max_length=many", 2, "tokens.max_length"),
        ("select.keep={rows: 3, share: 0.5}", 2, "exactly one of"),
        ("select.order_by=rankin_gap", 2, "did you mean 'ranking_gap'"),
        ("select.where=nonsense <", 2, "select.where"),
        ("select.per=topick", 2, "did you mean 'topic'"),
        ("export.columns=[topick]", 2, "export.columns: 'topick' is not a column of `scored`; did you mean 'topic'"),
        (
            "export.weight=flip_los",
            2,
            "export.weight: 'flip_los' is not a column of `scored`; did you mean 'flip_loss'",
        ),
        ("models.reference=nowhere", 1, "no such model folder"),
        ("models.reference=pairs.jsonl", 1, "is a file"),
        ("source=paris.jsonl", 1, "pairs.jsonl"),
        ("engine.device=cuda:7", 1, "engine.device"),
        ("kind=sft", 2, "ranking_gap is for preference rows"),
        ("x", 2, "expected key=value"),
    ],
)
def test_a_wrong_setting_is_one_message_and_its_exit_code(curate, done, change, code, says):
    said = curate("run", done, "--set", change)
    assert said.code == code and says in said.err and said.out == ""


def test_usage_that_typer_refuses_is_2(curate, tmp_path):
    assert curate("run").code == 2
    assert curate("rnu", "x").code == 2
    assert curate("run", "x", "--nope").code == 2
    assert curate("sql", tmp_path).code == 2


def test_a_missing_store_or_row_or_view(curate, done, tmp_path):
    store = done.parent / "store"
    nothing = curate("status", tmp_path / "nothing")
    assert nothing.code == 1 and "no store there" in nothing.err and "curate run" in nothing.err
    for args, says in (
        (("explain", store, "ffffffffff"), "means no row"),
        (("explain", store, "pairs.jsonl:99"), "Sources are: pairs.jsonl"),
        (("explain", store, "pairs.jsonl:1", "--selection", "x"), "There are: recipe"),
        (("summary", store, "--recipe", "recip"), "Did you mean 'recipe'"),
        (("sql", store, "SELECT * FROM scord"), "Did you mean scored?"),
        (("sql", store, "SELECT flip_los FROM scored"), "The nearest: flip_loss."),
        (("sql", store, "DROP TABLE data.rows"), "only read"),
    ):
        said = curate(*args)
        assert said.code == 2 and says in said.err, args


def test_the_nearest_column_is_one_of_the_store_not_of_duckdbs_own(curate, done):
    assert "options" not in curate("sql", done.parent / "store", "SELECT promptions FROM scored").err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "no rows at all"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00", "damaged"),
        ("cut.parquet", b"PAR1 and no more", "not a parquet file"),
        ("bad.jsonl", b'{"prompt": "a", "chosen": true, "rejected": "b"}\n', "row 1: 'chosen' is true (bool)"),
    ],
)
def test_data_that_cannot_be_read(curate, tmp_path, model, name, content, says):
    (tmp_path / name).write_bytes(content)
    recipe = write_recipe(tmp_path / "recipe.yaml", model, source=name)
    for said in (curate("validate", tmp_path / name), curate("validate", recipe), curate("run", recipe)):
        assert said.code == 1 and says in said.out + said.err


def test_validate_reads_the_held_out_rows_too(curate, tmp_path, model):
    write_rows(tmp_path / "pairs.jsonl", pairs(3))
    write_rows(tmp_path / "held.jsonl", [*pairs(2, start=9), {"prompt": "a", "chosen": "b", "rejected": ""}])
    recipe = write_recipe(tmp_path / "recipe.yaml", model, heldout="held.jsonl")
    said = curate("validate", recipe)
    assert said.code == 1 and "held.jsonl, row 3: 'rejected' is blank" in said.out
    assert curate("validate", recipe, "--json").json["heldout"]["n_bad"] == 1
    target = write_recipe(tmp_path / "target.yaml", model, targets={"safe": {"path": "held.jsonl", "of": "margin"}})
    assert curate("validate", target, "--json").json["targets.safe"]["defects"][0]["row"] == 3


def test_validate_says_which_options_do_nothing_here(curate, tmp_path, done):
    data = write_rows(tmp_path / "pairs.jsonl", pairs(3))
    assert "for recipes" in curate("validate", data, "--set", "source.limit=1").err
    assert "change them with --set" in curate("validate", done, "--kind", "sft").err


def test_advice_about_data_names_options_of_validate(curate, tmp_path):
    data = write_rows(tmp_path / "odd.jsonl", [{"instruct": "a", "good": "b", "bad": "c"}])
    said = curate("validate", data).err
    assert "`--column <ours>=<theirs>`" in said and "--set" not in said
    assert (
        curate(
            "validate", data, "--column", "prompt=instruct", "--column", "chosen=good", "--column", "rejected=bad"
        ).code
        == 0
    )


def test_all_of_the_first_rows_bad_is_said_as_that(curate, tmp_path, model):
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": True, "rejected": "b"}] * 3 + pairs(3))
    recipe = write_recipe(
        tmp_path / "recipe.yaml", model, source={"path": "pairs.jsonl", "on_bad_row": "drop", "limit": 3}
    )
    said = curate("run", recipe)
    assert said.code == 1 and "none of the first 3 rows can be used" in said.err and "source.limit" in said.err


def test_held_out_rows_that_are_trained_on_are_said(curate, tmp_path, model):
    write_rows(tmp_path / "pairs.jsonl", pairs(6))
    write_rows(tmp_path / "held.jsonl", pairs(4, start=4))
    recipe = write_recipe(tmp_path / "recipe.yaml", model, heldout="held.jsonl", select=None, export=None)
    assert "2 of 4 held-out rows are training rows too" in curate("plan", recipe).err


def test_an_unreadable_model_folder(curate, tmp_path, model):
    write_rows(tmp_path / "pairs.jsonl", pairs(3))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    said = curate("plan", write_recipe(tmp_path / "recipe.yaml", broken))
    assert said.code == 1 and "no weights (*.safetensors)" in said.err
    weights = (model / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    said = curate("plan", tmp_path / "recipe.yaml")
    assert said.code == 1 and "cut short" in said.err
    (broken / "model.safetensors").write_bytes(weights)  # and now no tokenizer
    said = curate("plan", tmp_path / "recipe.yaml")
    assert said.code == 1 and "tokenizer" in said.err


def test_a_store_that_is_no_store(curate, tmp_path, done):
    (tmp_path / "file").write_text("x")
    assert "cannot make this folder" in curate("plan", done, "--store", tmp_path / "file").err
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "curate.duckdb").write_bytes(b"garbage" * 1000)
    said = curate("status", tmp_path / "damaged")
    assert said.code == 1 and "is damaged" in said.err and "shards" in said.err
    (tmp_path / "older").mkdir()
    import duckdb

    with duckdb.connect(str(tmp_path / "older" / "curate.duckdb")) as con:
        con.execute("CREATE SCHEMA data; CREATE TABLE data.meta (key VARCHAR, value VARCHAR)")
        con.execute("INSERT INTO data.meta VALUES ('schema_version', '0')")
    said = curate("run", done, "--store", tmp_path / "older")
    assert said.code == 1 and "older version 0" in said.err and "Nothing was changed" in said.err


def test_a_step_on_scores_of_other_settings_is_refused(curate, tmp_path, model):
    write_rows(tmp_path / "pairs.jsonl", pairs(8))
    recipe = write_recipe(tmp_path / "recipe.yaml", model)
    assert curate("run", recipe).code == 0
    beta = ("--set", "scores=[ranking_gap, {flip_loss: {beta: 0.5}}, edit_distance]")
    said = curate("select", recipe, *beta)
    assert said.code == 2 and f"curate score {recipe}" in said.err
    said = curate("export", recipe, "--set", "select.keep.rows=2")
    assert said.code == 2 and f"curate select {recipe}" in said.err
    assert curate("score", recipe, *beta).code == 0
    assert curate("export", recipe, *beta).code == 2  # selected by the old flip_loss
    assert curate("select", recipe, *beta).code == 0 and curate("export", recipe, *beta).code == 0


def test_two_recipes_of_one_name_do_not_take_each_others_selection(curate, tmp_path, model):
    for folder, start in (("one", 0), ("two", 50)):
        write_rows(tmp_path / folder / "pairs.jsonl", pairs(5, start=start))
        write_recipe(tmp_path / folder / "recipe.yaml", model, scores=["edit_distance"], select=None, export=None)
    store = ("--store", tmp_path / "store")
    assert curate("run", tmp_path / "one" / "recipe.yaml", *store).code == 0
    said = curate("run", tmp_path / "two" / "recipe.yaml", *store)
    assert said.code == 2 and str(tmp_path / "one" / "recipe.yaml") in said.err and "--store" in said.err
    assert curate("run", tmp_path / "one" / "recipe.yaml", *store).code == 0
    (tmp_path / "one" / "recipe.yaml").rename(tmp_path / "moved.yaml")  # a recipe that has moved is nobody else's
    assert curate("run", tmp_path / "two" / "recipe.yaml", *store).code == 0


def test_schedule_says_tonights_mistake_now(curate, done):
    said = curate("schedule", done, "--cron", "0 2 * * *", "--set", "scores=[flip_los]")
    assert said.code == 2 and "did you mean 'flip_loss'" in said.err
    assert curate("schedule", done, "--cron", "every night").code == 2
    assert curate("schedule", done.parent / "recip.yaml", "--cron", "0 2 * * *").code == 2


# ---- what only a process can show ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_keeps_what_is_measured_and_says_so(done, tmp_path, name):
    """The interrupt comes after the first forward shard was written, as Ctrl-C does; systemd and Kubernetes send SIGTERM."""
    code = (
        "import os, signal, sys\n"
        "from curate import Store; from curate.plan import step\n"
        "step.SHARD_ROWS['forward'] = 4\n"
        "write = Store.write_shard\n"
        "def stop(self, measured, *args, **kwargs):\n"
        "    found = write(self, measured, *args, **kwargs)\n"
        "    if measured.reads == 'forward':\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "    return found\n"
        "Store.write_shard = stop\n"
        "from curate.cli import main\n"
        "main()\n"
    )
    store = tmp_path / "store"
    said = forked.run(code, "run", done, "--store", store)
    assert said.returncode == 128 + signal.Signals[name]
    assert said.stderr.strip().endswith("Stopped. What was measured is kept; the same command goes on from there.")
    from curate import Store

    kept = Store(store)
    assert kept.sql("SELECT outcome FROM runs")["outcome"].to_list() == ["stopped"]
    assert len(kept.shards.pending()) == 1  # taken in by the next run


def test_a_reader_that_goes_away_is_no_error(done):
    query = "SELECT range, repeat('x', 50) AS t FROM range(20000)"
    command = [sys.executable, "-m", "curate", "sql", str(done.parent / "store"), query]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None and reader.stderr is not None
        reader.stdout.readline()
        reader.stdout.close()
        assert reader.stderr.read() == "" and reader.wait() == 0


def test_a_store_that_another_client_has_open_is_waited_for(done, tmp_path, monkeypatch):
    """The other client lets go as soon as it has been waited for."""
    import duckdb

    store = done.parent / "store"
    hold = "import duckdb, sys; con = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(store / "curate.duckdb")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(duckdb.IOException):
            duckdb.connect(str(store / "curate.duckdb"), read_only=True)
        from curate import Store
        from curate.errors import StoreError

        with pytest.raises(StoreError, match=f"process {other.pid} has had it open"):
            Store(store, patience=0.1)
        other.stdin.close()
    assert forked.curate("sql", store, "SELECT count(*) AS n FROM rows", "--csv").stdout == "n\n10\n"
