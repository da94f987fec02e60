"""What recording costs a training: the demo's model and task under TRL's SFTTrainer, with and without `curate.Recorder`.

    python benchmarks/recorder.py        about five minutes on one core; --steps and --rounds make it longer

CPU time of `trainer.train()`, medians, settings interleaved, one thread. Beside each measured share the one that counting tokens predicts:

    share = recorded / (3 · trained + recorded)        tokens; a forward pass costs a third of a training step (backward: twice a forward)

trained counts the positions the trainer computes, padding included; recorded the rows' tokens times recordings. Measured is
1 - training without a Recorder / training with it. The last setting samples and grades answers as well, token by token: what that costs
depends on the batch more than on the tokens, so nothing is predicted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import curate
from curate.console import Progress, table
from curate.jobs.demo.model import BASE
from curate.jobs.demo.task import splits, write_jsonl

BATCH = 32
# rows recorded, share of the training between recordings, answers sampled for each row
SETTINGS = [(100, 0.1, 0), (500, 0.1, 0), (100, 0.1, 4)]
LONGEST = 64  # tokens of a sampled answer, at most: as in the demo


def train(data: Path, out: Path, steps: int, recorder: Any = None) -> tuple[float, int]:
    """CPU seconds of one training, and the positions it computed (padding included)."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=str(data.parent / "cache"))
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(BASE, dtype="float32"),
        args=SFTConfig(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        callbacks=[recorder] if recorder is not None else [],
    )
    positions = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal positions
        if module.training:
            positions += kwargs["input_ids"].numel()

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    started = time.process_time()
    trainer.train()
    return time.process_time() - started, positions


def recorded_tokens(recorder: curate.Recorder) -> int:
    """Tokens that the recordings' forwards took: every row's."""
    per_recording = sum(len(encoded.ids) for encoded in recorder.encoded)
    return per_recording * len(recorder.recorded)


def sampled_tokens(recorder: curate.Recorder) -> int:
    """Tokens of the answers that the recordings sampled."""
    return int(recorder.store.sql("SELECT coalesce(sum(n_tokens), 0)::BIGINT AS n FROM data.samples")["n"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="training steps of 32 rows")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[Any, list[float]] = {None: [], **{setting: [] for setting in SETTINGS}}
    recorded: dict[Any, tuple[int, int]] = {}
    trained = 0
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        data = write_jsonl(at / "train.jsonl", splits(seed=0)["train"])
        rows = curate.load(data)
        train(data, at / "warm", 2)  # imports and caches
        for turn in range(given.rounds):
            for setting in seconds:
                recorder = None
                if setting is not None:
                    n, every, samples = setting
                    store = at / f"store-{turn}-{n}-{samples}"
                    recorder = curate.Recorder(
                        rows[:n],
                        every=every,
                        samples=samples,
                        set={"sampling.max_new_tokens": LONGEST} if samples else None,
                        store=store,
                        progress=Progress(quiet=True),
                    )
                took, positions = train(data, at / "run", given.steps, recorder)
                seconds[setting].append(took)
                trained = positions
                if recorder is not None and setting not in recorded:
                    recorded[setting] = recorded_tokens(recorder), sampled_tokens(recorder)
    alone = statistics.median(seconds[None])
    lines = []
    for setting in SETTINGS:
        n, every, samples = setting
        took = statistics.median(seconds[setting])
        tokens, answers = recorded[setting]
        work = tokens / (3 * trained)
        lines.append(
            (
                f"{n} rows, every {every:.0%}" + (f", {samples} answers each" if samples else ""),
                f"{tokens:,}" + (f" + {answers:,} sampled" if samples else ""),
                "-" if samples else f"{work / (1 + work):.1%}",
                f"{1 - alone / took:.1%}",
                f"{took / alone:.2f}",
            )
        )
    print(f"training alone: {alone:.1f} s of CPU, {given.steps} steps of {BATCH} rows, {trained:,} positions\n")
    print(table(lines, head=["recorded", "tokens", "share predicted", "measured", "with / without"]))


if __name__ == "__main__":
    main()
