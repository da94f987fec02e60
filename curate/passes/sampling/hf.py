"""Sampling with transformers: the fallback where vLLM cannot serve the model. Needs torch and transformers only.

Own decode loop over the model's KV cache: rows sorted by length and padded on the left, the prompt run once for its n samples, rows that
have ended taken out of the batch. A token is drawn by inverting the cumulative distribution,

    token = min { v : sum_{u <= v} q(u) > U },    q = softmax(logits / temperature) cut by top_p,    U uniform in [0, 1),

with the uniforms of a sample drawn beforehand from (row's seed, number of the sample), so neighbours in the batch change nothing but the
last bits of the logits. temperature, min_p, top_k and top_p are transformers' own warpers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from curate.errors import EngineError, ModelError
from curate.passes.loading.adapter_config import tokenizer_folder
from curate.passes.sampling.engines import hf_engine
from curate.passes.sampling.types import Prompt, Sample, Sampling, engine_seed, room
from curate.passes.thinking import without_special
from curate.passes.tokenizer import context_length, load_tokenizer

CONTEXT_TOKENS = 6  # prompt tokens decoded with the response, so that its first space is kept


class HfSampler:
    """A `Sampler` (see types.py) over a transformers causal language model in this process.

    base: the model that an adapter's folder sits on.
    max_length: prompt + response tokens (None: the model's context). token_budget: tokens of prompt and response in a batch.
    """

    name = "transformers"

    def __init__(
        self,
        model_path: str | Path,
        *,
        base: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_length: int | None = None,
        token_budget: int = 32_768,
    ):
        from curate.passes.forward import load_model

        model = load_model(model_path, base=base, dtype=dtype, device=device)
        tokenizer = load_tokenizer(tokenizer_folder(model_path, base))
        self._set(model, tokenizer, context_length(base or model_path), max_length, token_budget)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, max_length: int | None = None, token_budget: int = 32_768) -> HfSampler:
        """Over a `Model` that is there already, such as one in training."""
        sampler = cls.__new__(cls)
        sampler._set(model, tokenizer, model.context, max_length, token_budget)
        return sampler

    def _set(self, model: Any, tokenizer: Any, context: int | None, max_length: int | None, token_budget: int) -> None:
        self.notes: list[str] = []
        self._tokenizer = tokenizer
        self._model: Any = model
        self.context = min(filter(None, (max_length, context)), default=None)
        self._token_budget = token_budget
        self._stop_ids = _stop_ids(tokenizer, model.module)
        self.engine = hf_engine(str(model.dtype).removeprefix("torch."), model.device.type)

    def sample(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        """n samples per prompt, in the prompts' order; an empty list where the prompt leaves no room in the context."""
        self._check_open()
        rooms = [room(len(prompt.ids), sampling.max_new_tokens, self.context) for prompt in prompts]
        samples: list[list[Sample]] = [[] for _ in prompts]
        order = [
            row
            for row in np.argsort([len(p.ids) for p in prompts], kind="stable")[::-1]
            if rooms[row] > 0 and prompts[row].ids
        ]
        while order:
            part = order[: self._fitting(prompts, order, sampling)]
            try:
                drawn = self._batch([prompts[row] for row in part], [rooms[row] for row in part], sampling)
            except (RuntimeError, MemoryError) as error:
                if not _short_of_memory(error):
                    raise
                self._halve_budget(error)
                continue
            for row, of_row in zip(part, drawn, strict=True):
                samples[row] = of_row
            order = order[len(part) :]
        return samples

    def use(self, weights_path: str | Path, *, base: str | Path | None = None) -> None:
        """Another checkpoint's weights, in place; of an adapter its factors alone."""
        self._check_open()
        self._model.use(weights_path, base=base)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None

    def __enter__(self) -> HfSampler:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._model is None:
            raise EngineError("The transformers sampler is closed; open it again.")

    def _fitting(self, prompts: list[Prompt], order: list[int], sampling: Sampling) -> int:
        """How many of the rows (longest first) fit the token budget; at least one."""
        longest = len(prompts[order[0]].ids) + sampling.max_new_tokens
        return max(self._token_budget // (longest * _distinct(sampling)), 1)

    def _halve_budget(self, error: BaseException) -> None:
        if self._token_budget < 64:
            raise EngineError(
                "Memory does not hold the samples of a single prompt. Lower `--set sampling.max_new_tokens=…` or `--set sampling.samples=…`."
            ) from error
        self._token_budget //= 2
        self.notes.append(f"Memory was short: sampling {self._token_budget} tokens at a time.")

    def _batch(self, prompts: list[Prompt], rooms: list[int], sampling: Sampling) -> list[list[Sample]]:
        import torch

        n, steps = _distinct(sampling), max(rooms)
        ids, logps = self._decode([prompt.ids for prompt in prompts], rooms, _uniforms(prompts, n, steps), sampling)
        torch.cuda.empty_cache() if str(self._model.device).startswith("cuda") else None
        drawn = []
        for row, prompt in enumerate(prompts):
            of_row = [self._finish(prompt.ids, ids[row * n + k], logps[row * n + k], sampling) for k in range(n)]
            drawn.append(of_row * (sampling.n // n))  # greedy: n times the same
        return drawn

    def _decode(
        self, prompts: list[list[int]], rooms: list[int], uniforms: np.ndarray, sampling: Sampling
    ) -> tuple[list[list[int]], list[list[float]]]:
        """(generated ids, their log-probs) of every prompt × sample. uniforms: (prompts × n, steps)."""
        import torch

        module, device = self._model.module, self._model.device
        n = len(uniforms) // len(prompts)
        tokens, mask = (padded.to(device) for padded in _padded(prompts))
        generated: list[list[int]] = [[] for _ in range(len(uniforms))]
        logps: list[list[float]] = [[] for _ in range(len(uniforms))]
        limits = np.repeat(rooms, n)
        with torch.inference_mode():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            out = module(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
            )
            cache = _cache_of(module, out)
            if n > 1:
                cache.batch_repeat_interleave(n)
            logits = out.logits[:, -1].repeat_interleave(n, 0)  # (B, V)
            mask, positions = mask.repeat_interleave(n, 0), positions[:, -1:].repeat_interleave(n, 0)
            live = np.arange(len(uniforms))  # which sample each batch row is
            seen = _seen(prompts, logits, sampling)
            for step in range(uniforms.shape[1]):
                logits = logits.float()
                chosen = _draw(
                    _penalised(logits, seen, sampling), sampling, torch.from_numpy(uniforms[live, step]).to(device)
                )  # (B,)
                chosen_logps = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
                if seen is not None:
                    seen[torch.arange(len(seen)), chosen] = True
                going = np.ones(len(live), dtype=bool)
                for at, (sample, token, logp) in enumerate(zip(live, chosen.tolist(), chosen_logps, strict=True)):
                    generated[sample].append(token)
                    logps[sample].append(logp)
                    ended = token in self._stop_ids or len(generated[sample]) >= limits[sample]
                    going[at] = not ended and not self._stopped(prompts[sample // n], generated[sample], sampling.stop)
                if not going.any():
                    break
                if not going.all():
                    kept = torch.from_numpy(np.flatnonzero(going)).to(device)
                    cache.batch_select_indices(kept)
                    chosen, mask, positions, live = chosen[kept], mask[kept], positions[kept], live[going]
                    seen = None if seen is None else seen[kept]
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                positions = positions + 1
                out = module(
                    input_ids=chosen[:, None],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
                logits = out.logits[:, -1]
        return generated, logps

    def _stopped(self, prompt: list[int], ids: list[int], stop: tuple[str, ...]) -> bool:
        """Whether a stop string has just been completed: looked for in the last tokens only."""
        if not stop:
            return False
        tail = max(map(len, stop)) + CONTEXT_TOKENS
        text = self._text(prompt if len(ids) <= tail else ids[:-tail], ids[-tail:])
        return any(word in text for word in stop)

    def _text(self, before: list[int], ids: list[int], shown: tuple[str, ...] = ()) -> str:
        """The text of `ids` after `before`, special tokens left out but those that are `shown`."""
        context = list(map(int, before[-CONTEXT_TOKENS:]))
        head, whole = self._decoded(context, shown), self._decoded(context + ids, shown)
        return whole[len(head) :] if whole.startswith(head) else self._decoded(ids, shown)

    def _decoded(self, ids: list[int], shown: tuple[str, ...]) -> str:
        text = str(self._tokenizer.decode(ids, skip_special_tokens=not shown))
        return without_special(text, self._tokenizer, shown) if shown else text

    def _finish(self, prompt: list[int], ids: list[int], logps: list[float], sampling: Sampling) -> Sample:
        ended = bool(ids) and ids[-1] in self._stop_ids
        text = self._text(prompt, ids[:-1] if ended else ids, sampling.shown)
        cuts = [text.index(word) for word in sampling.stop if word in text]
        if cuts:
            text, ended = text[: min(cuts)], True
        logp = float(np.sum(logps, dtype=np.float64))
        own = tuple(ids) if sampling.with_ids else None
        return Sample(text=text, n_tokens=len(ids), logp=logp, finished=ended, ids=own)


def _padded(prompts: list[list[int]]) -> tuple[Any, Any]:
    """Two (prompts, longest) long tensors: the tokens, padded at the left, and 1 where they are."""
    import torch

    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.as_tensor(list(map(int, ids)))
        mask[row, width - len(ids) :] = 1
    return tokens, mask


def _cache_of(module: Any, out: Any) -> Any:
    """The keys and values of a forward pass; ModelError for a model that keeps none by row."""
    cache = out.past_key_values
    if cache is None or not hasattr(cache, "batch_repeat_interleave"):
        raise ModelError(
            f"{type(module).__name__}: wanted a model with a KV cache, found {type(cache).__name__}. Sample it through a server."
        )
    return cache


def _seen(prompts: list[list[int]], logits: Any, sampling: Sampling) -> Any:
    """(B, V) which tokens the prompt of each sample has, for the repetition penalty; None without one."""
    import torch

    if sampling.repetition_penalty in (None, 1.0):
        return None
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    n = len(logits) // len(prompts)
    for row, ids in enumerate(prompts):
        seen[row * n : (row + 1) * n, torch.as_tensor(list(map(int, ids)), device=logits.device)] = True
    return seen


def _penalised(logits: Any, seen: Any, sampling: Sampling) -> Any:
    """(B, V) logits, those of tokens that were there divided by the penalty where positive, else multiplied."""
    if seen is None:
        return logits
    penalty = sampling.repetition_penalty
    return logits.where(~seen, (logits / penalty).where(logits > 0, logits * penalty))


def _draw(logits: Any, sampling: Sampling, uniform: Any) -> Any:
    """(B,) tokens from (B, V) float32 logits and (B,) float64 uniforms."""
    import torch
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.min_p:
        scores = MinPLogitsWarper(float(sampling.min_p))(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(int(sampling.top_k))(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(float(sampling.top_p))(None, scores)
    cumulative = scores.double().softmax(-1).cumsum(-1)  # (B, V)
    target = (uniform * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[1] - 1)


def _uniforms(prompts: list[Prompt], n: int, steps: int) -> np.ndarray:
    """(prompts × n, steps) float64 in [0, 1): each sample's own stream, whatever its neighbours and max_new_tokens."""
    rows = [
        np.random.Generator(np.random.PCG64([engine_seed(prompt.seed), prompt.first + k])).random(steps)
        for prompt in prompts
        for k in range(n)
    ]
    return np.stack(rows)


def _distinct(sampling: Sampling) -> int:
    return 1 if sampling.temperature == 0 else sampling.n


def _stop_ids(tokenizer: Any, module: Any) -> frozenset[int]:
    """EOS of the tokenizer and of the model's generation settings."""
    stops = [tokenizer.eos_token_id, getattr(getattr(module, "generation_config", None), "eos_token_id", None)]
    return frozenset(i for ids in stops if ids is not None for i in (ids if isinstance(ids, list | tuple) else [ids]))


def _short_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "allocate memory" in words
