"""What an export holds beside its texts, used by TRL: order of rows, reference log-probabilities, weights; KTO and GRPO. Tiny models, one run."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import numpy as np
import pytest

import curate
from curate.errors import UsageError, ValidationError
from curate.recipe.load import load_recipe
from tests.tiny_models import make_llama

pytest.importorskip("trl")
WORDS = ["ada", "bea", "cy", "dot", "eve", "fay"]
RECIPE = """
kind: preference
source: pairs.jsonl
models: {reference: reference, policy: policy}
tokens: {max_length: 48}
scores: [ranking_gap, implicit_reward_gap]
select: {order_by: level desc}
export: {to: out, columns: scores, order: order_by, reference_logps: true, weight: w}
"""
STALE = {
    "chosen_logp": -1,
    "rejected_logp": -2,
    "reference_score_chosen": -8,
}  # columns of the user's, measured elsewhere
SETTINGS = {
    "per_device_train_batch_size": 2, "learning_rate": 0.0, "num_train_epochs": 1, "logging_steps": 1, "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "dataloader_pin_memory": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    rows = [
        {
            "prompt": f"say {word}: ",
            "chosen": f"{word} {word}",
            "rejected": "no " + "x" * i,
            "level": i * 5 % 7,
            "w": [1, 0, 2.5, 0.5, 3, 1][i],
            **STALE,
        }
        for i, word in enumerate(WORDS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    make_llama(folder / "reference", seed=1)
    make_llama(folder / "policy", seed=2)
    curate.run(folder / "recipe.yaml")
    return folder / "out"


@pytest.fixture(scope="module")
def mixins(exported):
    """The file beside the export, as somebody without curate has it."""
    sys.path.insert(0, str(exported))
    try:
        return import_module("trl_trainers")
    finally:
        sys.path.remove(str(exported))


def rows_of(exported):
    import datasets

    return datasets.load_from_disk(str(exported))["train"]


def dpo(exported, trainer, **more):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    args = json.loads((exported / "trainer_args.json").read_text()) | SETTINGS | more
    ref_model = None
    if not args["precompute_ref_log_probs"]:
        ref_model = AutoModelForCausalLM.from_pretrained(exported.parent / "reference", dtype="float32")
    return trainer(
        AutoModelForCausalLM.from_pretrained(exported.parent / "policy", dtype="float32"),
        ref_model=ref_model,
        args=DPOConfig(output_dir=str(exported.parent / "run"), **args),
        train_dataset=rows_of(exported),
        processing_class=AutoTokenizer.from_pretrained(exported.parent / "policy"),
    )


def losses(trainer):
    trainer.train()
    return np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_the_order_of_the_export_is_the_order_of_training(exported):
    from trl import DPOTrainer

    levels = rows_of(exported)["level"]
    assert list(levels) == sorted(levels, reverse=True) and len(set(levels)) == 6
    trainer = dpo(exported, DPOTrainer, precompute_ref_log_probs=False)
    seen = [ids for batch in trainer.get_train_dataloader() for ids in batch["input_ids"][:2].tolist()]
    tokenizer = trainer.processing_class
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in seen]
    assert texts == [row["prompt"] + row["chosen"] for row in rows_of(exported)]
    assert json.loads((exported / "trainer_args.json").read_text())["train_sampling_strategy"] == "sequential"


def test_the_references_log_probabilities_are_taken_from_the_export(exported, mixins, monkeypatch):
    from trl import DPOTrainer

    class Given(mixins.GivenReference, DPOTrainer):
        pass

    computed = losses(dpo(exported, DPOTrainer, precompute_ref_log_probs=False))

    def reference_pass(*_, **__):
        raise AssertionError("the reference was run")

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", reference_pass)
    trainer = dpo(exported, Given)
    assert trainer.ref_model is None
    given = losses(trainer)
    np.testing.assert_allclose(given, computed, rtol=1e-5)
    assert np.ptp(given) > 1e-4  # not all ln 2: policy and reference differ
    row = rows_of(exported)[0]
    assert (row["reference_score_chosen"], row["reference_score_rejected"]) == (
        row["ref_chosen_logps"],
        row["ref_rejected_logps"],
    )
    assert "chosen_logp" not in row  # it was not asked for under its own name


def test_dpo_weighs_rows_by_the_exports_weights(exported, mixins):
    """Over the rows, the mean loss is Σ w·loss / Σ w, each row's loss by curate's own implicit reward gap."""
    from trl import DPOTrainer

    class Weighted(mixins.WeightedRows, mixins.GivenReference, DPOTrainer):
        pass

    rows = rows_of(exported)
    weight, gap = np.array(rows["weight"]), np.array(rows["implicit_reward_gap"])
    by_hand = (weight * np.logaddexp(0, -gap)).sum() / weight.sum()
    assert losses(dpo(exported, Weighted)).mean() == pytest.approx(by_hand, rel=1e-5)
    assert abs(np.logaddexp(0, -gap).mean() - by_hand) > 1e-4


def test_sft_weighs_rows_and_counts_tokens(exported, mixins):
    """Σ w·(a row's summed loss) / (mean w · all tokens), over steps of several batches."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class Weighted(mixins.WeightedRows, SFTTrainer):
        pass

    rows = rows_of(exported)
    data = datasets.Dataset.from_dict(
        {"prompt": rows["prompt"], "completion": rows["chosen"], "weight": rows["weight"]}
    )
    model = AutoModelForCausalLM.from_pretrained(exported.parent / "policy", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(exported.parent / "policy")
    config = SFTConfig(output_dir=str(exported.parent / "run"), gradient_accumulation_steps=3, **SETTINGS)
    trainer = Weighted(model, args=config, train_dataset=data, processing_class=tokenizer)
    [loss] = losses(trainer)
    total = tokens = 0.0
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        logps = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].detach()
        total -= row["weight"] * float(logps[len(prompt) - 1 :].sum())
        tokens += ids.shape[1] - len(prompt)
    assert loss == pytest.approx(total / tokens / np.mean(data["weight"]), rel=1e-4)


def test_both_ways_of_an_export_give_the_same(exported, tmp_path):
    """Row by row, as here, where the weight is a column of the user's; in tables without it."""
    curate.run(exported.parent / "recipe.yaml", set=["export.weight=null", f"export.to={tmp_path / 'tables'}"])
    tables, rows = rows_of(tmp_path / "tables").to_list(), rows_of(exported).to_list()
    assert tables == [{name: value for name, value in row.items() if name != "weight"} for row in rows]
    assert "WeightedRows" not in (tmp_path / "tables" / "README.md").read_text()
    assert "GivenReference" in (tmp_path / "tables" / "README.md").read_text()


def test_packed_rows_cannot_be_weighed(exported, mixins):
    class Trainer:
        def __init__(self):
            self.args = type("Options", (), {"packing": True})

    with pytest.raises(ValueError, match="packing=False"):
        type("Weighted", (mixins.WeightedRows, Trainer), {})()


def test_what_cannot_be_delivered_is_refused(exported, tmp_path):
    recipe = exported.parent / "recipe.yaml"
    with pytest.raises(UsageError, match="reference_logps is of pairs"):
        load_recipe(recipe, set=["export.format=extend"])
    with pytest.raises(UsageError, match="needs `select.order_by`"):
        load_recipe(recipe, set=["select=null"])
    with pytest.raises(UsageError, match="are not measured"):
        curate.run(
            recipe, set=["scores=[edit_distance]", "export.columns=none", "models.policy=null"], store=tmp_path / "s"
        )
    short = ["tokens.max_length=16", "tokens.truncation=drop", f"export.to={tmp_path / 'out'}", "select.unknown=keep"]
    with pytest.raises(ValidationError, match=r"chosen_logp of row \w+ is not known"):
        curate.run(recipe, set=short)


def test_grpo_and_kto_take_their_exports(exported, tmp_path, monkeypatch):
    """`{prompt, answer}` reaches GRPO's reward function; `{prompt, completion, label}` is KTO's; both with the settings beside the export."""
    monkeypatch.setattr(
        import_module("trl.import_utils"), "is_vllm_available", lambda *_, **__: False
    )  # its import takes seconds
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

    from curate.data import ExportRow, TrainedAs, export
    from curate.data.export import Files
    from curate.rows import Example

    trained = TrainedAs(48, "keep_start", in_order=True, sampling=(("temperature", 0.7), ("max_completion_length", 4)))
    prompts = [Example(f"say {word}: ", answer=word) for word in WORDS[:4]]
    labelled = [Example(row.prompt, row.answer, label=i % 2 == 0) for i, row in enumerate(prompts)]
    for rows, name in ((prompts, "grpo"), (labelled, "kto")):
        export(
            tmp_path / name, [ExportRow(row, row.row_id) for row in rows], trainer=trained, files=Files(in_order=True)
        )
    args = {name: json.loads((tmp_path / name / "trainer_args.json").read_text()) for name in ("grpo", "kto")}
    assert args["grpo"] == {"temperature": 0.7, "max_completion_length": 4, "shuffle_dataset": False}
    asked = []

    def reward(prompts, completions, answer, **_):
        asked.extend(zip(prompts, answer, strict=True))
        return [float(i) for i in range(len(completions))]

    tokenizer = AutoTokenizer.from_pretrained(exported.parent / "policy")
    more = {**SETTINGS, "max_steps": 1, "output_dir": str(tmp_path / "run"), "num_train_epochs": 1}
    load = lambda: AutoModelForCausalLM.from_pretrained(exported.parent / "policy", dtype="float32")  # noqa: E731
    config = GRPOConfig(num_generations=2, gradient_accumulation_steps=2, **args["grpo"], **more)
    GRPOTrainer(
        load(), reward, args=config, train_dataset=rows_of(tmp_path / "grpo"), processing_class=tokenizer
    ).train()
    assert [pair for i, pair in enumerate(asked) if i % 2 == 0] == [(row.prompt, row.answer) for row in prompts[:2]]
    trainer = KTOTrainer(
        load(),
        ref_model=load(),
        args=KTOConfig(**args["kto"], **more),
        train_dataset=rows_of(tmp_path / "kto"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 1
