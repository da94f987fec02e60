"""What the scores of preference pairs are worth: real DPO runs with TRL, then the AUC of every score at telling what happened.

    python benchmarks/after_dpo.py                        two datasets, three seeds: about half an hour on one core
    python benchmarks/after_dpo.py --epochs 1             the same, stopped after one epoch
    python benchmarks/after_dpo.py --data hh --seeds 1    one run

Needs ../shared (models/stories260K, data/hh_rlhf_harmless, data/gsm8k). Every run: pairs shuffled and halved by its seed, TRL's DPOTrainer (AdamW) on
the first half from the reference; all scores are taken at the reference, from the training half, before the run.

    falls    among pairs whose margin grew, those whose chosen log-probability fell        AUC: does a score rank them first?
    flips    among pairs that the reference ranks wrong, those that the run turned round

AUC .5 is chance; 1 is perfect. "in quintiles": the mean AUC within fifths of equal length of the chosen response, so that length cannot be what a
score knows. Mean over seeds, with the smallest and the largest. A result is appended to --out (after_dpo.jsonl beside this file) as a line of JSON,
and a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.gradients import backward
from curate.passes.gradients.derivatives import Line, choose_epsilon, derivatives, head_derivatives
from curate.passes.gradients.mean import accumulate, accumulate_head, dpo_weights, fixed_weights, precondition
from curate.passes.gradients.warmup import WarmUp, warm_up
from curate.passes.loading.model import load_model
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import EncodedPair, Limits, encode
from curate.rows import Pair
from curate.scores import SCORES

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "stories260K"
DATA = {"hh": "hh_rlhf_harmless/pairs.parquet", "gsm8k": "gsm8k/correct_vs_wrong_pairs.parquet"}
BETA, RATE, BATCH = 0.1, 1e-4, 16
MAX_LENGTH = 512
ROWS = 440  # both halves together
WARM_UP = WarmUp(steps=12, rows=16, learning_rate=RATE, beta=BETA)


def read_pairs(data: str, seed: int) -> tuple[list[Pair], list[EncodedPair]]:
    """Pairs that fit whole, one a prompt, shuffled by the seed."""
    import polars as pl

    frame = pl.read_parquet(SHARED / "data" / DATA[data]).unique("prompt", keep="first", maintain_order=True)
    pairs = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in frame.iter_rows(named=True)]
    tokenizer = load_tokenizer(MODEL)
    encoded = [encode(pair, tokenizer, Limits(MAX_LENGTH, "drop")) for pair in pairs]
    fit = [i for i, e in enumerate(encoded) if e.problem is None and not e.truncated]
    order = np.random.default_rng(seed).permutation(fit)[:ROWS]
    return [pairs[i] for i in order], [encoded[i] for i in order]


def train(pairs: list[Pair], seed: int, epochs: int, folder: Path) -> None:
    """TRL's DPOTrainer on the pairs; the trained model goes to `folder`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    args = DPOConfig(
        output_dir=str(folder / "run"), use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no", per_device_train_batch_size=BATCH,
        num_train_epochs=epochs, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, beta=BETA,
        max_length=MAX_LENGTH, seed=seed,
    )  # fmt: skip
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.model.save_pretrained(folder)


def log_probabilities(encoded: list[EncodedPair], path: Path) -> np.ndarray:
    """(rows, 2)"""
    found = forward.measure(load_model(path, dtype="float32"), encoded, [MEASUREMENTS["likelihood"]])
    return np.stack([found["chosen_logp"], found["rejected_logp"]], 1)


