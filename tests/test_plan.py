"""What `curate plan` says before anything runs, and what it costs to say it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import curate
from curate.console import Progress
from curate.models.checkpoints import Checkpoint
from curate.models.fingerprints import FingerprintCache
from curate.plan import engines, lengths
from curate.recipe.load import load_recipe
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama

REPOSITORY = Path(__file__).resolve().parent.parent
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?"} for i in range(12)]
LONG = [
    {"prompt": f"{i}" + "ada " * 35, "chosen": " yes", "rejected": " no"} for i in range(5)
]  # 149 tokens, 151 with BOS and EOS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "reference", seed=0)


def write(folder: Path, model: Path, rows=PAIRS, **over) -> Path:
    """A recipe over rows; keyword arguments go over its keys."""
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"reference": str(model)},
        "engine": {"device": "cpu"},
        "scores": ["ranking_gap"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw | over))
    return folder / "recipe.yaml"


def plan_of(path: Path):
    return make_plan(load_recipe(path), progress=Progress(quiet=True))


def characters(rows) -> int:
    return sum(len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows)


def test_rows_that_cannot_be_measured_cost_nothing(model, tmp_path):
    """The tokenizer has a token a character. Expected before tokens are counted, known from then on: not missing, though NULL is kept for them."""
    drop = {"tokens": {"max_length": 100, "truncation": "drop"}}
    path = write(tmp_path, model, [*PAIRS, *LONG], **drop)
    before = plan_of(path)
    assert [(s.reads, s.to_measure, s.tokens) for s in before.steps] == [
        ("tokens", 17, characters(PAIRS) + 5 * 100),
        ("forward", 17, characters(PAIRS)),
    ]
    (note,) = before.notes()
    assert note.startswith(
        "By their characters about 5 of the missing rows cannot be measured (max_length 100, truncation drop)"
    )
    curate.run(path, set={"scores": ["edit_distance"]})
    counted = plan_of(path)
    assert [(s.reads, s.to_measure, s.unmeasurable) for s in counted.steps] == [("tokens", 0, 0), ("forward", 12, 5)]
    assert counted.steps[1].tokens == characters(PAIRS) + 3 * 12  # BOS, and EOS of both responses
    assert counted.notes() == [
        "5 rows cannot be measured, and are not missing: the column token_problem of `scored` says why."
    ]
    assert (counted.to_json()["missing"], counted.to_json()["steps"][1]["missing"]) == (12, 12)
    store = curate.run(path).store
    assert plan_of(path).notes() == []
    assert store.sql("SELECT count(*), count(chosen_logp) FROM trajectories").row(0) == (17, 12)


def test_nothing_to_measure_where_nothing_can_be(model, tmp_path):
    path = write(tmp_path, model, LONG, tokens={"max_length": 100, "truncation": "drop"})
    curate.run(path, set={"scores": ["edit_distance"]})
    assert "Everything is measured already." in plan_of(path).text() and plan_of(path).to_json()["missing"] == 0


def test_rows_beyond_the_positions_are_estimated_by_the_models_own_tokenizer(model, tmp_path):
    """Of 4 characters a token, which vocabularies of usual size have, none of these would be beyond 128."""
    path = write(tmp_path, model, [*PAIRS, *LONG], tokens={"max_length": 1024})
    (before,) = plan_of(path).notes()
    assert before.startswith("By their characters about 5 of 17 rows are longer than the 128 positions of reference")
    curate.run(path)
    assert plan_of(path).notes() == [before.removeprefix("By their characters about ")]
    assert lengths.characters_per_token(model, ["ada", "bea cy"]) == 1
    assert lengths.characters_per_token(tmp_path, ["ada"]) == lengths.CHARACTERS_PER_TOKEN  # no tokenizer.json


@pytest.mark.parametrize(
    ("policy", "prompt", "responses", "measurable"),
    [
        ("keep_start", [4, 10, 10, 3], [[2, 1], [0, 0], [0, 0], [7, 7]], [True, False, False, True]),
        ("keep_end", [4, 8, 10, 1], [[2, 1], [2, 1], [0, 0], [9, 8]], [True, True, False, True]),
        ("drop", [4, 10, 10, 3], [[2, 1], [0, 0], [0, 0], [7, 7]], [True, False, False, False]),
    ],
)
def test_what_truncation_leaves_of_ten_tokens(policy, prompt, responses, measurable):
    """Fits; a prompt that fills it; a response that is not there; responses that are cut."""
    given = np.array([4.0, 12, 12, 3]), np.array([[2, 1], [2, 1], [np.nan, np.nan], [9, 8]])
    found = lengths.truncated(*given, 10, policy)
    for one, expected in zip(found, (prompt, responses, measurable), strict=True):
        assert one.tolist() == expected


def test_a_plan_of_measured_rows_loads_no_torch(model, tmp_path):
    """Nor transformers: what they would say of an unchanged model is known from the run."""
    path = write(tmp_path, model)
    curate.run(path)
    code = "import sys\nfrom curate.cli import main\ntry: main()\nfinally: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "plan", str(path), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Everything is measured already." in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_a_known_engine_is_the_one_that_torch_names(model, tmp_path, monkeypatch):
    """Kept only where no GPU can be, under all that it depends on: another dtype, another version is asked for anew."""
    from curate.passes.loading import engine as of_torch

    path, checkpoint = write(tmp_path, model), Checkpoint(str(model), "0")
    asked = []
    own = of_torch.engine_identity

    def counted(**settings):
        asked.append(settings["dtype"])
        return own(**settings)

    monkeypatch.setattr(of_torch, "engine_identity", counted)

    def name(reads="forward", **over):
        recipe = load_recipe(path, set={f"engine.{key}": value for key, value in over.items()}).recipe
        return engines.engine_name(recipe, reads, checkpoint, FingerprintCache(tmp_path / "weights.json"))

    for _ in range(2):
        assert name(dtype="bfloat16") == own(dtype="bfloat16", device="cpu")
        assert name("direction", dtype="bfloat16") == own(dtype="float32", device="cpu")
    assert asked == ["bfloat16", "float32"]
    monkeypatch.setattr(engines, "may_have_gpu", lambda: True)
    name(device="auto"), name(device="auto")
    assert asked[2:] == ["auto", "auto"]
    version = engines.importlib.metadata.version
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda of: "9.9" if of == "torch" else version(of))
    name(dtype="bfloat16")
    assert asked[4:] == ["bfloat16"]


def test_no_gpu_is_said_only_where_torch_finds_none():
    import torch

    assert engines.may_have_gpu() or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def within_twice(estimate: float, truth: float) -> bool:
    return truth / 2 <= estimate <= truth * 2


def test_times_after_the_first_shard_are_those_of_what_is_left(model, tmp_path, monkeypatch):
    """Answers are as long as the first ones were, not as long as they may be; starting an engine is no work on rows."""
    import time

    import curate.plan.missing
    from curate.passes.sampling.hf import HfSampler
    from curate.passes.sampling.types import Sample
    from curate.workflow.runners.sample import SampleRunner

    monkeypatch.setitem(curate.plan.missing.SHARD_ROWS, "sample", 4)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    opened, shards = SampleRunner._open, []

    def slow_to_start(self, step):
        opened(self, step)
        clock[0] += 300

    def sampled(self, prompts, sampling):
        shards.append(len(prompts))
        if len(shards) == 2:
            raise KeyboardInterrupt
        clock[0] += 10 * len(prompts)
        return [[Sample("1", 10, -1.0, True)] * sampling.n for _ in prompts]

    monkeypatch.setattr(SampleRunner, "_open", slow_to_start)
    monkeypatch.setattr(HfSampler, "sample", sampled)
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "answer": str(i + 1)} for i in range(12)]
    settings = {"samples": 2, "max_new_tokens": 100, "grader": "number"}
    sft = {"kind": "sft", "scores": ["accuracy"], "sampling": settings}
    path = write(tmp_path, model, rows, **sft, engine={"device": "cpu", "sampler": "transformers"})
    before = next(s for s in plan_of(path).steps if s.reads == "sample")
    assert before.at_most and before.rough and before.tokens >= 12 * 2 * 100
    with pytest.raises(KeyboardInterrupt):
        curate.run(path)
    left = next(s for s in plan_of(path).steps if s.reads == "sample")
    assert left.to_measure == 8 and not left.rough and not left.at_most
    assert within_twice(left.seconds, 80) and within_twice(left.tokens, 8 * (2 * 10 + len("10 + 1 =")))


def test_speeds_are_those_of_the_same_measurements_first(model, tmp_path):
    store = curate.Store(tmp_path / "store", create=True)
    store.log_throughput("forward/torch/5/likelihood", 100, 1.0)
    store.log_throughput("forward/torch/5/hidden,likelihood", 100, 10.0)
    store.log_throughput("forward/torch/51/likelihood", 100, 100.0)
    assert store.throughput("forward/torch/5/likelihood", alike="forward/torch/5") == 100
    assert store.throughput("forward/torch/5/entropy", alike="forward/torch/5") == pytest.approx(200 / 11)
    store.log_throughput("forward/torch/7", 100, 2.0)  # as stores of before have them
    assert store.throughput("forward/torch/7/entropy", alike="forward/torch/7") == 50


def asked_of_the_database(monkeypatch, act) -> tuple[int, int]:
    """How often `act` opens the database, and how many queries it sends."""
    from curate.store import database

    opened = queries = 0
    connect = database.Database._connect

    class Counted:
        def __init__(self, con):
            self.con = con

        def __getattr__(self, name):
            nonlocal queries
            queries += name in ("execute", "sql")
            return getattr(self.con, name)

    def counted(self, *given):
        nonlocal opened
        opened += 1
        return Counted(connect(self, *given))

    with monkeypatch.context() as patch:
        patch.setattr(database.Database, "_connect", counted)
        act()
    return opened, queries


@pytest.mark.parametrize("measured", ["nothing", "one checkpoint", "everything"])
def test_a_plan_asks_as_much_for_six_checkpoints_as_for_two(model, tmp_path, monkeypatch, measured):
    """Each has weights and a tokenizer's folder of its own. What is there is asked of all of them at once."""
    asked = []
    for n in (2, 6):
        folder = tmp_path / str(n)
        folder.mkdir()
        for step in range(n):
            make_checkpoint(model, folder / "run" / f"checkpoint-{step}", 1 + step / 10)
        models = {"reference": "run/checkpoint-0", "checkpoints": "run"}
        path = write(folder, model, models=models, scores=["flipped", "ches", "ranking_gap"])
        if measured == "one checkpoint":
            curate.run(path, set={"models": {"reference": "run/checkpoint-0"}, "scores": ["ches", "ranking_gap"]})
        if measured == "everything":
            curate.run(path)
        plan_of(path)  # reads the rows
        asked.append(asked_of_the_database(monkeypatch, lambda path=path: plan_of(path)))
    assert asked[0] == asked[1]


