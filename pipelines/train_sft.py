"""The trainer that rounds use by default: TRL's SFTTrainer on prompt/completion rows, with checkpoints along the run.

    python pipelines/train_sft.py DATA.jsonl OUT --model MODEL [--epochs 3] [--rate 2e-5] [--batch 8] [--checkpoints 5] [--seed 0]

Loss on the completions alone. Needs the extra `prove` (trl). A trainer of your own takes its place with `--train "… {data} {out}"`: all
that is asked of it are folders checkpoint-<step>/ in OUT, an early one among them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path


def train(
    data: Path, out: Path, *, model: str, epochs: float, rate: float, batch: int, checkpoints: int, seed: int
) -> None:
    """Train, and write `checkpoints` evenly spaced checkpoints with their tokenizer to `out`; the last one is the trained model."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows = Dataset.from_list([{"prompt": line["prompt"], "completion": line["completion"]} for line in lines])
    steps = max(1, math.ceil(epochs * math.ceil(len(rows) / batch)))
    settings = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 10),
        per_device_train_batch_size=batch,
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps / checkpoints)),
        save_only_model=True,
        logging_steps=max(1, steps // 20),
        report_to="none",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # TRL's default is True, also on a CPU
        seed=seed,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False),
        args=settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model, trust_remote_code=False),
    )
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="the model to start from: a folder or hub id")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    train(**vars(asked))


if __name__ == "__main__":
    main()
