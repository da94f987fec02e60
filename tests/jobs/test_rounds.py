"""Rounds on the demo's task with its real base: what each one trains on, that fluent rows are never hard, and that a stopped job goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from curate.errors import CurateError, UsageError
from curate.jobs.collect import candidates, rounds
from curate.jobs.collect.pick import Candidate
from curate.jobs.demo import task, training
from curate.jobs.demo.line import one_thread
from curate.models.checkpoints import single_model
from curate.rows import Example, content_id
from tests import forked

RECIPE = """
kind: sft
source: {path: train.jsonl}
heldout: {path: test.jsonl}
models: {checkpoints: nowhere}
engine: {sampler: transformers, device: cpu}
sampling: {samples: 2, max_new_tokens: 40, grader: gsm8k}
scores: [accuracy, target_nll, {premem_accuracy: {threshold: 0.66}}, {fluent: {threshold: 0.66}}]
select: {where: "premem_accuracy < 0.5"}
export: {to: out}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The recipe's folder, and checkpoints of a short training that every round of these tests takes for its own."""
    folder = tmp_path_factory.mktemp("rounds")
    rows = task.splits(seed=11, train=16, test=4, pool=40)
    for name, problems in rows.items():
        task.write_jsonl(folder / f"{name}.jsonl", problems)
    with (folder / "pool.jsonl").open("a") as pool:  # nobody may train on these two
        for row in (rows["test"][0], rows["train"][0]):
            pool.write(json.dumps({"prompt": row.prompt, "completion": " it is 0", "answer": "0", "cell": "x"}) + "\n")
    (folder / "sft.yaml").write_text(RECIPE)
    with one_thread():
        texts = [(row.prompt, row.completion) for row in rows["train"]]
        training.train_sft(texts, folder / "ready", steps=20, batch=8, fractions=(0.2, 1.0), seed=0)
    return folder


class Trainer:
    """Takes the ready checkpoints; says what it was given; fails when told to."""

    def __init__(self, folder: Path):
        self.ready, self.seen, self.fail_in = folder / "ready", [], 0

    def __call__(self, data: Path, out: Path, number: int) -> None:
        self.seen.append((number, data.read_text().splitlines()))
        shutil.copytree(self.ready, out)
        if number == self.fail_in:
            raise CurateError("the machine went away")


def grow(made, out, trainer, *, like="states", n=1, take=8, **given):
    return rounds.grow(
        made / "sft.yaml",
        out=out,
        rounds=n,
        take=take,
        train=trainer,
        collect=candidates.from_pool(str(made / "pool.jsonl"), like),
        asked={"like": like},
        **given,
    )


@pytest.fixture(scope="module")
def grown(made):
    trainer = Trainer(made)
    return grow(made, made / "a", trainer), trainer


