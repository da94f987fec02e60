"""The Recorder in real trainers: values of checkpoints, trainings that do not notice it, crashes, and scores from what was recorded."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

import curate
from curate.console import Progress
from curate.errors import UsageError
from tests import forked
from tests.tiny_models import make_llama

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = {
    "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "use_cpu": True, "bf16": False, "report_to": "none",
    "save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False,
    "dataloader_pin_memory": False, "max_length": 64,
}  # fmt: skip
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    pytest.importorskip("trl")
    return make_llama(tmp_path_factory.mktemp("models") / "base", seed=0, layers=1, dropout=0.1)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    rows = [{"prompt": f"{i} + {i % 3} = ", "completion": f"{i + i % 3}", "answer": str(i + i % 3)} for i in range(12)]
    return write(tmp_path_factory.mktemp("data") / "sums.jsonl", rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    rows = [{"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i + 3} or so"} for i in range(12)]
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(kind: str, source: Path, store: Path, **over) -> dict:
    scores = {"sft": ["target_nll", "confidence"], "preference": ["ranking_gap", "ches", "flipped"]}[kind]
    return {
        "kind": kind,
        "source": str(source),
        "store": str(store),
        "scores": scores,
        "tokens": {"max_length": 64},
        **over,
    }


def trainer_of(kind: str, base: Path, data: Path, out: Path, callbacks=(), peft=None, **settings):
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=str(out.parent / "cache"))
    rows = rows.remove_columns([c for c in rows.column_names if c == "answer"])
    config, trainer = (SFTConfig, SFTTrainer) if kind == "sft" else (DPOConfig, DPOTrainer)
    return trainer(
        model,
        args=config(output_dir=str(out), **{**SETTINGS, **settings}),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=list(callbacks),
        peft_config=peft,
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_what_is_recorded_is_what_the_checkpoint_says_and_training_does_not_notice(
    kind, base, examples, pairs, tmp_path
):
    """Weights are bit for bit those of a training without it, dropout and data order included; values are those of the saved checkpoints."""
    data = examples if kind == "sft" else pairs
    plain = trainer_of(kind, base, data, tmp_path / "plain", save_strategy="no")
    plain.train()
    recorder = curate.Recorder(recipe(kind, data, tmp_path / "store"), every=2, progress=QUIET)
    trainer = trainer_of(kind, base, data, tmp_path / "run", [recorder])
    trainer.train()
    assert all((weights(plain)[name] == value).all() for name, value in weights(trainer).items())
    assert recorder.recorded == [0, 2, 4] and not recorder.failed and 0 < recorder.share < 1

    checkpoints = [str(base), str(tmp_path / "run/checkpoint-2"), str(tmp_path / "run/checkpoint-4")]
    measured = recipe(kind, data, tmp_path / "other", models={"checkpoints": checkpoints})
    if kind == "preference":
        measured["models"]["reference"] = str(base)
    columns = ["target_nll", "target_logp"] if kind == "sft" else ["chosen_logp", "rejected_logp"]
    expected = curate.run(measured)
    found = curate.run(recipe(kind, data, tmp_path / "store", models={"checkpoints": "recordings:run"}))
    assert not found.measured
    for column in columns:
        over = f"SELECT row_id, step, {column} FROM trajectories WHERE step IS NOT NULL ORDER BY row_id, step"
        ours, theirs = (r.store.sql(over)[column].to_numpy().reshape(12, 3) for r in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=2e-6)
        assert np.abs(ours[:, 2] - ours[:, 0]).min() > 0.01  # it learned something meanwhile
    names = ", ".join(found.scores)
    ours, theirs = (
        r.store.sql(f"SELECT {names}, prompt_tokens FROM scored ORDER BY row_id").to_numpy() for r in (found, expected)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    (counts,) = found.store.sql("SELECT counts FROM runs WHERE command = 'record'")["counts"]
    assert json.loads(counts)["steps"] == [0, 2, 4] and json.loads(counts)["share"] == round(recorder.share, 4)


@pytest.fixture(scope="module")
def untied(base, tmp_path_factory) -> Path:
    """The base with an LM head of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "untied"
    config = AutoConfig.from_pretrained(base, tie_word_embeddings=False)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_lora_adapters_are_measured_as_they_are_merged(base, examples, tmp_path):
    """LoRA on every linear layer, gradient checkpointing on: at the end the recorded values are those of the merged model."""
    from peft import LoraConfig

    peft = LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules="all-linear",
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    recorder = curate.Recorder(str(examples), every=4, run="lora", store=tmp_path / "store", progress=QUIET)
    trainer = trainer_of(
        "sft", base, examples, tmp_path / "run", [recorder], peft, save_strategy="no", gradient_checkpointing=True
    )
    trainer.train()
    assert recorder.recorded == [0, 4]
    check_against_merged(trainer.model, base, examples, tmp_path)


