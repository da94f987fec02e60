"""N×M influence beside what a user would run instead, in one run, interleaved, CPU time, medians, one thread.

    python benchmarks/influence.py [--kronfluence PYTHON]            N = 200, M = 20: about ten minutes on one core
    python benchmarks/influence.py --quick                           N = 60, M = 6: two minutes

Model: a random Llama of 7.3M parameters (d = 256, 4 layers, 8,000 tokens, untied). SFT rows of random tokens, 20 to 80 of prompt and 60 to 140 of
response. Ours: ⟨g_i, g_m⟩ of every training row with every target over all parameters, and all norms. Costs are in epochs: forward and backward of
the N rows one by one, logits at the response only, gradients of all weights. Cosines: what `influence_cosine` takes, with M vectors that are there
already, rows weighed by a diagonal P. Rivals:

    Kronfluence   pairwise scores of its identity strategy over the linear layers, in an environment of its own:
                  python -m venv kron && kron/bin/pip install kronfluence transformers        then --kronfluence kron/bin/python
    loop          one backward per row, dot products with the targets' stored gradients
    LoRA          the same over rank-8 LoRA parameters of all linear layers; and LESS's way: every gradient projected to 8,192 random signs
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import forward as plain
import numpy as np
import torch

from curate.passes.gradients import influence as cross
from curate.passes.gradients.cosines import Cosines
from curate.passes.gradients.layer_rules import Parameters
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded

VOCABULARY, WIDTH, LAYERS, INNER = 8_000, 256, 4, 688
FACTORED = 32
PROJECTED = 8_192  # what LESS projects to


def make_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def make_rows(n: int, *, seed: int) -> list[Encoded]:
    """Half of the rows share a body of tokens with each other, so that gradients do have something in common."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(9).integers(3, VOCABULARY, 40).astype(np.int32)
    rows = []
    for i in range(n):
        prompt, response = int(rng.integers(20, 81)), int(rng.integers(60, 141))
        ids = rng.integers(3, VOCABULARY, prompt + response).astype(np.int32)
        if i % 2:
            ids[prompt : prompt + 40] = common
        rows.append(Encoded(ids, prompt))
    return rows


def loss(module: torch.nn.Module, row: Encoded) -> torch.Tensor:
    """−Σ log π(y), logits at the response only."""
    ids = torch.from_numpy(row.ids.astype(np.int64))[None]
    states = module.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, row.start - 1 : -1]
    logits = module.get_output_embeddings()(states)
    return torch.nn.functional.cross_entropy(logits, ids[0, row.start :], reduction="sum")


def epoch(module: torch.nn.Module, rows: list[Encoded]) -> None:
    for row in rows:
        loss(module, row).backward()
    module.zero_grad()


def projected_loop(module: torch.nn.Module, train: list[Encoded], targets: list[Encoded]) -> np.ndarray:
    """(N, M): one backward a row, gradients projected by random signs that are drawn anew in blocks, as storing them would take P × 8,192 numbers."""
    wanted = [p for p in module.parameters() if p.requires_grad]

    def project(rows: list[Encoded]) -> torch.Tensor:
        found = torch.zeros(len(rows), PROJECTED)
        for first in range(0, len(rows), 16):
            some = rows[first : first + 16]
            flat = torch.stack(
                [torch.cat([g.flatten() for g in torch.autograd.grad(loss(module, row), wanted)]) for row in some]
            )
            generator = torch.Generator().manual_seed(0)
            for k in range(0, flat.shape[1], 4096):
                part = flat[:, k : k + 4096]
                signs = torch.randint(0, 2, (part.shape[1], PROJECTED), generator=generator, dtype=torch.int8) * 2 - 1
                found[first : first + 16] += part @ signs.float()
        return found

    return (project(train) @ project(targets).T / PROJECTED).double().numpy()


def plain_loop(module: torch.nn.Module, train: list[Encoded], targets: list[Encoded]) -> np.ndarray:
    """(N, M): one backward a row, dot products with the targets' stored gradients; no projection at all."""
    wanted = [p for p in module.parameters() if p.requires_grad]

    def gradient(row: Encoded) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(module, row), wanted)])

    theirs = torch.stack([gradient(row) for row in targets])
    return torch.stack([theirs @ gradient(row) for row in train]).double().numpy()


def cosines(model: Model, train: list[Encoded], count: int, *, parameters: Parameters = "all") -> np.ndarray:
    """(N, count): with vectors of ones, P of ones; what they hold costs nothing."""
    named = model.module.named_parameters()
    ones = {name: torch.ones_like(p) for name, p in named if (parameters == "lora") == ("lora_" in name)}
    return Cosines(model, [lambda: ones] * count, scale=ones, parameters=parameters).of(train)