def signals(encoded: list[EncodedPair], n_train: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores at the reference, high where a chosen response is expected to fall; and those that tell flips, high where a pair is expected to flip."""
    model = load_model(MODEL, dtype="float32")
    names = ("likelihood", "entk", "hidden", "head_products", "valley_depth")
    columns: dict[str, np.ndarray] = dict(backward.measure(model, encoded, [MEASUREMENTS[n] for n in names]))
    tokens = [MEASUREMENTS[n] for n in ("length",)]
    from curate.measurements import measure_tokens

    columns |= measure_tokens(encoded, tokens)

    def score(name: str, **params: Any) -> np.ndarray:
        return SCORES[name].compute(
            {need: columns[need] for need in SCORES[name].needs}, params=SCORES[name].check(params)
        )

    half = encoded[:n_train]
    step = accumulate(model, half, dpo_weights(BETA, n_train))
    mean_chosen = accumulate(model, half, fixed_weights(1 / n_train, 0))
    warmed = load_model(MODEL, dtype="float32")
    moments = warm_up(warmed, half, WARM_UP)
    falls: dict[str, np.ndarray] = {}
    margin: dict[str, np.ndarray] = {}
    for kind in ("sign", "adam", "sgd"):
        along = rows_along(model, encoded, precondition(step, kind, step, moments))
        falls[f"batch forecast, {kind}"] = -along[:, 0]
        margin[kind] = along[:, 0] - along[:, 1]
    head = accumulate_head(model, half, dpo_weights(BETA, n_train))
    for kind in ("sign", "sgd"):
        falls[f"head forecast, {kind}"] = -head_derivatives(model, encoded, precondition(head, kind, head))[:, 0]
    # s_j⟨P·ḡ+, g+_j − g−_j⟩: low where training on the pair lowers the others' chosen responses
    along = rows_along(model, encoded, precondition(mean_chosen, "sign", step))
    falls["contribution, at the reference"] = -(along[:, 0] - along[:, 1])
    warm_step = accumulate(
        warmed, half, dpo_weights(BETA, n_train, np.stack([columns["chosen_logp"], columns["rejected_logp"]], 1))
    )
    warm_mean = accumulate(warmed, half, fixed_weights(1 / n_train, 0))
    along = rows_along(warmed, encoded, precondition(warm_mean, "sign", warm_step))
    falls["contribution, after a warm-up"] = -(along[:, 0] - along[:, 1])
    falls["displacement share"] = -score("displacement_share")
    falls["head displacement"] = score("head_displacement")
    falls["ches"] = score("ches")
    falls["ches_ln"] = score("ches_ln")
    falls["valley depth"] = score("valley_depth")
    falls["edit distance (low)"] = -score("edit_distance")
    falls["length of chosen"] = columns["chosen_tokens"]
    falls["random"] = np.random.default_rng(seed).random(len(encoded))
    c = score("ranking_gap")
    flips = {
        "small c": -c,
        "steps to flip": -score("steps_to_flip"),
        "c over margin forecast, sign": -c / np.maximum(margin["sign"], 1e-12),
        "c over margin forecast, adam": -c / np.maximum(margin["adam"], 1e-12),
        "low flip cost": -score("flip_cost"),
        "flip loss": score("flip_loss", beta=BETA),
        "edit distance (high)": score("edit_distance"),
        "random": falls["random"],
    }
    return falls, flips


def rows_along(model: Any, encoded: list[EncodedPair], v: dict[str, torch.Tensor]) -> np.ndarray:
    """(rows, 2)"""
    with Line(model, v) as line:
        return derivatives(line, encoded, choose_epsilon(line, encoded).value).derivative


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive row scores above a negative one, ties half (Mann-Whitney); NaN without both."""
    known = np.isfinite(score)
    high, low = score[known & positive], score[known & ~positive]
    if not len(high) or not len(low):
        return float("nan")
    return float((np.sign(high[:, None] - low[None]).mean() + 1) / 2)


def in_quintiles(score: np.ndarray, positive: np.ndarray, length: np.ndarray) -> float:
    """Mean AUC within fifths of `length`, of those that hold both kinds."""
    parts = np.array_split(np.argsort(length, kind="stable"), 5)
    found = [auc(score[part], positive[part]) for part in parts]
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def one_run(data: str, seed: int, epochs: int) -> dict[str, Any]:
    pairs, encoded = read_pairs(data, seed)
    n_train = len(pairs) // 2
    falls, flips = signals(encoded, n_train, seed)
    with tempfile.TemporaryDirectory() as folder:
        train(pairs[:n_train], seed, epochs, Path(folder))
        before, after = log_probabilities(encoded, MODEL), log_probabilities(encoded, Path(folder))
    moved = after - before
    margin = moved[:, 0] - moved[:, 1]
    length = np.array([e.chosen.n_response for e in encoded])
    result: dict[str, Any] = {"data": data, "seed": seed, "settings": settings(epochs)}
    for name, part in (("train", slice(0, n_train)), ("heldout", slice(n_train, None))):
        grew = margin[part] > 0
        fell = (moved[part, 0] < 0)[grew]
        wrong = before[part, 0] < before[part, 1]
        flipped = (after[part, 0] >= after[part, 1])[wrong]
        c = (before[part, 1] - before[part, 0])[wrong]
        shallow = c <= np.median(c)
        result[name] = {
            "rows": len(grew),
            "chosen": float(moved[part, 0].mean()),
            "margin": float(margin[part].mean()),
            "grew": float(grew.mean()),
            "fell": float(fell.mean()),
            "wrong": int(wrong.sum()),
            "flipped": float(flipped.mean()),
            "falls": {k: auc(v[part][grew], fell) for k, v in falls.items()},
            "falls in quintiles": {k: in_quintiles(v[part][grew], fell, length[part][grew]) for k, v in falls.items()},
            "flips": {k: auc(v[part][wrong], flipped) for k, v in flips.items()},
            "flips, shallow": {k: auc(v[part][wrong][shallow], flipped[shallow]) for k, v in flips.items()},
        }
    return result


def settings(epochs: int) -> dict[str, Any]:
    import trl

    return {
        "beta": BETA,
        "rate": RATE,
        "epochs": epochs,
        "batch": BATCH,
        "rows": ROWS,
        "warm_up": WARM_UP.steps,
        "trl": trl.__version__,
    }


def mean(values: list[float]) -> str:
    known = [v for v in values if np.isfinite(v)]
    if not known:
        return "-"
    shown = f"{np.mean(known):.2f}".lstrip("0")
    return shown if len(known) == 1 else f"{shown} ({min(known):.2f}–{max(known):.2f})".replace("0.", ".")


def table(results: list[dict[str, Any]], data: str) -> str:
    mine = [r for r in results if r["data"] == data]
    rows, epochs = [mine[0][part]["rows"] for part in ("train", "heldout")], mine[0]["settings"]["epochs"]
    lines = [f"**{data}**, {len(mine)} seeds, {epochs} epochs, {rows[0]} + {rows[1]} pairs a run"]
    for part in ("train", "heldout"):
        found = [r[part] for r in mine]
        chosen, margin, grew, fell, flipped, wrong = (
            np.mean([f[key] for f in found]) for key in ("chosen", "margin", "grew", "fell", "flipped", "wrong")
        )
        lines.append(
            f"\n{part}: chosen {chosen:+.2f} nats, margin {margin:+.2f}; the margin grew on {grew:.0%} of the pairs, on {fell:.0%} of these the "
            f"chosen response fell; {flipped:.0%} of {wrong:.0f} wrong pairs flipped"
        )
    keys = (("falls", "chosen falls"), ("falls in quintiles", "in quintiles"))
    for kinds in (keys, (("flips", "wrong pairs that flip"), ("flips, shallow", "shallow ones"))):
        head = ["AUC", *(f"{title}, {part}" for part in ("training", "held out") for _, title in kinds)]
        lines += ["", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        names = mine[0]["train"][kinds[0][0]]
        for name in names:
            cells = [mean([r[part][key][name] for r in mine]) for part in ("train", "heldout") for key, _ in kinds]
            lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    asked = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit(f"{MODEL} is not there: this benchmark needs the shared models and data beside the checkout.")
    torch.set_num_threads(1)
    known = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    results = [r for r in known if r["settings"] == settings(asked.epochs)]
    for seed in range(asked.seeds):
        for data in asked.data:
            if not any((r["data"], r["seed"]) == (data, seed) for r in results):
                results.append(one_run(data, seed, asked.epochs))
                with asked.out.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                print(f"{data}, seed {seed}: done", file=sys.stderr)
    for data in asked.data:
        print(table([r for r in results if r["seed"] < asked.seeds], data), end="\n\n")


if __name__ == "__main__":
    main()
