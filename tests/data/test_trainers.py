"""TRL's trainers take exports as they are: ten steps of DPOTrainer and SFTTrainer with a real model, extra columns and all."""

from __future__ import annotations

from itertools import islice

import pytest

from curate.data import ExportRow, export, read
from curate.rows import Example

SETTINGS = {
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "max_length": 64,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def model_and_tokenizer(shared):
    pytest.importorskip("trl")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    path = shared / "models" / "stories260K"

    def load():
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32"), tokenizer

    return load


def export_of(records, to, **options):
    """An export with user's columns, scores and weights, and columns that a trainer would take for its own."""
    more = {"ches_ln": 0.25, "unknown": None, "names": ["a"], "ref_chosen_logps": -1.0, "labels": "x", "text": "y"}
    rows = [ExportRow(record.row, record.row.row_id, record.columns | more, weight=1.0) for record in records]
    export(to, rows, [ExportRow(rows[0].row, "0", reason="an example")], **options)
    return to


def losses(trainer):
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 10
    return found


def test_dpo_trainer_takes_an_export(shared, tmp_path, model_and_tokenizer):
    import datasets
    from trl import DPOConfig, DPOTrainer

    records = islice(read(shared / "data" / "hh_rlhf_harmless" / "raw_full_dialogues.jsonl.gz").good("drop"), 20)
    folder = export_of(records, tmp_path / "out")
    model, tokenizer = model_and_tokenizer()
    trainer = DPOTrainer(
        model,
        args=DPOConfig(output_dir=str(tmp_path / "run"), **SETTINGS),
        train_dataset=datasets.load_from_disk(str(folder))["train"],
        processing_class=tokenizer,
    )
    found = losses(trainer)
    assert len(found) == 10
    assert found[0] == pytest.approx(0.6931, abs=1e-3)  # -log sigmoid(0): the policy is the reference at the first step


@pytest.mark.parametrize("format", ["trl", "messages"])
def test_sft_trainer_takes_an_export(shared, tmp_path, model_and_tokenizer, format):
    import datasets
    from trl import SFTConfig, SFTTrainer

    records = list(islice(read(shared / "data" / "gsm8k" / "train_half.parquet").good(), 20))
    assert all(isinstance(record.row, Example) and record.row.answer for record in records)
    folder = export_of(records, tmp_path / "out", format=format)
    model, tokenizer = model_and_tokenizer()
    if format == "messages":  # this model has no chat template of its own
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    trainer = SFTTrainer(
        model,
        args=SFTConfig(output_dir=str(tmp_path / "run"), **SETTINGS),
        train_dataset=datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")),
        processing_class=tokenizer,
    )
    found = losses(trainer)
    assert len(found) == 10
    assert all(0 < loss < 12 for loss in found)
