"""Influence as a cosine on targets in groups, by the command line, against float64 autograd of every row; resumed; and what a user can get wrong."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml

import curate
from curate.cli import main
from curate.console import Progress
from curate.errors import UsageError
from curate.passes.loading.model import load_model
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import Encoded, Limits, encode
from curate.plan.targets import MOST_GROUPS
from curate.recipe.load import load_recipe
from curate.rows import Example, Pair
from curate.workflow.run import STEPS, make_plan, run_steps
from tests.passes.test_backward import gradient
from tests.tiny_models import make_llama

POOL = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}" + "!" * (i % 3)} for i in range(9)]
TASKS = [
    {"prompt": "a b", "completion": " c", "task": "Spell it"},
    {"prompt": "3 + 4 =", "completion": " 7", "task": "add-1"},
    {"prompt": "c d", "completion": " e.", "task": "Spell it"},
    {"prompt": "2 + 2 =", "completion": " 4", "task": "add-1"},
    {"prompt": "who?", "completion": " me", "task": "other"},
]
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?" + "!" * (i % 3)} for i in range(7)]
COSINE = {"influence_cosine": {"target": "bbh"}}
GROUPS = {"spell_it": (0, 2), "add_1": (1, 3), "other": (4,)}


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


class Line:
    """A folder with a model and its data: line(kind, *scores, **rest of the recipe) runs it by the command line."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch

    def write(self, kind, scores, rest):
        recipe = {
            "kind": kind, "source": "pool.jsonl" if kind == "sft" else "pairs.jsonl", "models": {"reference": "model"}, "scores": list(scores),
            "targets": {"bbh": {"path": "tasks.jsonl", "of": "completion", "per": "task"}},
        } | rest  # fmt: skip
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return self.folder / "recipe.yaml"

    def command(self, *words):
        """As the installed command calls it."""
        self.monkeypatch.setattr(sys, "argv", ["curate", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        assert not code, words

    def __call__(self, kind, *scores, **rest):
        self.command("run", self.write(kind, scores, rest))

    def plan(self, kind, *scores, **rest):
        return make_plan(load_recipe(self.write(kind, scores, rest)), progress=Progress(quiet=True))

    def misses(self, kind, *scores, **rest):
        """{measurement: rows}."""
        blocks = [
            (task, rows)
            for step in self.plan(kind, *scores, **rest).steps
            for _, rows, tasks in step.blocks
            for task in tasks
        ]
        return {task.measurement.name: len(rows) for task, rows in blocks}

    def store(self):
        return curate.Store(self.folder / "store")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of a line, before anything is measured."""
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "model", seed=0)
    for name, rows in (("pool", POOL), ("tasks", TASKS), ("pairs", PAIRS)):
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def line(made, tmp_path, monkeypatch):
    return Line(shutil.copytree(made, tmp_path / "line"), monkeypatch)


@pytest.fixture(scope="module")
def measured(made, tmp_path_factory):
    """The same after a run of influence_cosine, in shards of 4 rows."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("measured") / "line")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(curate.plan.missing.SHARD_ROWS, "direction", 4)
        curate.run(Line(folder, patched).write("sft", [COSINE], {}))
    return folder


def known(measured, rows):
    return column(curate.Store(measured / "store"), "influence_cosine", rows)


def trained(line, steps=((2, 0.5), (4, 0.25))):
    """A run's checkpoints, each with its learning rate and its optimizer; no gradient ever came to some of the embedding's lines and to a norm."""
    model = load_model(line.folder / "model")
    optimizer = torch.optim.AdamW(model.module.requires_grad_(True).parameters(), lr=1e-2)
    moments, log = {}, []
    for at, rate in steps:
        for name, p in model.module.named_parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(at)) * 1e-2
            if "embed" in name:
                p.grad[20:] = 0
            if "layers.0.input_layernorm" in name:
                p.grad[:] = 0
        optimizer.step()
        folder = line.folder / "run" / f"checkpoint-{at}"
        shutil.copytree(line.folder / "model", folder)
        model.module.save_pretrained(folder)
        state = optimizer.state_dict()
        state["param_groups"][0]["param_names"] = [name for name, _ in model.module.named_parameters()]
        torch.save(state, folder / "optimizer.pt")
        log.append({"step": at, "learning_rate": rate})
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": at, "log_history": log}))
        moments[at] = torch.cat([
            (optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** (at // 2))).double().flatten() for p in model.module.parameters()
        ]).numpy()  # fmt: skip
    return moments


def gradients(path, rows) -> np.ndarray:
    """(rows, P) float64: of an SFT row's completion, or of a pair's margin."""
    module = load_model(path).module.double()
    tokenizer = load_tokenizer(path)
    wanted = [p.requires_grad_(True) for p in module.parameters()]
    found = []
    for row in rows:
        row = encode(row, tokenizer, Limits(1024))
        if isinstance(row, Encoded):
            found.append(gradient(module, row, wanted))
        else:
            found.append(gradient(module, row.chosen, wanted) - gradient(module, row.rejected, wanted))
    return torch.stack(found).numpy()


def cosines(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (mine @ theirs) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs)


def column(store, name: str, rows: list, view: str = "scored") -> np.ndarray:
    found = store.sql(f"SELECT row_id, {name} FROM {view}")
    by_id = dict(zip(found["row_id"], found[name]))
    return np.asarray([by_id[row.row_id] for row in rows], float)


def test_less_over_a_run_equals_autograd(line, capsys):
    """Σ over checkpoints first, then the best task; every task's own cosine; a row is kept by it, explained, and exported."""
    moments = trained(line)
    rows, tasks = [Example(**row) for row in POOL], [Example(row["prompt"], row["completion"]) for row in TASKS]
    wanted = {(kind, group): np.zeros(9) for kind in ("sgd", "adam") for group in GROUPS}
    last = {}
    for at, rate in ((2, 0.5), (4, 0.25)):
        path = line.folder / "run" / f"checkpoint-{at}"
        mine, theirs = gradients(path, rows), gradients(path, tasks)
        moved = moments[at] > 0
        p = np.where(moved, 1 / (np.sqrt(moments[at]) + 1e-8), 0)
        assert not moved.all()
        for group, of in GROUPS.items():
            for kind, scale in (("sgd", 1), ("adam", p)):
                last[kind, group] = cosines(mine * scale, theirs[list(of)].mean(0))
                wanted[kind, group] += rate * last[kind, group] / 0.75
    scores = [
        {"influence_cosine": {"target": "bbh", "step": "adam", "as": "less"}}, {"influence_cosine": {"target": "bbh"}},
        {"influence_group": {"target": "bbh", "step": "adam"}},
    ]  # fmt: skip
    rest = {
        "models": {"checkpoints": "run"}, "select": {"order_by": "less desc", "keep": {"rows": 3}},
        "export": {"to": "out", "columns": "scores"},
    }  # fmt: skip
    line("sft", *scores, **rest)
    store = line.store()
    for kind, name in (("adam", "less"), ("sgd", "influence_cosine")):
        best = np.max([wanted[kind, group] for group in GROUPS], axis=0)
        np.testing.assert_allclose(column(store, name, rows), best, atol=1e-5)
        for group in GROUPS:
            found = column(store, f"cosine_bbh_{kind}__{group}", rows, view="(FROM trajectories WHERE step = 4)")
            np.testing.assert_allclose(found, last[kind, group], atol=1e-5)
    groups = sorted(GROUPS)
    serves = np.asarray(groups)[np.argmax([wanted["adam", group] for group in groups], axis=0)]
    named = store.sql("SELECT row_id, influence_group_name FROM scored").rows()
    assert dict(named) == {row.row_id: group for row, group in zip(rows, serves)} and len(set(serves)) > 1
    kept = set(store.selection("recipe").to_dataset()["prompt"])
    less = column(store, "less", rows)
    assert kept == {rows[i].prompt for i in np.argsort(-less)[:3]}
    capsys.readouterr()
    line.command("explain", line.folder / "store", rows[0].row_id)
    said = capsys.readouterr().out
    assert "less (step adam, target bbh)" in said and re.search(rf"influence_group \(.*\): {serves[0]}\b", said)
    assert not line.misses("sft", *scores, **rest)


def test_pairs_by_their_margin_and_a_target_without_groups(line):
    """At a policy too there is nothing to weigh margins with: a cosine has no use for the row's weight."""
    targets = {
        "bbh": {"path": "tasks.jsonl", "of": "completion"},
        "kept": {"path": "pairs.jsonl", "of": "chosen", "limit": 2},
    }
    scores = [{"influence_cosine": {"target": name, "as": name}} for name in targets]
    make_llama(line.folder / "policy", seed=1)
    models = {"reference": "model", "checkpoints": ["policy"]}
    line("preference", *scores, targets=targets, models=models)
    rows = [Pair(**row) for row in PAIRS]
    path = line.folder / "policy"
    mine = gradients(path, rows)
    tasks = gradients(path, [Example(row["prompt"], row["completion"]) for row in TASKS]).mean(0)
    chosen = gradients(path, [Example(row.prompt, row.chosen) for row in rows[:2]]).mean(0)
    np.testing.assert_allclose(column(line.store(), "bbh", rows), cosines(mine, tasks), atol=1e-5)
    np.testing.assert_allclose(column(line.store(), "kept", rows), cosines(mine, chosen), atol=1e-5)
    assert {m.measurement for m in line.store().measured(reads="forward")} == set()


def test_what_a_value_depends_on(measured, tmp_path, monkeypatch):
    """Another task's rows, another column of groups: measured anew; what a target's groups are does not touch its plain influence."""
    cosine, plain = COSINE, {"influence": {"target": "bbh"}}
    line = Line(shutil.copytree(measured, tmp_path / "line"), monkeypatch)
    whole = {"targets": {"bbh": {"path": "tasks.jsonl", "of": "completion"}}}
    assert not line.misses("sft", cosine)
    assert line.misses("sft", cosine, **whole) == {"cosine_bbh_sgd": 9}
    assert line.misses("sft", {"influence_cosine": {"target": "bbh", "step": "sgd", "as": "again"}}) == {}
    steps = line.plan("sft", cosine, plain, **whole).steps
    (step,) = [step for step in steps if step.reads == "direction"]
    assert {task.measurement.name for task in step.tasks} == {"cosine_bbh_sgd", "influence_bbh_sgd"}
    assert step.tokens == pytest.approx(line.plan("sft", plain, **whole).steps[-1].tokens * (3 + 2) / 2, rel=0.02)
    write_lines(line.folder / "tasks.jsonl", TASKS[:4])
    assert line.misses("sft", cosine) == {"cosine_bbh_sgd": 9}


def test_killed_between_shards_it_goes_on(line, measured, monkeypatch):
    from curate.passes.gradients import mean as direction
    from curate.workflow.runners import directions

    monkeypatch.setitem(curate.plan.missing.SHARD_ROWS, "direction", 4)
    recipe = line.write("sft", [COSINE], {})
    rows = [Example(**row) for row in POOL]
    run, made = directions.DirectionRunner.run, []

    def killed(self, rows, *rest):
        if made:
            raise KeyboardInterrupt
        made.append(len(rows))
        return run(self, rows, *rest)

    monkeypatch.setattr(directions.DirectionRunner, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        curate.run(recipe)
    monkeypatch.setattr(directions.DirectionRunner, "run", run)
    monkeypatch.setattr(direction, "accumulate", lambda *a, **k: pytest.fail("the gradients were there"))
    again = curate.run(recipe)
    assert made == [4] and again.measured["direction"] == 5
    np.testing.assert_array_equal(column(again.store, "influence_cosine", rows), known(measured, rows))


def test_targets_that_do_not_fit_together_are_taken_in_turns(line, measured, monkeypatch, capsys):
    from curate.passes.gradients import cosines as passes

    recipe = line.write("sft", [COSINE], {})
    rows = [Example(**row) for row in POOL]
    size = 4 * sum(p.numel() for p in load_model(line.folder / "model").module.parameters())
    monkeypatch.setattr(passes, "free_for", lambda model: 2.5 * size / (passes.SHARE / 2))
    again = run_steps(load_recipe(recipe), STEPS, progress=Progress())
    np.testing.assert_allclose(column(again.store, "influence_cosine", rows), known(measured, rows), atol=1e-6)
    said = capsys.readouterr().err
    assert "2 of the 3 targets' gradients fit into memory at a time: the rows are run 2 times." in said
    assert said.count("3 gradients of targets: 5 of 5 rows") == 1


def test_what_a_user_can_get_wrong(line):
    def refused(rows, match, score=COSINE, per="task"):
        write_lines(line.folder / "tasks.jsonl", rows)
        with pytest.raises(UsageError, match=match):
            line.plan("sft", score, targets={"bbh": {"path": "tasks.jsonl", "of": "completion", "per": per}})

    refused(
        TASKS,
        r"tasks\.jsonl, row 1: targets\.bbh\.per: wanted .* column 'tasks', found none; did you mean 'task'",
        per="tasks",
    )
    refused([*TASKS, {**TASKS[0], "task": None}], r"row 6: targets\.bbh\.per: .* 'task', found -")
    refused(
        [*TASKS, {**TASKS[0], "task": "spell_it"}], r"'Spell it' and 'spell_it' would both be the column …__spell_it"
    )
    refused(
        [{**TASKS[0], "task": i} for i in range(MOST_GROUPS + 1)],
        r"targets\.bbh\.per: task has 101 values; .* at most 100",
    )
    refused(
        TASKS,
        r"influence takes the mean gradient of a whole target, but targets\.bbh has groups",
        {"influence": {"target": "bbh"}},
    )
    refused(TASKS, "did you mean 'bbh'", {"influence_cosine": {"target": "bb"}})
    refused(TASKS, "'sgd' or 'adam'", {"influence_cosine": {"target": "bbh", "step": "sign"}})