def make_checkpoint(model: Path, folder: Path, scale: float) -> None:
    """The model with other weights."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    moved = {name: values * np.float32(scale) for name, values in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tokenizer_is_tried_once_however_many_checkpoints_have_it(model, tmp_path, monkeypatch):
    from curate.workflow import measure

    for step in range(3):
        make_checkpoint(model, tmp_path / "run" / f"checkpoint-{step}", 1 + step / 10)
    path = write(tmp_path, model, models={"checkpoints": "run"}, scores=["flipped"])
    tried, own = [], measure.trial
    monkeypatch.setattr(measure, "trial", lambda loaded, step, rows: tried.append(step) or own(loaded, step, rows))
    plan_of(path)
    assert len(tried) == 1


def test_blocks_are_the_rows_that_each_task_misses_in_shards_of_fixed_membership(tmp_path, monkeypatch):
    """Against a plain loop over rows and tasks: nothing, some and all measured, rows of another source and without text between them."""
    from types import SimpleNamespace

    import curate.plan.missing
    from curate.plan.missing import Rows
    from curate.rows import Pair
    from curate.store import Measured

    monkeypatch.setitem(curate.plan.missing.SHARD_ROWS, "forward", 4)
    store = curate.Store(tmp_path / "store", create=True)
    pairs = [Pair(f"{i}?", "yes", "no") for i in range(20)]

    def records(chosen):
        return [SimpleNamespace(index=i, row=row, columns={}) for i, row in enumerate(chosen)]

    store.add_source("a", "1", records(pairs[:7]))
    store.add_foreign_rows("a", ["x", "y"], kind="preference")
    store.add_source("b", "1", records(pairs[7:10]))
    store.add_source("c", "1", records(pairs[10:]))
    ids = [row.row_id for row in pairs]
    done = {
        "none": [],
        "all": ids[:7] + ids[10:],
        "every row": ids,
        "some": ids[2:9],
        "alike": ids[2:7],
        "one": ids[11:12],
    }
    tasks = []
    for name, of in done.items():
        measured = Measured(name, "entropy" if name == "one" else "likelihood", "forward")
        tasks.append(SimpleNamespace(fingerprint=name, measured=measured))
        if of:
            store.write_shard(measured, 0, of, {"chosen_logp": np.zeros(len(of))})
    store.ingest()
    rows = Rows(store, ["a", "c"], "preference", tasks)
    assert rows.n == 19
    mine = [(int(p), i) for p, i in zip(store.positions(ids), ids, strict=True) if i not in ids[7:10]]
    for chosen in (tasks, tasks[:1], tasks[1:3], tasks[3:5], [tasks[0], tasks[5]]):
        expected: dict = {}
        for position, row_id in sorted(mine):
            missed = tuple(task.fingerprint for task in chosen if row_id not in done[task.fingerprint])
            if missed:
                expected.setdefault((position // 4, missed), []).append(row_id)
        found = rows.blocks(chosen, "forward")
        assert [((n, tuple(t.fingerprint for t in of)), ids) for n, ids, of in found] == list(expected.items())
    for name in done:  # as each is told by itself
        lacking = store.coverage([name], ["a", "c"], kind="preference")
        alone = [row_id for _, row_id in store.missing(name, ["a", "c"], kind="preference")]
        assert [i for i, lacks in zip(lacking.row_ids, lacking.lacking[name], strict=bool(alone)) if lacks] == alone
