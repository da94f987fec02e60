"""The forward pass beside what a user would run instead, in one process, interleaved, CPU time, medians, one thread.

    python benchmarks/forward.py            about a quarter of an hour on one core
    python benchmarks/forward.py --quick    four minutes; --only bf16 checkpoints: these parts alone

Model: a random Llama of 58M parameters (d = 512, 8 layers, 32,000 tokens, untied), so that nothing has to be downloaded. Pairs of random
tokens in three length mixes. Rivals:

    loop   one sequence at a time with output_hidden_states and full logits, as the CHES authors' script works: log-probs, hidden sums
    TRL    DPOTrainer.compute_ref_log_probs of TRL 1.16 on the CPU, batches of 8 pairs in their order: log-probs alone
    ours   log-probs, entropy, largest log-prob, hidden sums and CHES' inner products in one pass

    compute bound = (2P + R)(body + head) / ((P + R)·body + R·head)        R: both responses' tokens
    share of peak = floating-point operations of (P + R)·body + R·head and of attention, over ours' time, over the rate of the best product
                    that ours uses
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

import curate.passes.loading.model
from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.head import SUMMED, Head
from curate.passes.kernels import attention as packing
from curate.passes.kernels import cpu_kernels, cpu_products
from curate.passes.layout import Group, Item, Layout
from curate.passes.loading.model import Model
from curate.passes.tokens import Encoded, EncodedPair, common_prefix

VOCABULARY, WIDTH, LAYERS, INNER, HEADS = 32_000, 512, 8, 1376, 8
BODY = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER)  # weights a token meets in the body
HEAD = VOCABULARY * WIDTH
MIXES = {"prompt-heavy": (300, 50), "mixed": (150, 100), "response-heavy": (50, 200)}  # mean prompt, mean response
PARTS = ["rivals", "kernels", "prices", "exactness", "bf16", "checkpoints"]
ALL = [MEASUREMENTS[name] for name in ("likelihood", "entropy", "hidden")]


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_pairs(mix: str, n: int, *, seed: int = 0, hard: bool = False) -> list[EncodedPair]:
    """Pairs whose lengths vary by a half around the mix's means. hard: the rejected response differs in a few tokens only."""
    rng = np.random.default_rng(seed)
    prompt_mean, response_mean = MIXES[mix]

    def ids(mean: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, int(mean * rng.uniform(0.5, 1.5))).astype(np.int32)

    pairs = []
    for _ in range(n):
        prompt, chosen, rejected = ids(prompt_mean), ids(response_mean), ids(response_mean)
        if hard:
            rejected = chosen.copy()
            rejected[rng.integers(0, len(chosen), 3)] = rng.integers(3, VOCABULARY, 3)
        a, b = np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])
        pairs.append(EncodedPair(Encoded(a, len(prompt)), Encoded(b, len(prompt)), common_prefix(a, b)))
    return pairs


@torch.no_grad()
def loop(module: torch.nn.Module, pairs: list[EncodedPair]) -> dict[str, np.ndarray]:
    """One sequence at a time, full logits, all hidden states kept."""
    rows = []
    for pair in pairs:
        sums, logps = [], []
        for side in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(side.ids.astype(np.int64))[None]
            out = module(input_ids=ids, output_hidden_states=True, use_cache=False)
            logp = out.logits[0, side.start - 1 : -1].float().log_softmax(-1)
            logps.append(float(logp.gather(1, ids[0, side.start :, None]).sum()))
            sums.append(out.hidden_states[-1][0, side.start - 1 : -1].double().sum(0))
        rows.append((*logps, float(sums[0] @ sums[0]), float(sums[0] @ sums[1])))
    return dict(zip(("chosen_logp", "rejected_logp", "hidden_cc", "hidden_cr"), np.asarray(rows).T))