class Kronfluence:
    """A process in another environment that runs when it is told to."""

    def __init__(
        self, python: str, folder: Path, module: torch.nn.Module, train: list[Encoded], targets: list[Encoded]
    ) -> None:
        self.folder = folder
        module.save_pretrained(folder / "model")
        arrays = {}
        for kind, rows in (("train", train), ("targets", targets)):
            arrays[f"{kind}_ids"] = np.concatenate([row.ids for row in rows])
            arrays[f"{kind}_lengths"] = np.asarray([len(row.ids) for row in rows])
            arrays[f"{kind}_starts"] = np.asarray([row.start for row in rows])
        np.savez(folder / "rows.npz", **arrays)
        script = Path(__file__).parent / "rivals" / "kronfluence_identity.py"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, str(script), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )  # fmt: skip

    def seconds(self) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(
            f"{self.process.args[0]}: kronfluence gave nothing; benchmarks/rivals/kronfluence_identity.py run by hand says why."
        )  # type: ignore[index]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description="N×M influence: ours, Kronfluence, the per-example loop.")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument(
        "--kronfluence", metavar="PYTHON", help="the python of an environment with kronfluence, torch, transformers"
    )
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    n, rounds = (60, given.rounds or 2) if given.quick else (200, given.rounds or 3)
    train, targets = make_rows(n, seed=1), make_rows(n // 10, seed=2)
    module = make_model()
    model, trained = Model(copy.deepcopy(module)), copy.deepcopy(module).requires_grad_(True)
    size = sum(p.numel() for p in module.parameters()) / 1e6
    print(f"{model.engine}; {size:.1f}M parameters; N = {n}, M = {len(targets)}, {rounds} rounds")

    exact = cross.cross_products(model, train, targets)  # and the check against autograd, which comes once per model
    factored = cross.cross_products(model, train, targets, factored=FACTORED)
    print(f"factored={FACTORED}, on its own sample: {factored.error}")
    runs: dict[str, Callable[[], object]] = {
        "epoch": lambda: epoch(trained, train),
        "ours, exact": lambda: cross.cross_products(model, train, targets),
        "ours, cosines": lambda: cosines(model, train, len(targets)),
        f"ours, factored={FACTORED}": lambda: cross.cross_products(model, train, targets, factored=FACTORED),
        "per-example loop, no projection": lambda: plain_loop(trained, train, targets),
    }
    try:
        import peft

        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(copy.deepcopy(module), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.02)
        of_lora = Model(copy.deepcopy(adapted).get_base_model())
        cross.cross_products(of_lora, train[:2], targets[:1], parameters="lora")
        taught = adapted.get_base_model()
        runs["LoRA: ours, exact"] = lambda: cross.cross_products(of_lora, train, targets, parameters="lora")
        runs["LoRA: ours, cosines"] = lambda: cosines(of_lora, train, len(targets), parameters="lora")
        runs["LoRA: per-example loop, no projection"] = lambda: plain_loop(taught, train, targets)
        runs["LoRA: LESS-style loop, projected"] = lambda: projected_loop(taught, train[:16], train[16:32])
    except ImportError:
        print("LoRA rows skipped: peft is not installed.")
    times: dict[str, list[float]] = {name: [] for name in runs}
    folder = tempfile.TemporaryDirectory()
    rival = None
    if given.kronfluence:
        rival = Kronfluence(given.kronfluence, Path(folder.name), module, train, targets)
        times["Kronfluence, identity"] = []
    else:
        print("Kronfluence skipped: give --kronfluence PYTHON of an environment that has it.")
    runs["epoch"]()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(plain.seconds(run))
        if rival is not None:
            times["Kronfluence, identity"].append(rival.seconds())
    print("\n| method | epochs of forward + backward | against ours, exact |\n| --- | --- | --- |")
    for name, took in times.items():
        scale = (n + n // 10) / 32 if name.endswith("loop, projected") else 1.0  # it ran on 32 rows
        epochs = scale * statistics.median(t / e for t, e in zip(took, times["epoch"]))
        ours = times["LoRA: ours, exact" if name.startswith("LoRA") else "ours, exact"]
        print(f"| {name} | {epochs:.2f} | {scale * statistics.median(t / o for t, o in zip(took, ours)):.2f} |")
    single = plain_loop(trained, train, targets)
    scale = np.outer(exact.train_norms, exact.target_norms)
    print(f"\nCosines: {exact.cosines.std():.3f} spread. ", end="")
    print(
        f"Exact against the float32 loop: {np.abs(exact.products - single).max() / scale.max():.1e} of |g||g'| at most. ",
        end="",
    )
    off = (factored.products - exact.products) / scale
    rms, together = np.sqrt(np.mean(off**2)), correlation(factored.products / scale, exact.cosines)
    print(f"Factored, all pairs: rms {rms:.4f} of |g||g'|, correlation {together:.3f}.")
    if rival is not None:
        theirs = np.load(Path(folder.name) / "scores.npy")
        print(
            f"Kronfluence's scores (linear layers alone) correlate with ours over all parameters: {correlation(theirs, exact.products):.4f}."
        )
        rival.close()
    folder.cleanup()


if __name__ == "__main__":
    main()
