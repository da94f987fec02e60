"""The child's side of vllm.py: one vLLM engine, in-process, answering sample / use / adapt.

Run as `python -m curate.passes.sampling.vllm_worker FD` by process.py; nothing else imports it.
"""

from __future__ import annotations

from typing import Any

from curate.passes.sampling.process import serve
from curate.passes.thinking import without_special


class Engine:
    """vLLM's LLM and what is asked of it. Plain types in and out: they cross a pipe."""

    def __init__(self, **settings: Any):
        from vllm import LLM

        self.llm = LLM(**settings, disable_log_stats=True)  # prefix caching is on wherever the model allows it
        self.adapter: Any = None  # the LoRARequest under which everything runs
        self._adapters = 0

    def about(self) -> dict[str, Any]:
        config = self.llm.llm_engine.model_config
        return {"max_model_len": int(config.max_model_len), "dtype": str(config.dtype).removeprefix("torch.")}

    def use(self, path: str) -> None:
        """Another checkpoint's weights in place; what was cached under the old ones is forgotten."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        self.llm.collective_rpc(repack_tied_head)
        self.llm.reset_prefix_cache()

    def adapt(self, path: str | None) -> None:
        """Another adapter on the base, or none. Read now, so that what is wrong with it is said now."""
        from vllm.lora.request import LoRARequest

        if self.adapter is not None:
            self.llm.llm_engine.remove_lora(self.adapter.lora_int_id)
            self.adapter = None
        self.llm.reset_prefix_cache()
        if path is None:
            return
        self._adapters += 1  # an id of its own: nothing that was kept under another adapter can be taken for this one's
        request = LoRARequest(f"adapter-{self._adapters}", self._adapters, path)
        self.llm.llm_engine.add_lora(request)
        self.adapter = request

    def sample(
        self,
        ids: list[list[int]],
        seeds: list[int],
        max_tokens: list[int],
        n: int,
        temperature: float,
        top_p: float,
        stop: list[str],
        further: dict[str, Any] | None = None,
        shown: list[str] | None = None,
        with_ids: bool = False,
    ) -> list[list[tuple[Any, ...]]]:
        """Per prompt, n of (text, tokens, summed logp, finished), with_ids their ids too. One generate call; vLLM seeds sample k of a prompt with
        seed + k. further: other arguments of SamplingParams. shown: special tokens that are text.
        """
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()  # a repeated shard starts from the same state, so it repeats to the last bit
        parameters = [
            SamplingParams(
                n=n,
                temperature=temperature,
                top_p=top_p,
                max_tokens=most,
                stop=stop,
                seed=seed,
                logprobs=0,
                skip_special_tokens=not shown,
                **(further or {}),
            )
            for seed, most in zip(seeds, max_tokens, strict=True)
        ]
        prompts = [{"prompt_token_ids": row} for row in ids]
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False, lora_request=self.adapter)
        return [
            [
                (
                    without_special(o.text, self.llm.get_tokenizer(), shown) if shown else o.text,
                    len(o.token_ids),
                    o.cumulative_logprob,
                    o.finish_reason == "stop",
                    *([list(o.token_ids)] if with_ids else []),
                )
                for o in sorted(output.outputs, key=lambda o: o.index)
            ]
            for output in outputs
        ]


def repack_tied_head(worker: Any) -> None:
    """On the CPU the LM head multiplies by a packed copy of its weights. Tied to the embedding it is in no checkpoint, so
    `reload_weights` (vLLM 0.32) leaves the copy at the old checkpoint: log-probs would mix the two."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in worker.model_runner.get_model().modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


if __name__ == "__main__":
    serve(Engine)
