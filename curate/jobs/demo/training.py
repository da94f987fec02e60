"""Fine-tuning for the demo in plain torch: SFT with checkpoints, and DPO on preference pairs.

    SFT    AdamW 3e-3, betas (0.9, 0.98), 20 steps of warm-up, cosine to 10%, batches of 32 from length buckets, loss on the completion and EOS
    DPO    -log sigmoid(beta * margin), margin = [log pi/pi_ref](chosen) - [log pi/pi_ref](rejected)   (Rafailov et al. 2023, arXiv:2305.18290)

Tokens follow TRL's plain-text rule: one BOS, prompt and completion encoded together, EOS appended.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from curate.jobs.demo.model import BASE, load_base, save_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FRACTIONS = (0.15, 0.25, 0.4, 0.6, 1.0)  # of the steps, where a checkpoint is written
Progress = Callable[[int, int, float], None]  # (step, steps, loss)
Ids = tuple[list[int], int]  # (token ids with BOS and EOS, index of the first completion token)


def encode(prompt: str, completion: str, tokenizer: PreTrainedTokenizerFast) -> Ids:
    """Token ids of prompt + completion + EOS, and where the completion starts."""
    start = len(tokenizer(prompt)["input_ids"])
    return [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id], start


def pad(rows: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and the mask (B, T - 1) of the predictions that count. A causal model needs no mask for the padding."""
    import torch

    length = max(len(ids) for ids, _ in rows)
    batch = torch.zeros(len(rows), length, dtype=torch.long)
    counted = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    for i, (ids, start) in enumerate(rows):
        batch[i, : len(ids)] = torch.tensor(ids)
        counted[i, start - 1 : len(ids) - 1] = True
    return batch, counted


def token_logps(model: LlamaForCausalLM, rows: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every next token (B, T - 1) in nats, 0 outside the completions, and the mask of the completions."""
    import torch

    batch, counted = pad(rows)
    logp = torch.log_softmax(model(batch).logits[:, :-1].float(), dim=-1)  # (B, T - 1, V)
    picked = logp.gather(-1, batch[:, 1:, None]).squeeze(-1)  # (B, T - 1)
    return picked * counted, counted


def buckets(lengths: Sequence[int], *, batch: int, rng: random.Random) -> list[list[int]]:
    """One epoch of batches of similar length, in random order: shuffled, sorted by length within stretches of eight batches."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    stretch = 8 * batch
    batches = []
    for at in range(0, len(order), stretch):
        part = sorted(order[at : at + stretch], key=lambda i: lengths[i])
        batches += [part[i : i + batch] for i in range(0, len(part), batch)]
    rng.shuffle(batches)
    return batches


def train_sft(
    rows: Sequence[tuple[str, str]],
    out: Path,
    *,
    base: Path = BASE,
    steps: int = 400,
    batch: int = 32,
    rate: float = 3e-3,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Fine-tune the base on (prompt, completion) rows and write `out/checkpoint-<step>` at the given fractions of the steps.

    Returns the checkpoints' folders in step order, each loadable by transformers and vLLM. Same seed and thread count, same weights.
    """
    import torch

    torch.manual_seed(seed)
    rng = random.Random(f"curate-demo/sft/{seed}")
    model, tokenizer = load_base(base)
    model.train()
    encoded = [encode(prompt, completion, tokenizer) for prompt, completion in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    save_at = {max(1, round(fraction * steps)) for fraction in fractions}
    waiting: list[list[int]] = []
    checkpoints = []
    for step in range(1, steps + 1):
        waiting = waiting or buckets([len(ids) for ids, _ in encoded], batch=batch, rng=rng)
        logp, counted = token_logps(model, [encoded[i] for i in waiting.pop()])
        loss = -logp.sum() / counted.sum()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress:
            progress(step, steps, loss.item())
        if step in save_at:
            checkpoints.append(save_checkpoint(model, tokenizer, out / f"checkpoint-{step}"))
    return checkpoints


@dataclass(frozen=True)
class DpoChange:
    """Mean change over the pairs trained on, from the reference to the trained model, in nats (summed over the response, EOS included)."""

    n_pairs: int
    chosen: float
    rejected: float
    displaced: float  # share of the pairs whose chosen response became less likely

    @property
    def margin(self) -> float:
        return self.chosen - self.rejected


def sequence_logps(model: LlamaForCausalLM, rows: Sequence[Ids], *, batch: int = 64) -> torch.Tensor:
    """Summed log-probability of every completion (N,), without gradients."""
    import torch

    with torch.no_grad():
        return torch.cat([token_logps(model, rows[i : i + batch])[0].sum(1) for i in range(0, len(rows), batch)])


def train_dpo(
    pairs: Sequence[tuple[str, str, str]],
    out: Path,
    *,
    reference: Path,
    beta: float = 0.1,
    rate: float = 1e-4,
    epochs: int = 4,
    batch: int = 16,
    steps: int | None = None,
    seed: int = 0,
    measure: Sequence[tuple[str, str, str]] | None = None,
    progress: Progress | None = None,
) -> DpoChange:
    """DPO on (prompt, chosen, rejected) from `reference`; the trained model goes to `out`.

    `steps` replaces `epochs` where two sets of pairs are to be compared at equal training. The change is measured on `measure`, by default on the
    pairs trained on.
    """
    import torch

    torch.manual_seed(seed)
    rng = random.Random(f"curate-demo/dpo/{seed}")
    model, tokenizer = load_base(reference)
    model.eval()

    def sides(rows: Sequence[tuple[str, str, str]]) -> tuple[list[Ids], list[Ids]]:
        return [encode(p, c, tokenizer) for p, c, _ in rows], [encode(p, r, tokenizer) for p, _, r in rows]

    chosen, rejected = sides(pairs)
    measured = sides(measure) if measure is not None else (chosen, rejected)
    before = [sequence_logps(model, side) for side in measured]
    reference_margin = sequence_logps(model, chosen) - sequence_logps(model, rejected)  # (N,)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    steps = steps or epochs * math.ceil(len(pairs) / batch)
    waiting: list[list[int]] = []
    for step in range(1, steps + 1):
        waiting = waiting or buckets([len(ids) for ids, _ in rejected], batch=batch, rng=rng)
        at = waiting.pop()
        logp = token_logps(model, [*(chosen[i] for i in at), *(rejected[i] for i in at)])[0].sum(1)  # (2B,)
        margin = logp[: len(at)] - logp[len(at) :] - reference_margin[at]
        loss = -torch.nn.functional.logsigmoid(beta * margin).mean()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress:
            progress(step, steps, loss.item())
    up, down = (sequence_logps(model, side) - old for side, old in zip(measured, before, strict=True))
    save_checkpoint(model, tokenizer, out)
    return DpoChange(len(measured[0]), up.mean().item(), down.mean().item(), (up < 0).float().mean().item())
