"""Kronfluence's identity strategy over the rows of benchmarks/influence.py, in an environment of its own: torch, transformers, kronfluence.

    PYTHON kronfluence_identity.py FOLDER        FOLDER: model/ and rows.npz; a line on stdin runs it once, a line on stdout gives its CPU seconds

Rows are padded on the right in batches of BATCH of like length; losses are summed over the response. Linear layers alone, the head included.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from transformers import AutoModelForCausalLM

BATCH = 8
IGNORED = -100


class SummedLoss(Task):
    """−Σ log π(y) over the response, of rows and of targets."""

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logits, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch):
        return batch["attention_mask"]


def padded(ids: np.ndarray, lengths: np.ndarray, starts: np.ndarray) -> list[dict[str, torch.Tensor]]:
    """One dictionary a row; ids is all rows' tokens, one after the other."""
    rows, at, longest = [], 0, int(lengths.max())
    for n, start in zip(lengths.tolist(), starts.tolist()):
        row = {"input_ids": torch.zeros(longest, dtype=torch.long), "labels": torch.full((longest,), IGNORED)}
        row["attention_mask"] = torch.zeros(longest, dtype=torch.long)
        row["input_ids"][:n] = torch.from_numpy(ids[at : at + n].astype(np.int64))
        row["labels"][start:n] = row["input_ids"][start:n]
        row["attention_mask"][:n] = 1
        rows.append(row)
        at += n
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    longest = max(int(row["attention_mask"].sum()) for row in rows)
    return {name: torch.stack([row[name][:longest] for row in rows]) for name in rows[0]}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rows = np.load(folder / "rows.npz")
    sets = [padded(*(rows[f"{kind}_{name}"] for name in ("ids", "lengths", "starts"))) for kind in ("train", "targets")]
    orders = [sorted(range(len(some)), key=lambda i, some=some: int(some[i]["attention_mask"].sum())) for some in sets]
    train, targets = ([some[i] for i in order] for some, order in zip(sets, orders))
    model = prepare_model(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), SummedLoss())
    with tempfile.TemporaryDirectory() as out:
        analyzer = Analyzer("influence", model, SummedLoss(), cpu=True, output_dir=out, disable_tqdm=True)
        from kronfluence.utils.dataset import DataLoaderKwargs

        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
        analyzer.fit_all_factors("identity", train, factor_args=FactorArguments(strategy="identity"))
        out_stream = sys.stdout
        for number, _ in enumerate(sys.stdin):
            start = time.process_time()
            analyzer.compute_pairwise_scores(
                f"scores{number}", "identity", targets, train, per_device_query_batch_size=BATCH,
                per_device_train_batch_size=BATCH, score_args=ScoreArguments(), overwrite_output_dir=True,
            )  # fmt: skip
            took = time.process_time() - start
            scores = analyzer.load_pairwise_scores(f"scores{number}")["all_modules"].double().numpy()  # (M, N)
            back = np.zeros_like(scores)
            back[np.ix_(*orders[::-1])] = scores
            np.save(folder / "scores.npy", back.T)
            print(f"seconds {took}", file=out_stream, flush=True)


if __name__ == "__main__":
    main()