def check_against_merged(model, base, examples, tmp_path):
    """What was recorded last in tmp_path's store, the only run there, against the forward pass of the merged model."""
    from transformers import AutoTokenizer

    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    raw = {"kind": "sft", "source": str(examples), "scores": ["target_nll"]}
    expected = curate.run({**raw, "models": {"reference": str(tmp_path / "merged")}}, store=tmp_path / "other")
    found = curate.run(raw, store=tmp_path / "store")
    ours, theirs = (
        r.store.sql("SELECT target_nll FROM scored ORDER BY row_id")["target_nll"].to_numpy() for r in (found, expected)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_lora_on_the_lm_head_is_measured_as_it_is_merged(untied, examples, tmp_path):
    """TRL's trainers refuse it, transformers' own trains it; the recorded logits are those with it, before and after a step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    lora = LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model, tokenizer = get_peft_model(load(untied), lora), AutoTokenizer.from_pretrained(untied)
    ids = tokenizer("1 + 1 = 2", return_tensors="pt")["input_ids"][0]
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", learning_rate=3e-3
    )
    recorder = curate.Recorder(str(examples), every=2, store=tmp_path / "store", progress=QUIET)
    data = [{"input_ids": ids, "labels": ids}] * 8
    Trainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[recorder]).train()
    assert recorder.recorded == [0, 2]
    check_against_merged(model, untied, examples, tmp_path)


def test_a_plain_trainer_samples_and_a_second_training_is_a_run_of_its_own(base, examples, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("1 + 1 = 2", return_tensors="pt")["input_ids"][0]
    data = [{"input_ids": ids, "labels": ids}] * 8
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    over = {"sampling.max_new_tokens": 4, "sampling.grader": "number"}
    rows = curate.load(examples)[:5]
    answers = []
    for name in ("run", "run-2"):
        torch.manual_seed(0)
        recorder = curate.Recorder(rows, every=0.5, samples=2, set=over, store=tmp_path / "store", progress=QUIET)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        Trainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[recorder]).train()
        assert recorder.run_name == name and recorder.recorded == [0, 2, 3]
        raw = {
            "kind": "sft",
            "scores": ["accuracy", "correctness", "confidence"],
            "models": {"checkpoints": f"recordings:{name}"},
        }
        store = curate.run(raw, store=tmp_path / "store").store
        assert store.sql("SELECT count(accuracy), count(DISTINCT step), sum(n_samples) FROM trajectories").row(0) == (
            15,
            3,
            30,
        )
        answers.append(store.sql("SELECT * EXCLUDE (run) FROM samples ORDER BY row_id, step, sample").rows())
    assert answers[0] == answers[1] and len(answers[0]) == 30  # the same training, the same answers
    with pytest.raises(UsageError, match=r"several recorded runs \(run, run-2\)"):
        curate.run({"kind": "sft", "scores": ["confidence"]}, store=tmp_path / "store")
    with pytest.raises(UsageError, match="did you mean recordings:run-2"):
        curate.run(
            {"kind": "sft", "scores": ["confidence"], "models": {"checkpoints": "recordings:run_2"}},
            store=tmp_path / "store",
        )
    with pytest.raises(UsageError, match="loss_gradient, which was not recorded|needs loss_gradient"):
        curate.run({**raw, "scores": ["grand"]}, store=tmp_path / "store")


def test_a_resumed_training_goes_on_with_the_settings_of_its_run(base, examples, tmp_path):
    """From step 2 on: other tokens or another tokenizer would be another model's numbers in one series; another name, or the old settings, go on."""
    from transformers import AutoTokenizer

    def resumed(name="run", *, tokenizer=None, run=None, **over):
        recorder = curate.Recorder(
            recipe("sft", examples, tmp_path / "store", **over), every=2, run=run, progress=QUIET
        )
        trainer = trainer_of("sft", base, examples, tmp_path / name, [recorder])
        trainer.processing_class = tokenizer or trainer.processing_class
        trainer.callback_handler.processing_class = trainer.processing_class
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
        return recorder

    first = curate.Recorder(recipe("sft", examples, tmp_path / "store"), every=2, progress=QUIET)
    trainer_of("sft", base, examples, tmp_path / "run", [first], max_steps=2).train()
    assert first.recorded == [0, 2]
    with pytest.raises(
        UsageError, match=r"run run in .* was recorded with max_length 64, and it is 32 now.*Recorder\(…, run='…'\)"
    ):
        resumed(tokens={"max_length": 32})
    with pytest.raises(UsageError, match="with truncation 'keep_start', and it is 'drop' now"):
        resumed(tokens={"max_length": 64, "truncation": "drop"})
    other = AutoTokenizer.from_pretrained(base)
    other.add_tokens(["1 + "])
    with pytest.raises(UsageError, match="was recorded of another tokenizer"):
        resumed(tokenizer=other)
    assert resumed(tokens={"max_length": 32}, run="short").recorded == [4]
    assert resumed().recorded == [4]
    found = curate.run(recipe("sft", examples, tmp_path / "store", models={"checkpoints": "recordings:run"})).store
    assert found.sql("SELECT DISTINCT step FROM trajectories ORDER BY 1")["step"].to_list() == [0, 2, 4]
    assert found.sql("SELECT outcome FROM runs WHERE command = 'record'")["outcome"].to_list() == ["done"] * 3


CRASHING = """
import os, signal, sys
import curate
from pathlib import Path
from transformers import TrainerCallback
from tests.test_recorder import recipe, trainer_of
from tests import forked

class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

base, data, out = map(Path, sys.argv[1:])
recorder = curate.Recorder(recipe("sft", data, out / "store"), every=1)
trainer_of("sft", base, data, out / "run", [Crash(), recorder], save_strategy="no").train()
"""


def test_a_training_that_is_killed_loses_one_recording_at_most(base, examples, tmp_path):
    """Killed at the end of step 3, before the recorder's turn: steps 0, 1 and 2 are there for the next command."""
    done = forked.run(CRASHING, base, examples, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [run["outcome"] for run in curate.Store(tmp_path / "store").status()["runs"]] == ["killed"]  # not running
    found = curate.run(recipe("sft", examples, tmp_path / "store"))
    assert found.store.sql("SELECT DISTINCT step FROM trajectories ORDER BY 1")["step"].to_list() == [0, 1, 2]
    assert found.store.sql("SELECT count(confidence) FROM scored").item() == 12
    assert found.store.sql("SELECT outcome FROM runs WHERE command = 'record'").item() == "killed"


def test_mixed_precision_records_what_a_checkpoint_would_say(base, examples, tmp_path):
    """bf16 autocast wraps the model's forward; the master weights are measured, without it."""
    recorder = curate.Recorder(recipe("sft", examples, tmp_path / "store"), every=2, progress=QUIET)
    trainer_of("sft", base, examples, tmp_path / "run", [recorder], bf16=True, max_steps=2).train()
    found = curate.run(recipe("sft", examples, tmp_path / "store"))
    expected = curate.run(
        recipe("sft", examples, tmp_path / "other", models={"checkpoints": [str(tmp_path / "run/checkpoint-2")]})
    )
    ours, theirs = (
        r.store.sql("SELECT target_nll FROM scored ORDER BY row_id")["target_nll"].to_numpy() for r in (found, expected)
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


def test_what_fails_later_is_said_and_the_training_goes_on(base, examples, tmp_path, monkeypatch, capsys):
    recorder = curate.Recorder(recipe("sft", examples, tmp_path / "store"), every=1)
    trainer = trainer_of("sft", base, examples, tmp_path / "run", [recorder], save_strategy="no", max_steps=2)
    from curate.passes import forward

    whole, calls = forward.measure, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return whole(*args, **kwargs)

    monkeypatch.setattr(forward, "measure", failing)
    trainer.train()
    assert trainer.state.global_step == 2 and recorder.recorded == [0, 2] and len(recorder.failed) == 1
    said = capsys.readouterr().err
    assert "nothing recorded at step 1: [Errno 28] No space left" in said and "2 recordings of 12 rows took" in said


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"every": 0}, "expected steps"),
        ({"every": 1.5}, "share of the training"),
        ({"scores": ["grand"]}, "backward pass, which is measured on saved checkpoints"),
        ({"scores": ["neighbour_excess"]}, "needs a neighbours pass"),
        ({"scores": ["target_nl"]}, "did you mean 'target_nll'"),
        ({"rows": []}, "expected a recipe, data, a datasets.Dataset, or rows .* found nothing"),
        ({"rows": {"kind": "sft", "source": "x.jsonl", "scores": ["target_nll"]}, "samples": 2}, "stand in the recipe"),
        ({"rows": {"kind": "preference", "source": "x.jsonl", "scores": ["implicit_reward_gap"]}}, "one model, the one in training"),
        ({"rows": {"kind": "preference", "source": "x.jsonl", "scores": ["edit_distance"]}}, "nothing to record"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_the_training(examples, arguments, says):
    with pytest.raises(UsageError, match=says):
        curate.Recorder(**{"rows": str(examples), **arguments})


def test_a_dataset_that_is_trained_on_is_recorded_and_scored_without_a_recipe(base, examples, tmp_path, capsys):
    """TRL's own input as it is, in memory; scores of what it recorded, equal to those of the same rows in a file."""
    from datasets import Dataset, DatasetDict

    lines = [json.loads(line) | {"topic": f"t{i % 2}"} for i, line in enumerate(examples.read_text().splitlines())]
    rows = Dataset.from_list(lines)
    with pytest.raises(UsageError, match="DatasetDict of train: take one of them"):
        curate.Recorder(DatasetDict({"train": rows}))
    recorder = curate.Recorder(rows, every=2, store=tmp_path / "memory")
    with pytest.raises(UsageError, match="nothing is recorded yet"):
        recorder.recipe  # noqa: B018
    of_file = curate.Recorder(str(examples), every=2, store=tmp_path / "file", progress=QUIET)
    trainer_of("sft", base, examples, tmp_path / "run", [recorder, of_file]).train()
    assert capsys.readouterr().err.rstrip().endswith("Scores: curate.run(recorder.recipe)")
    query = "SELECT row_id, target_nll, confidence, variability FROM scored ORDER BY row_id"
    found, same = (curate.run(r.recipe).store.sql(query).rows() for r in (recorder, of_file))
    assert len(found) == 12 and found == same and all(0 < c < 1 for _, _, c, _ in found)
    assert curate.Store(tmp_path / "memory").sql("SELECT DISTINCT topic FROM scored ORDER BY 1")["topic"].to_list() == [
        "t0",
        "t1",
    ]


def test_a_recipe_with_a_reference_is_told_how_its_recording_is_scored(base, pairs, tmp_path, capsys):
    """The command that is printed works, and so does the way that the error of a plain run names."""
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe("preference", pairs, tmp_path / "store", models={"reference": str(base)})))
    trainer_of("preference", base, pairs, tmp_path / "dpo", [curate.Recorder(path, every=2)]).train()
    told = capsys.readouterr().err.rstrip().splitlines()[-1]
    settings = "--set models.checkpoints=recordings:dpo --set models.reference=null"
    assert told.endswith(f"curate score {path} {settings}")
    with pytest.raises(UsageError, match=f"Or take what was recorded: `{settings}`"):
        curate.run(path)
    given = settings.replace("--set ", "").split()
    assert curate.run(path, set=given).store.sql("SELECT count(flipped) AS n FROM scored")["n"][0] == len(
        pairs.read_text().splitlines()
    )


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def test_adapters_that_cannot_be_recorded_are_refused(base, untied):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    from curate.errors import ModelError
    from curate.passes.forward import Model
    from curate.passes.loading.live import measurable, untouched

    model = get_peft_model(load(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UsageError, match="prompt tuning"):
        measurable(model)
    dora = LoraConfig(target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    with (
        pytest.raises(ModelError, match="DoRA on the LM head .* Leave lm_head out of target_modules"),
        untouched(get_peft_model(load(untied), dora)) as module,
    ):
        Model(module)


@pytest.fixture
def group():
    """A process group of this process alone, on the CPU."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


def fsdp2(model):
    """As accelerate prepares it, from the plugin that `--fsdp_version 2` makes; on one process without an accelerator."""
    from types import SimpleNamespace

    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    wraps = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **wraps)
    state = SimpleNamespace(fsdp_plugin=plugin)
    here = SimpleNamespace(state=state, mixed_precision="no", is_main_process=True, device="cpu")
    return fsdp2_prepare_model(here, model)


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id="cpu", use_orig_params=True)


def zero3(model):
    """As DeepSpeed's zero.Init leaves parameters between uses: an id, the whole's shape, no values. (DeepSpeed itself is not needed for it.)"""
    import torch

    for at, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = at, parameter.shape
        parameter.data = torch.empty(0)
    return model


@pytest.mark.parametrize("shard", [fsdp1, fsdp2, zero3])
def test_sharded_models_are_refused_before_anything_is_written(base, examples, tmp_path, group, shard):
    """Through the trainer's own call, with its arguments and its state."""
    from transformers import AutoTokenizer, TrainerControl, TrainerState, TrainingArguments

    recorder = curate.Recorder(str(examples), store=tmp_path / "store", progress=QUIET)
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    state = TrainerState(max_steps=4, is_world_process_zero=True)
    given = {"model": shard(load(base)), "processing_class": AutoTokenizer.from_pretrained(base)}
    with pytest.raises(UsageError, match=r"sharded over processes \(FSDP or ZeRO-3\).*models.checkpoints"):
        recorder.on_train_begin(args, state, TrainerControl(), **given)
    assert not (tmp_path / "store").exists()
    elsewhere = TrainerState(max_steps=4, is_world_process_zero=False)
    recorder.on_train_begin(args, elsewhere, TrainerControl(), **given)  # of several processes only the first records
    recorder.on_step_end(args, elsewhere, TrainerControl())
    assert recorder.recorded == [] and not (tmp_path / "store").exists()


def test_data_parallel_models_are_unwrapped(base, group):
    from torch.nn.parallel import DistributedDataParallel

    from curate.passes.loading.live import measurable

    model = load(base)
    assert measurable(DistributedDataParallel(model)) is model