def ours(model: Model, pairs: list[EncodedPair], names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    return forward.measure(model, pairs, [*ALL, *(MEASUREMENTS[name] for name in names)])


def make_trl(module: torch.nn.Module, folder: str) -> Callable[[list[EncodedPair]], dict[str, np.ndarray]] | None:
    """TRL's own computation over its own collator; None where trl is not installed."""
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference
    except ImportError:
        return None
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = DPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        precompute_ref_log_probs=True,
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": " a", "rejected": " a a"}])
    module = copy.deepcopy(module)  # the trainer patches its model's forward
    trainer = DPOTrainer(module, args=config, train_dataset=rows, processing_class=tokenizer)
    collate = DataCollatorForPreference(pad_token_id=0)

    def run(pairs: list[EncodedPair]) -> dict[str, np.ndarray]:
        found = []
        for i in range(0, len(pairs), 8):
            batch = [
                {
                    "prompt_ids": p.chosen.ids[: p.chosen.start].tolist(),
                    "chosen_ids": p.chosen.ids[p.chosen.start :].tolist(),
                    "rejected_ids": p.rejected.ids[p.rejected.start :].tolist(),
                }
                for p in pairs[i : i + 8]
            ]
            found.append(torch.stack(trainer.compute_ref_log_probs(module, collate(batch))))
        both = torch.cat(found, 1).double().numpy()
        return {"chosen_logp": both[0], "rejected_logp": both[1]}

    return run


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def extra_memory(run: Callable[[], object]) -> float:
    """Peak resident memory above what was there before, MB, sampled every two milliseconds."""
    page, done, peak = os.sysconf("SC_PAGE_SIZE"), threading.Event(), [0]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    _give_back_memory()
    before = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return (peak[0] - before) / 1e6


def _give_back_memory() -> None:
    import ctypes
    import gc

    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass


def peak_rate(dtype: torch.dtype, products: AbstractContextManager[object] | None = None) -> float:
    """Best rate of the products that the pass uses, flop/s of CPU time, over the shapes of its body and head."""
    best = 0.0
    with products or nullcontext():
        for rows, i, o in ((2048, WIDTH, INNER), (512, WIDTH, 2048), (1024, 1024, 1024)):
            x, weight = torch.randn(rows, i).to(dtype), torch.randn(o, i).to(dtype)
            cpu_products.linear(x, weight)
            best = max(
                best,
                *(
                    2 * rows * i * o * 4 / seconds(lambda: [cpu_products.linear(x, weight) for _ in range(4)])  # noqa: B023
                    for _ in range(8)
                ),
            )
    return best


def operations(pairs: list[EncodedPair]) -> float:
    """Floating-point operations that the packed pass cannot do without."""
    total = 0.0
    for pair in pairs:
        p, c, r = pair.chosen.start, pair.chosen.n_response, pair.rejected.n_response
        total += 2 * BODY * (p + c + r) + 2 * HEAD * (c + r)
        total += 4 * LAYERS * WIDTH * ((p + c) ** 2 / 2 + r * (p + r / 2))  # causal attention, scores and values
    return total


def bound(pairs: list[EncodedPair]) -> float:
    """What sharing the prompt and restricting the head can gain over two whole sequences with full logits."""
    p = sum(pair.chosen.start for pair in pairs)
    r = sum(pair.chosen.n_response + pair.rejected.n_response for pair in pairs)
    return (2 * p + r) * (BODY + HEAD) / ((p + r) * BODY + r * HEAD)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def worst(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest error of log-probs, relative, and of CHES, relative to |⟨h+,h−⟩| + ‖h+‖²."""
    logp = max(np.abs(found[k] / wanted[k] - 1).max() for k in ("chosen_logp", "rejected_logp"))
    terms = np.abs(wanted["hidden_cr"]) + wanted["hidden_cc"]
    ches = [x["hidden_cr"] - x["hidden_cc"] for x in (found, wanted)]
    return float(logp), float((np.abs(ches[0] - ches[1]) / terms).max())


def main() -> None:
    parser = argparse.ArgumentParser(description="Forward pass: ours, a plain loop, TRL.")
    parser.add_argument("--quick", action="store_true", help="fewer pairs and rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts of it")
    asked = parser.parse_args()
    quick, only = asked.quick, asked.only
    torch.set_num_threads(1)
    n, rounds = (4, 2) if quick else (8, 5)
    module = make_model()
    model = Model(module)
    print(
        f"{model.engine}; {sum(p.numel() for p in module.parameters()) / 1e6:.0f}M parameters; {n} pairs, {rounds} rounds"
    )
    rate = peak_rate(torch.float32)
    plain = peak_rate(torch.float32, mock.patch.object(cpu_products, "one_dnn_is_faster", return_value=False))
    print(f"best float32 matrix product: {rate / 1e9:.0f} Gflop/s, torch's own {plain / 1e9:.0f}\n")
    with tempfile.TemporaryDirectory() as folder:
        if "rivals" in only:
            compare(module, model, make_trl(module, folder), n, rounds)
        if "kernels" in only:
            compiled(model, n, rounds)
        if "prices" in only:
            prices(model, n, rounds)
        if "exactness" in only:
            exactness(module, model, 2 if quick else 4)
        if "bf16" in only:
            half(module, model, n, rounds, 40 if quick else 240)
        if "checkpoints" in only:
            checkpoints(module, folder, n)


def compare(module: torch.nn.Module, model: Model, trl, n: int, rounds: int) -> None:
    print(
        "| mix | loop / ours | compute bound | share of bound | TRL / ours | share of peak | extra MB ours | loop | TRL |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for mix in MIXES:
        pairs = make_pairs(mix, n)
        runs = {"ours": lambda rows: ours(model, rows), "loop": lambda rows: loop(module, rows)}
        if trl:
            runs["trl"] = trl
        memory = {name: extra_memory(lambda: run(pairs)) for name, run in runs.items()}  # noqa: B023
        times: dict[str, list[float]] = {name: [] for name in runs}
        rates = []
        for _ in range(rounds):
            for name, run in runs.items():
                run(pairs[:2])  # untimed: caches and heap as it leaves them itself, not as the one before did
                times[name].append(seconds(lambda: run(pairs)))  # noqa: B023
            rates.append(peak_rate(torch.float32))  # beside the passes, so that other work on the machine slows both
        ratio = {name: statistics.median(t / o for t, o in zip(times[name], times["ours"])) for name in runs}
        limit = bound(pairs)
        share = statistics.median(operations(pairs) / t / r for t, r in zip(times["ours"], rates))
        beside = f"{ratio['trl']:.2f}" if trl else "not installed"
        print(
            f"| {mix} | {ratio['loop']:.2f} | {limit:.2f} | {ratio['loop'] / limit:.0%} | {beside} | {share:.0%} "
            f"| {memory['ours']:.0f} | {memory['loop']:.0f} | {memory.get('trl', float('nan')):.0f} |",
            flush=True,
        )


def compiled(model: Model, n: int, rounds: int) -> None:
    """What the compiled kernels are worth: of a pass, of attention over one sequence, of the sums of a block of logits."""
    kernels = cpu_kernels.kernels()
    if kernels is None:
        print(f"\nno compiled kernels here: {cpu_kernels.refusal()}")
        return

    def without(run: Callable[[], object]) -> Callable[[], object]:
        def torchs_own() -> None:
            with (
                mock.patch.object(cpu_kernels, "kernels", return_value=None),
                mock.patch.dict(model.known, {"sweeps": None}),
            ):
                run()

        return torchs_own

    heads, length, (rows, columns) = 8, 350, SUMMED
    q, k, v = (torch.randn(1, length, heads, WIDTH // heads).transpose(1, 2) for _ in range(3))
    one = Layout.of([Group((Item(0, "", np.zeros(length, np.int32), 1),), 0)])
    head = Head(torch.randn(columns, 8))  # a product of next to nothing: what is left are the sums
    states, tokens, wanted = torch.randn(rows, 8), torch.randint(0, columns, (rows,)), ("logp", "entropy", "top_logp")

    def attend() -> None:
        with packing.packed(one), torch.inference_mode():
            packing.attention(model.module, q, k, v, None)

    def add_up() -> None:
        head.statistics(states, tokens, wanted)

    runs: dict[str, Callable[[], object]] = {
        f"attention of {length} tokens": attend,
        f"sums of {rows} × {columns} logits": add_up,
    }
    for mix in MIXES:
        pairs = make_pairs(mix, n)
        runs[f"a pass, {mix}"] = lambda pairs=pairs: ours(model, pairs)
    print("\nTime without compiled kernels over time with them:")
    for name, run in runs.items():
        times = 2 * rounds if name.startswith("a pass") else 50 * rounds
        run(), without(run)()
        found = [seconds(without(run)) / seconds(run) for _ in range(times)]
        print(f"  {name}: {statistics.median(found):.2f}", flush=True)


def prices(model: Model, n: int, rounds: int) -> None:
    """What each measurement that sweeps the vocabulary again costs on top."""
    print("\nOn top of ours (mixed):")
    pairs = make_pairs("mixed", n)
    extras = ("valley_depth", "squeezed_mass", "squeezed_vocabulary", "head_products")
    times: dict[str, list[float]] = {name: [] for name in ("", *extras)}
    for _ in range(rounds):
        for name, found in times.items():
            found.append(seconds(lambda: ours(model, pairs, (name,) if name else ())))  # noqa: B023
    for name in extras:
        print(f"  {name}: +{statistics.median(t / o for t, o in zip(times[name], times[''])) - 1:.0%}", flush=True)


def exactness(module: torch.nn.Module, model: Model, n: int) -> None:
    pairs = make_pairs("mixed", n)
    logp, ches = worst(ours(model, pairs), loop(copy.deepcopy(module).double(), pairs))
    print(f"\nAgainst float64: log-probs {logp:.1e} relative, CHES {ches:.1e} of |⟨h+,h−⟩| + ‖h+‖²", flush=True)


def half(module: torch.nn.Module, model: Model, n: int, rounds: int, ranked: int) -> None:
    """bf16, where the processor multiplies in it: its speed, and whether it keeps the order of hard pairs."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        print("\nbf16: this processor has no bf16 products, not measured")
        return
    small = Model(copy.deepcopy(module).bfloat16())
    pairs = make_pairs("mixed", n)
    torchs_own = mock.patch.object(cpu_products, "one_dnn_is_faster", return_value=False)  # in the products, and
    of_model = mock.patch.object(
        curate.passes.loading.model, "one_dnn_is_faster", return_value=False
    )  # in whether to replace them
    times: dict[str, list[float]] = {"bf16": [], "float32": [], "torch": []}
    ours(small, pairs)
    for _ in range(rounds):
        times["bf16"].append(seconds(lambda: ours(small, pairs)))
        times["float32"].append(seconds(lambda: ours(model, pairs)))
        with torchs_own, of_model:
            times["torch"].append(seconds(lambda: ours(model, pairs)))
    rate, wide, plain = peak_rate(torch.bfloat16), peak_rate(torch.float32), peak_rate(torch.float32, torchs_own)
    share = operations(pairs) / statistics.median(times["bf16"]) / rate
    faster = {k: statistics.median(t / b for t, b in zip(times[k], times["bf16"])) for k in ("float32", "torch")}
    print(
        f"\nbf16: {faster['float32']:.2f}× our float32 (best products: {rate / wide:.2f}×), {faster['torch']:.2f}× our float32 with "
        f"torch's own products ({rate / plain:.2f}×); {share:.0%} of its peak, {rate / 1e9:.0f} Gflop/s"
    )
    hard = make_pairs("mixed", ranked, seed=1, hard=True)
    of_rounded = ours(Model(copy.deepcopy(small.module).float()), hard)
    print(
        f"Spearman over {ranked} pairs whose responses differ in three tokens, against float32 of the same bf16 weights:"
    )
    found = {"ours": ours(small, hard), "plain bf16 loop": loop(small.module, hard)}
    for name, x in found.items():
        print(f"  {name}: {ranking(of_rounded, x, hard)}", flush=True)
    print(f"  rounding float32 weights to bf16 alone: {ranking(ours(model, hard), of_rounded, hard)}", flush=True)


def ranking(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray], pairs: list[EncodedPair]) -> str:
    ches = spearman(ches_ln(wanted, pairs), ches_ln(found, pairs))
    gap = spearman(*(x["chosen_logp"] - x["rejected_logp"] for x in (wanted, found)))
    return f"ches_ln {ches:.4f}, ranking gap {gap:.4f}"


def ches_ln(found: dict[str, np.ndarray], pairs: list[EncodedPair]) -> np.ndarray:
    chosen, rejected = (np.asarray([getattr(p, side).n_response for p in pairs]) for side in ("chosen", "rejected"))
    return found["hidden_cr"] / (chosen * rejected) - found["hidden_cc"] / chosen**2


def checkpoints(module: torch.nn.Module, folder: str, n: int, k: int = 8) -> None:
    """K checkpoints, loading included, against K passes of a model in memory; CPU time."""
    pairs = make_pairs("mixed", n)
    paths = [Path(folder) / f"checkpoint-{i}" for i in range(k)]
    for path in paths:
        module.save_pretrained(path)
    with forward.load_model(paths[0], device="cpu", dtype="float32") as model:
        ours(model, pairs)
        whole, swaps, singles = [], [], []
        for path in paths:  # a single pass beside each, so that both see the same load
            start = time.process_time()
            model.use(path)
            swaps.append(time.process_time() - start)
            ours(model, pairs)
            whole.append(time.process_time() - start)
            singles.append(seconds(lambda: ours(model, pairs)))
        print(
            f"\n{k} checkpoints of {sum(p.numel() for p in module.parameters()) * 4 / 1e6:.0f} MB: {sum(whole) / sum(singles):.2f}× {k} single "
            f"passes of {n} pairs, loading included ({statistics.median(swaps) * 1e3:.0f} ms of {statistics.median(singles) * 1e3:.0f} ms)"
        )


if __name__ == "__main__":
    main()
