"""Whether an engine whose weights were swapped in place answers with the weights that it should have.

A few texts are gone on with greedily, and what the engine makes of its own answers is compared with the checkpoint's values in torch, on the CPU:

    |log π_engine(y | x) − log π_torch(y | x)|  ≤  max(LEAST a token, SAFETY · what a freshly started engine differs by)

An engine that kept the weights before, or a packed copy of them, gives its answers another probability than the checkpoint does. The noise of its
dtype and kernels is measured on an engine as it started, up to MOST a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.errors import CurateError, EngineError
from curate.passes.loading.adapter_config import tokenizer_folder
from curate.passes.sampling.server_probe import FIXED
from curate.passes.sampling.types import Prompt, Sampler, Sampling
from curate.passes.sampling.vllm_memory import free_memory
from curate.passes.tokenizer import load_tokenizer
from curate.passes.tokens import Encoded

if TYPE_CHECKING:
    from curate.passes.forward import Model

PROMPTS = 4  # texts, each of at most
PROMPT_TOKENS = 24
TOKENS = 8  # of each answer
LEAST = 5e-4  # nats a token: what a float32 engine stays far below
SAFETY = 4.0
MOST = 0.25  # nats a token
SPARE = 1.3  # times a checkpoint's files: what has to be free to load it


class SwapProbe:
    """The probe of one series of checkpoints. notes: why a checkpoint was not compared, in words for the user."""

    def __init__(self) -> None:
        self.noise = 0.0  # nats a token, of engines as they started
        self.notes: list[str] = []

    def started(self, sampler: Sampler, path: str, base: str | None) -> None:
        """Note how much an engine that was just started on these weights differs from torch."""
        found = self._compared(sampler, path, base)
        if found is not None:
            engine, torch, counts = found
            self.noise = min(max(self.noise, float(np.max(np.abs(engine - torch) / counts, initial=0.0))), MOST)

    def swapped(self, sampler: Sampler, path: str, base: str | None, label: str) -> None:
        """EngineError, with both numbers, where the engine's answers are not of these weights, which were swapped in."""
        found = self._compared(sampler, path, base)
        if found is None:
            return
        engine, torch, counts = found
        allowed = max(LEAST, SAFETY * self.noise) * counts
        over = np.abs(engine - torch) - allowed
        worst = int(np.argmax(np.where(np.isnan(over), np.inf, over)))
        if not over[worst] <= 0:
            raise EngineError(
                f"{label}: after its weights were swapped in, the engine's answer to a probe has the log-probability {engine[worst]:.4f} there, and "
                f"{torch[worst]:.4f} by the checkpoint itself, in torch (up to {allowed[worst]:.4f} apart is rounding). The engine has stale or "
                "damaged weights; nothing was sampled with them. Run the command again, which starts it anew, or sample with transformers: "
                "`--set engine.sampler=transformers`."
            )

    def _compared(
        self, sampler: Sampler, path: str, base: str | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """(probes,) log-probabilities of the engine's greedy answers by itself and by torch, and their tokens; None where torch cannot tell."""
        tokenizer = load_tokenizer(tokenizer_folder(path, base))
        prompts = [
            Prompt(tokenizer(text, verbose=False)["input_ids"][:PROMPT_TOKENS], text, None, seed=i)
            for i, text in enumerate(FIXED[:PROMPTS])
        ]
        settings = Sampling(temperature=0, max_new_tokens=TOKENS, with_ids=True)
        drawn = [
            (prompt, samples[0])
            for prompt, samples in zip(prompts, sampler.sample(prompts, settings), strict=True)
            if samples and samples[0].ids and samples[0].logp is not None
        ]
        if not drawn:
            return None
        encoded = [Encoded(np.asarray([*p.ids, *(s.ids or ())], np.int32), len(p.ids)) for p, s in drawn]
        torch = self._by_torch(encoded, path, base, sampler.engine.rpartition(" ")[2])
        if torch is None:
            return None
        return np.array([s.logp for _, s in drawn]), torch, np.array([len(s.ids or ()) for _, s in drawn], float)

    def _by_torch(self, encoded: list[Encoded], path: str, base: str | None, dtype: str) -> np.ndarray | None:
        from curate.passes.forward import load_model, response_logps

        size = sum(file.stat().st_size for file in Path(base or path).glob("*.safetensors"))
        if SPARE * size > free_memory():
            self._say(
                f"weights in the engine were not compared with torch's: {size / 1e9:.1f} GB do not fit into memory beside it"
            )
            return None
        try:
            model: Model = load_model(path, base=base, dtype=dtype, device="cpu")
        except (CurateError, RuntimeError, MemoryError, ValueError) as error:
            self._say(
                f"weights in the engine were not compared with torch's, which cannot load them ({str(error).splitlines()[0]})"
            )
            return None
        with model:
            return response_logps(model, encoded)[:, 0]

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
