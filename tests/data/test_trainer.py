"""trainer_args.json: arguments that the installed TRL takes, and what is left out is said."""

from __future__ import annotations

import json

import pytest

from curate.data import ExportRow, TrainedAs, export, trainer
from curate.rows import Example, Pair


def settings(folder):
    return json.loads((folder / "trainer_args.json").read_text())


def exported(to, row, **options):
    export(to, [ExportRow(row, row.row_id)], **options)
    return to


def test_trl_takes_them(tmp_path):
    trl = pytest.importorskip("trl")
    trained = TrainedAs(96, "keep_start", 0.3, squeezing=True)
    dpo = settings(exported(tmp_path / "pairs", Pair("p", " a", " b"), trainer=trained))
    config = trl.DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **dpo)
    assert (config.beta, config.max_length, config.truncation_mode) == (0.3, 96, "keep_start")
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 1.0])
    sft = settings(exported(tmp_path / "both", Pair("p", " a", " b"), format="extend", trainer=trained))
    assert sft == {"max_length": 96, "truncation_mode": "keep_start"}
    assert trl.SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **sft).max_length == 96


def test_without_signs_of_squeezing_the_loss_is_left_alone(tmp_path):
    found = settings(exported(tmp_path / "out", Pair("p", " a", " b"), trainer=TrainedAs(None, "drop", 0.1)))
    assert found == {"max_length": None, "beta": 0.1}


def test_an_argument_that_trl_does_not_have_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "fields_of", lambda config: {"beta", "max_length"})
    folder = exported(tmp_path / "out", Pair("p", " a", " b"), trainer=TrainedAs(96, "drop", 0.3, squeezing=True))
    assert settings(folder) == {"max_length": 96, "beta": 0.3}
    assert "has no argument loss_type, loss_weights" in (folder / "README.md").read_text()


def test_without_trl_it_is_written_for_the_version_we_know(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None)
    folder = exported(tmp_path / "out", Pair("p", " a", " b"), trainer=TrainedAs(96, "drop", squeezing=True))
    assert settings(folder)["loss_type"] == ["sigmoid", "sft"]
    assert "TRL is not installed" in (folder / "README.md").read_text()


def test_no_settings_for_what_neither_trainer_takes(tmp_path):
    folder = exported(tmp_path / "out", Example("p", None, answer="5"), trainer=TrainedAs(96, "drop"))
    assert not (folder / "trainer_args.json").exists()


def test_conversations_train_more_than_their_last_reply_and_that_is_said(tmp_path):
    """TRL trains all tokens of `messages`; all assistant turns alone where those were measured."""
    row = Example(({"role": "user", "content": "a"},), ({"role": "assistant", "content": "b"},))
    last = exported(tmp_path / "last", row, format="messages", trainer=TrainedAs(96, "drop"))
    assert settings(last) == {"max_length": 96} and "trains every token" in (last / "README.md").read_text()
    every = exported(tmp_path / "all", row, format="messages", trainer=TrainedAs(96, "drop", turns="all"))
    assert settings(every) == {"max_length": 96, "assistant_only_loss": True}
    assert "trains as it was measured" in " ".join((every / "README.md").read_text().split())