def test_each_round_trains_on_the_last_one_s_rows_and_what_is_like_the_hard_ones(grown, made):
    lines, trainer = grown
    assert [(line["round"], line["rows"]) for line in lines] == [(1, 16), (2, 24)]
    assert [number for number, _ in trainer.seen] == [1, 2]
    first, second = ([json.loads(line) for line in data] for _, data in trainer.seen)
    assert first == [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    assert second[:16] == first
    held = {json.loads(line)["prompt"] for line in (made / "test.jsonl").read_text().splitlines()}
    new = [row["prompt"] for row in second[16:]]
    assert len(set(new)) == 8 and not set(new) & (held | {row["prompt"] for row in first})
    assert set(new) <= {json.loads(line)["prompt"] for line in (made / "pool.jsonl").read_text().splitlines()}
    assert lines[0]["left_out"] == {"with a known prompt": 2}
    assert json.loads((made / "a" / "summary.json").read_text()) == lines


def test_hard_are_the_picked_rows_that_were_not_fluent(grown, made):
    import curate

    lines, _ = grown
    for line in lines:
        assert line["picked"] == line["hard"] + line["fluent"] + line["undecided"]
        assert 0 <= line["premem"] <= line["train"] <= 1 and 0 <= line["heldout"] <= 1
    store = curate.Store(made / "a" / "store")
    hard = store.sql("SELECT row_id FROM scored WHERE premem_accuracy < 0.5 AND fluent = 0", recipe="sft")["row_id"]
    assert lines[-1]["hard"] == len(hard) > 0
    written = [json.loads(x) for x in (made / "a" / "round-2" / "hard.jsonl").read_text().splitlines()]
    assert {Example(x["prompt"], x["completion"], x["answer"]).row_id for x in written} == set(hard)


def test_where_all_rows_are_fluent_none_is_hard_and_the_rounds_end(made):
    """A threshold above every NLL: premem is 0 for all of them, and says nothing."""
    high = [
        "scores=[{premem_accuracy: {threshold: 1000}}, {fluent: {threshold: 1000}}]",
        "source.limit=4",
        "heldout=null",
    ]
    lines = grow(made, made / "fluent", Trainer(made), overrides=high)
    assert [(line["picked"], line["fluent"], line["hard"]) for line in lines] == [(4, 4, 0)]


def test_a_stopped_job_goes_on_where_it_was(grown, made):
    lines, _ = grown
    trainer = Trainer(made)
    trainer.fail_in = 2
    with pytest.raises(CurateError, match="went away"):
        grow(made, made / "b", trainer)
    assert (made / "b" / "runs" / "round-2").is_dir()  # half a training: begun again
    again = Trainer(made)
    assert grow(made, made / "b", again) == lines
    assert [number for number, _ in again.seen] == [2]
    (made / "b" / "round-1" / "collected.json").unlink()
    last = Trainer(made)
    assert grow(made, made / "b", last) == lines
    assert last.seen == []
    more = grow(made, made / "b", last, n=2)  # one round more
    assert more[0] == lines[0] and [line["rows"] for line in more] == [16, 24, 32]
    assert more[1]["left_out"] == {"known": 8, "with a known prompt": 2}


def test_another_question_in_the_same_folder_is_refused(grown, made):
    with pytest.raises(UsageError, match=r"asked for differently \(take\)"):
        grow(made, made / "a", Trainer(made), take=9)
    with pytest.raises(UsageError, match="not a folder of rounds"):
        grow(made, made, Trainer(made))


def test_a_second_process_in_the_same_folder_is_refused(made):
    """While the first one trains; it goes on undisturbed, and once it has ended the folder is free again."""
    script = Path(__file__).resolve().parents[2] / "pipelines" / "prioritize_sft.py"
    words = f"{made / 'sft.yaml'} --rounds 1 --take 8 --pool {made / 'pool.jsonl'} --model base --out {made / 'both'}"
    trainer, said = Trainer(made), []

    def train(data: Path, out: Path, number: int) -> None:
        if number == 1:
            said.append(forked.run(script, *words.split()))
        trainer(data, out, number)

    lines = grow(made, made / "both", train)
    assert said[0].returncode == 1
    assert f"{made / 'both'}: process {os.getpid()} runs rounds in this folder, or a" in said[0].stderr
    assert len(lines) == 2 and [number for number, _ in trainer.seen] == [1, 2]
    assert grow(made, made / "both", trainer) == lines  # the folder is free again


def test_a_trainer_that_a_killed_job_left_behind_keeps_the_folder(made, tmp_path):
    """It still writes checkpoints: who goes on would train beside it."""
    os.mkfifo(tmp_path / "pid")
    (tmp_path / "t.py").write_text(
        f"import os, signal; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); signal.pause()"
    )
    script = Path(__file__).resolve().parents[2] / "pipelines" / "prioritize_sft.py"
    words = f"{made / 'sft.yaml'} --rounds 1 --take 8 --pool {made / 'pool.jsonl'} --out {tmp_path / 'out'}"
    command = f"{sys.executable} {tmp_path / 't.py'} {{data}} {{out}}"
    job = forked.start(script, *words.split(), "--train", command, files=[tmp_path / "stdout", tmp_path / "stderr"])
    trainer = int((tmp_path / "pid").read_text())
    try:
        job.kill()
        job.join()
        with pytest.raises(CurateError, match=f"process {job.pid} runs rounds .* or a trainer that it left behind"):
            with rounds._alone(tmp_path / "out"):
                pass
    finally:
        os.kill(trainer, signal.SIGKILL)
    with rounds._alone(tmp_path / "out"):
        pass


def test_a_job_killed_at_its_first_file_goes_on(made, tmp_path):
    (tmp_path / ".rounds.json.part").write_text("{")
    trainer = Trainer(made)
    trainer.fail_in = 1
    with pytest.raises(CurateError, match="the machine went away"):
        grow(made, tmp_path, trainer)
    assert len(trainer.seen) == 1


@pytest.mark.parametrize(
    ("change", "missing"),
    [("scores=[premem_accuracy]", "`fluent"), ("select=null", "a `select"), ("source=null", "a `source")],
)
def test_a_recipe_that_cannot_say_what_is_hard_is_refused(made, change, missing):
    with pytest.raises(UsageError, match=f"rounds need {missing}"):
        grow(made, made / "never", Trainer(made), overrides=[change])
    assert not (made / "never").exists()


def asked_of(made, hard, take=6) -> rounds.Round:
    from curate.recipe.load import load_recipe

    loaded = load_recipe(made / "sft.yaml")
    last = single_model("ready/checkpoint-20", made)
    return rounds.Round(1, hard, [c.row for c in hard], last, loaded, take, 0)


def test_rows_of_the_hard_ones_groups(made):
    hard = [Candidate(Example("a", " b", "1"), {"cell": cell}) for cell in ("times2", "times2", "add3")]
    rows, _ = candidates.from_pool(str(made / "pool.jsonl"), "group:cell")(asked_of(made, hard))
    assert sorted(row.columns["cell"] for row in rows) == ["add3"] * 2 + ["times2"] * 4
    with pytest.raises(UsageError, match="no column 'kind'; its columns besides the texts: cell"):
        candidates.from_pool(str(made / "pool.jsonl"), "group:kind")(asked_of(made, hard))
    with pytest.raises(UsageError, match="found 'stats'"):
        candidates.from_pool("pool.jsonl", "stats")


def test_a_model_writes_rows_like_the_hard_ones(made, tmp_path):
    """The demo's base writes stories by itself; the trained one answers what it wrote. What is kept is whole, new, and a majority's."""
    hard = [
        Candidate(Example(row.prompt, row.completion, row.answer)) for row in task.splits(seed=12, train=4)["train"]
    ]
    (tmp_path / "template.txt").write_text("{1}</s><s>{2}</s><s>")
    asked = asked_of(made, hard)
    found = [candidates.from_model(tmp_path / "template.txt", agree=0.5)(asked) for _ in range(2)]
    assert found[0] == found[1]
    rows, why = found[0]
    assert why["asked"] <= 8 * 6
    assert len(rows) + sum(n for name, n in why.items() if name != "asked") == why["asked"]
    for row in rows:
        assert row.row.prompt.strip() and row.row.answer in row.row.completion
    with pytest.raises(UsageError, match=r"wanted a text with \{1\}"):
        candidates.from_model(tmp_path / "none.txt")


def test_a_command_trains(tmp_path):
    code = "import sys, pathlib; pathlib.Path(sys.argv[2]).mkdir(); print(*sys.argv[1:]); sys.exit(int(sys.argv[3]))"
    (tmp_path / "t.py").write_text(code)
    command = f"{sys.executable} {tmp_path / 't.py'} {{data}} {{out}} {{fail}} {{round}}"
    rounds.by_command(command, fail=0)(tmp_path / "a b.jsonl", tmp_path / "run 1", 7)
    assert (tmp_path / "run 1").is_dir()
    assert (tmp_path / "train.log").read_text().split()[-1] == "7"
    with pytest.raises(CurateError, match="exit code 3"):
        rounds.by_command(command, fail=3)(tmp_path / "d.jsonl", tmp_path / "run 2", 1)
    with pytest.raises(UsageError, match="cannot be started"):
        rounds.by_command("no-such-program {data} {out}")(tmp_path / "d.jsonl", tmp_path / "run 3", 1)
    for wrong in ("train.py", "train.py '{data} {out}", "train.py {data}"):
        with pytest.raises(UsageError, match="train: "):
            rounds.by_command(wrong)


def test_rows_survive_their_file(tmp_path):
    """Content ids stay: what was measured in one round is found again in the next."""
    rows = [
        Candidate(Example("q", "a", "1"), {"level": 2, "question": "x"}),
        Candidate(Example("q", "so #### 1,234", "1234")),
        Candidate(Example("q", " 7")),
    ]
    talk = ({"role": "user", "content": "q"},), ({"role": "assistant", "content": "a"},)
    for group in (rows, [Candidate(Example(*talk, "1"), {"id": 3})]):
        rounds._write_rows(tmp_path / "rows.jsonl", group)
        back = rounds._read_rows(tmp_path / "rows.jsonl")
        assert [content_id(b.row.row_id) for b in back] == [content_id(r.row.row_id) for r in group]
        assert [b.columns.get("level") for b in back] == [r.columns.get("level") for r in group]
