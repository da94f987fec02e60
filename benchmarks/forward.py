"""The forward pass against a plain batch-1 loop: log-probs and hidden products of preference pairs, one thread, CPU time, interleaved medians.

    python benchmarks/forward.py [--rounds 5] [--pairs 6]

The loop is how the CHES authors' script works: each response with its prompt, all hidden states and all logits. Both compute the same columns, and
how far they differ is printed beside the times. A random model: speed does not depend on what it has learned.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from curate.measurements import MEASUREMENTS
from curate.passes.forward import measure
from curate.passes.model import Model
from curate.passes.packing import register
from curate.show import out, table
from curate.tokens import Encoded, EncodedPair

MIXES = {
    "prompt-heavy": (400, 60, 60),
    "mixed": (200, 150, 150),
    "response-heavy": (60, 300, 300),
}  # tokens: prompt, chosen, rejected
VOCABULARY = 16_000
COLUMNS = ("chosen_logp", "rejected_logp", "hidden_cc", "hidden_cr", "hidden_rr")


def make_model() -> Model:
    torch.manual_seed(0)
    register()
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    return Model(LlamaForCausalLM(config).eval().requires_grad_(False))


def make_pairs(lengths: tuple[int, int, int], n: int) -> list[EncodedPair]:
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(n):
        prompt, chosen, rejected = (random.integers(3, VOCABULARY, size).astype(np.int32) for size in lengths)
        sides = [
            Encoded(np.concatenate([prompt, response]), len(prompt), False, None) for response in (chosen, rejected)
        ]
        pairs.append(EncodedPair(*sides, shared=len(prompt)))
    return pairs


@torch.no_grad()
def plain_loop(module: torch.nn.Module, pairs: list[EncodedPair]) -> dict[str, np.ndarray]:
    """One response at a time: every hidden state, every logit, then what is needed of them."""
    rows = []
    for pair in pairs:
        logps, sums = [], []
        for side in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(side.ids.astype(np.int64))[None]  # (1, T)
            result = module(ids, output_hidden_states=True, use_cache=False)
            logp = torch.log_softmax(result.logits[0, side.start - 1 : -1].float(), -1)  # (responses, vocabulary)
            logps.append(logp.gather(1, ids[0, side.start :, None]).sum().item())
            sums.append(result.hidden_states[-1][0, side.start - 1 : -1].double().sum(0))
        rows.append(
            [*logps, *(torch.dot(a, b).item() for a, b in ((sums[0], sums[0]), (sums[0], sums[1]), (sums[1], sums[1])))]
        )
    return dict(zip(COLUMNS, np.array(rows).T, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=6)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    wanted = [MEASUREMENTS["likelihood"], MEASUREMENTS["hidden"]]
    lines = []
    for mix, lengths in MIXES.items():
        pairs = make_pairs(lengths, asked.pairs)
        runs = {
            "loop": lambda pairs=pairs: plain_loop(model.module, pairs),
            "ours": lambda pairs=pairs: measure(model, pairs, wanted),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        found = {name: run() for name, run in runs.items()}  # warm-up, and the values to compare
        for _ in range(asked.rounds):
            for name, run in runs.items():
                started = time.process_time()
                run()
                seconds[name].append(time.process_time() - started)
        loop, ours = statistics.median(seconds["loop"]), statistics.median(seconds["ours"])
        apart = max(float(np.max(np.abs(found["ours"][c] / found["loop"][c] - 1))) for c in COLUMNS[:2])
        scale = np.abs(found["loop"]["hidden_cr"]) + found["loop"]["hidden_cc"]
        ches = max(float(np.max(np.abs(found["ours"][c] - found["loop"][c]) / scale)) for c in COLUMNS[2:4])
        tokens = sum(lengths) * asked.pairs
        lines.append(
            (
                mix,
                "/".join(map(str, lengths)),
                tokens / loop,
                tokens / ours,
                f"{loop / ours:.2f}x",
                f"{apart:.0e}",
                f"{ches:.0e}",
            )
        )
    head = (
        "mix",
        "prompt/chosen/rejected",
        "loop tokens/s",
        "ours tokens/s",
        "speed-up",
        "log-probs apart",
        "products apart",
    )
    parameters = sum(p.numel() for p in model.module.parameters())
    out(
        f"{parameters / 1e6:.1f}M parameters, {model.engine}, one thread, medians of {asked.rounds}; tokens: each prompt counted once"
    )
    out(table(lines, head=head))


if __name__ == "__main__":
    main()
