"""Our log-probabilities are TRL's: DPOTrainer's own preparation, collation and compute_ref_log_probs on real rows, EOS included."""

from __future__ import annotations

import numpy as np
import pytest

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import Limits, encode
from curate.rows import Pair


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_pairs_equal_trl(shared, tmp_path, truncation):
    pytest.importorskip("trl")
    import pyarrow.parquet as parquet

    folder = str(shared / "models" / "stories260K")
    table = parquet.read_table(shared / "data" / "hh_rlhf_harmless" / "pairs.parquet").slice(0, 48).to_pylist()
    table = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in table]
    limits = Limits(256, truncation)
    tokenizer, model = load_tokenizer(folder), forward.load_model(folder)
    encoded = [encode(Pair(**row), tokenizer, limits) for row in table]
    kept = [i for i, pair in enumerate(encoded) if pair.problem is None]
    assert any(encoded[i].truncated for i in kept)
    trainer = trl_trainer(folder, table, tokenizer, tmp_path, truncation)
    # keep_start: TRL leaves out the rows whose prompt fills max_length, exactly those that have a problem here
    assert len(trainer.train_dataset) == len(kept)
    found = forward.measure(model, encoded, [MEASUREMENTS["likelihood"]])
    for side in ("chosen", "rejected"):
        theirs = np.asarray(trainer.train_dataset[f"ref_{side}_logps"][:])
        np.testing.assert_allclose(found[f"{side}_logp"][kept], theirs, rtol=1e-5)


def test_conversations_equal_trl(shared, tmp_path):
    """A template that closes its turns: the very ids of TRL, and its log-probabilities."""
    pytest.importorskip("trl")
    folder = str(shared / "models" / "stories260K")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Tell me of Lily and her {thing}."}],
            "chosen": [{"role": "assistant", "content": f"Once upon a time, Lily had a {thing}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for thing in ("ball", "cat", "red car")
    ]
    tokenizer, model = load_tokenizer(folder), forward.load_model(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    trainer = trl_trainer(folder, rows, tokenizer, tmp_path, "keep_start")
    encoded = [encode(Pair(*(tuple(row[k]) for k in ("prompt", "chosen", "rejected"))), tokenizer) for row in rows]
    found = forward.measure(model, encoded, [MEASUREMENTS["likelihood"]])
    for i, theirs in enumerate(trainer.train_dataset):
        for name, side in (("chosen", encoded[i].chosen), ("rejected", encoded[i].rejected)):
            assert side.ids.tolist() == theirs["prompt_ids"] + theirs[f"{name}_ids"]
            assert side.start == len(theirs["prompt_ids"])
            np.testing.assert_allclose(found[f"{name}_logp"][i], theirs[f"ref_{name}_logps"], rtol=1e-5)


def trl_trainer(folder, rows, tokenizer, tmp_path, truncation):
    """A DPOTrainer that has computed its reference log-probs on the CPU."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(tmp_path),
        max_length=256,
        truncation_mode=truncation,
        use_cpu=True,
        bf16=False,
        report_to="none",
        dataloader_pin_memory=False,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=8,
        disable_tqdm=True,
    )
    return DPOTrainer(folder, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
