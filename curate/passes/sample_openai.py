"""Sampling through a server that speaks OpenAI's protocol: vLLM's own, or any other.

Plain prompts go to /v1/completions as text, conversational ones to /v1/chat/completions as messages. At most `concurrency` requests are in
the air; 429, 5xx, timeouts and broken connections are tried again by the client library, with growing pauses. A server that does not know
`n`, `seed` or `logprobs` is asked without them, and `notes` says so.

Source: the `openai` client library (https://github.com/openai/openai-python); it is imported when a server is used.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from curate.errors import EngineError, UsageError
from curate.passes.sampling import Prompt, Sample, Sampling, engine_seed, room, sampler_identity

CONTEXT_WORDS = re.compile(
    r"context length|context_length|maximum.{0,20}(tokens|length)|max_model_len|too long", re.IGNORECASE
)
WITHOUT = {
    "logprobs": "log-probs of samples are unknown (NULL)",
    "seed": "samples are not seeded: a repeated shard will differ",
    "n": "one request per sample",
}

NO_URL = "server.url: wanted the address of an OpenAI-compatible server, found none. `--set server.url=http://localhost:8000/v1`"


class OpenAISampler:
    """A `Sampler` (see sampling.py) over a server.

    server: {url, key_env, concurrency} and, where wanted, {model, timeout (seconds per request), retries}. Without `model` the server must
    serve exactly one. Raises UsageError for a section without url, EngineError for a server that cannot be reached, refuses the key, does
    not know the model, or keeps failing.
    """

    name = "openai"

    def __init__(self, server: dict[str, Any], *, max_length: int | None = None):
        if not server.get("url"):
            raise UsageError(NO_URL)
        self.url = str(server["url"]).rstrip("/")
        self.key_env = str(server.get("key_env") or "OPENAI_API_KEY")
        self.concurrency = int(server.get("concurrency") or 16)
        self.timeout = float(server.get("timeout") or 600)
        self.retries = int(server["retries"]) if server.get("retries") is not None else 4
        self.notes: list[str] = []
        self._lacking: set[str] = set()
        self._served = _run(self._list_models())
        self.model = self._pick(server.get("model"))
        self.context = min(filter(None, (max_length, self._served.get(self.model))), default=None)
        self.engine, _ = sampler_identity("openai", None, server=server)

    def sample(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        """n samples per prompt, in the prompts' order; an empty list where the prompt leaves no room in the server's context."""
        return _run(self._all(prompts, sampling)) if prompts else []

    def likelihood(self, encoded: list[Any]) -> np.ndarray:
        """Never: a server's token boundaries cannot be checked against ours."""
        raise EngineError(
            "Log-probabilities are measured with torch or a local vLLM, not through a server: `--set engine.sampler=auto`."
        )

    def use(self, weights_path: str | Path, *, base: str | Path | None = None) -> None:
        """Another of the models this server serves, by its name or its folder's name."""
        wanted = (str(weights_path), Path(weights_path).name)
        found = [name for name in self._served if name in wanted]
        if not found:
            raise EngineError(
                f"{self.url} serves {_listed(self._served)}, not {weights_path}: a server cannot swap in a checkpoint. "
                "A series of checkpoints needs a local engine: `--set engine.sampler=auto`."
            )
        self.model = found[0]
        self.engine = f"openai {self.url} {self.model}"

    def close(self) -> None:
        """Nothing stays open between calls."""

    def __enter__(self) -> OpenAISampler:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _client(self) -> Any:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise EngineError(
                "engine.sampler is openai, which needs its client library: `pip install openai`."
            ) from error
        key = os.environ.get(self.key_env) or "none"  # servers of one's own often want no key
        return AsyncOpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)

    async def _list_models(self) -> dict[str, int | None]:
        """{name: context length, None where the server does not say}; empty when it has no list."""
        import openai

        async with self._client() as client:
            try:
                listed = [model async for model in client.models.list()]
            except (openai.NotFoundError, openai.APIResponseValidationError):
                return {}
            except openai.OpenAIError as error:
                raise self._explained(error) from error
        return {model.id: getattr(model, "max_model_len", None) for model in listed}

    def _pick(self, wanted: str | None) -> str:
        if wanted and (not self._served or wanted in self._served):
            return wanted
        if wanted:
            raise EngineError(
                f"server.model: wanted one that {self.url} serves ({_listed(self._served)}), found {wanted!r}."
            )
        if len(self._served) == 1:
            return next(iter(self._served))
        found = (
            f"{len(self._served)}: {_listed(self._served)}"
            if self._served
            else "no list of models (does the url end in /v1?)"
        )
        raise EngineError(f"{self.url}: wanted a server of one model, found {found}. Name one: `--set server.model=…`.")

    async def _all(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        gate = asyncio.Semaphore(self.concurrency)
        async with self._client() as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._row(client, gate, prompt, sampling)) for prompt in prompts]
        return [task.result() for task in tasks]

    async def _row(self, client: Any, gate: asyncio.Semaphore, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        most = room(len(prompt.ids), sampling.max_new_tokens, self.context) if prompt.ids else sampling.max_new_tokens
        if most <= 0:
            return []
        wanted = 1 if sampling.temperature == 0 else sampling.n
        samples: list[Sample] = []
        while len(samples) < wanted:
            n = 1 if "n" in self._lacking else wanted - len(samples)
            seed = (
                engine_seed(prompt.seed) + prompt.first + len(samples)
            )  # vLLM gives sample k of a request seed + k: the same either way
            answer = await self._request(client, gate, prompt, sampling, n, seed, most)
            if answer is None:
                return []
            if len(answer) < n:
                self._lack("n")
            if not answer:
                raise EngineError(
                    f"{self.url} answered a request without any choice. Is it an OpenAI-compatible server?"
                )
            samples += answer
        return samples[:wanted] * (sampling.n if sampling.temperature == 0 else 1)

    async def _request(
        self, client: Any, gate: asyncio.Semaphore, prompt: Prompt, sampling: Sampling, n: int, seed: int, most: int
    ) -> list[Sample] | None:
        """The answer's samples; None when the prompt does not fit the server's context."""
        import openai

        while True:
            arguments: dict[str, Any] = {
                "model": self.model,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
            limit = "max_completion_tokens" if "max_tokens" in self._lacking else "max_tokens"
            arguments[limit] = most
            if sampling.stop:
                arguments["stop"] = list(sampling.stop)
            if n > 1:
                arguments["n"] = n
            if "seed" not in self._lacking:
                arguments["seed"] = seed
            if "logprobs" not in self._lacking:
                arguments["logprobs"] = True if prompt.messages else 0
            known = set(self._lacking)
            try:
                async with gate:
                    if prompt.messages:
                        messages = [dict(message) for message in prompt.messages]
                        answer = await client.chat.completions.create(messages=messages, **arguments)
                    else:
                        answer = await client.completions.create(prompt=prompt.text, **arguments)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if known != self._lacking:
                    if n > 1 and "n" in self._lacking:
                        n = 1
                    continue  # another row learned it meanwhile
                if CONTEXT_WORDS.search(str(error)):
                    return None
                lacking = _named(str(error), arguments)
                if lacking is None:
                    raise self._explained(error) from error
                self._lack(lacking)
                n = 1 if lacking == "n" else n
            except openai.OpenAIError as error:
                raise self._explained(error) from error
            else:
                return self._samples(answer, chat=bool(prompt.messages))

    def _samples(self, answer: Any, *, chat: bool) -> list[Sample]:
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        samples = []
        for choice in choices:
            text = (choice.message.content or "") if chat else choice.text
            logps = _token_logps(choice, chat=chat)
            tokens = (
                len(logps)
                if logps is not None
                else answer.usage.completion_tokens
                if answer.usage and len(choices) == 1
                else None
            )
            logp = float(np.sum(logps)) if logps is not None else None
            samples.append(Sample(text=text, n_tokens=tokens, logp=logp, finished=choice.finish_reason == "stop"))
        if samples and samples[0].logp is None:
            self._lack("logprobs")
        return samples

    def _lack(self, ability: str) -> None:
        if ability not in self._lacking:
            self._lacking.add(ability)
            if ability in WITHOUT:
                self.notes.append(f"{self.url} does not take `{ability}`: {WITHOUT[ability]}.")

    def _explained(self, error: Exception) -> EngineError:
        """What the user can do about a client library's error."""
        import openai

        tried = f"after {self.retries + 1} attempts" if self.retries else "at the first attempt"
        text = " ".join(str(error).split())[:400]
        if isinstance(error, openai.APITimeoutError):
            return EngineError(
                f"{self.url}: no answer within {self.timeout:g} s {tried}. Raise `--set server.timeout=…`, or lower "
                f"`--set server.concurrency=…` (now {self.concurrency})."
            )
        if isinstance(error, openai.APIConnectionError):
            return EngineError(
                f"{self.url}: no server reached {tried} ({error.__cause__ or text}). Check `server.url`, or start one: "
                "`python -m vllm.entrypoints.openai.api_server --model MODEL`."
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            state = "is set, but refused" if os.environ.get(self.key_env) else "is not set"
            return EngineError(
                f"{self.url}: wanted a valid key, and the environment variable {self.key_env} {state} ({text}). Set it, or `--set server.key_env=…`."
            )
        if isinstance(error, openai.NotFoundError):
            return EngineError(
                f"{self.url}: the server does not know the model {getattr(self, 'model', '?')!r} or this path ({text}). "
                "Name one with `--set server.model=…`; the url usually ends in /v1."
            )
        if isinstance(error, openai.RateLimitError):
            return EngineError(
                f"{self.url}: too many requests {tried} ({text}). Lower `--set server.concurrency=…` (now {self.concurrency})."
            )
        return EngineError(f"{self.url}: failed {tried} ({text}). Look at the server's log; what is measured is kept.")


def _token_logps(choice: Any, *, chat: bool) -> list[float] | None:
    logprobs = getattr(choice, "logprobs", None)
    if logprobs is None:
        return None
    if chat:
        return [token.logprob for token in logprobs.content] if logprobs.content is not None else None
    return (
        [value for value in logprobs.token_logprobs if value is not None]
        if logprobs.token_logprobs is not None
        else None
    )


def _named(message: str, arguments: dict[str, Any]) -> str | None:
    """Which of the arguments that can be left out a server's complaint names."""
    if "max_tokens" in arguments and "max_completion_tokens" in message:
        return "max_tokens"
    words = {"logprobs": r"logprob", "seed": r"\bseed\b", "n": r"['\"`]n['\"`]|\bn\b\s*(=|>|must|is|should)|best_of"}
    return next((name for name, pattern in words.items() if name in arguments and re.search(pattern, message)), None)


def _listed(names: Any) -> str:
    return ", ".join(names) or "nothing"


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, also where a loop is running already (notebooks). A group's first error stands for the group."""
    result: list[Any] = []

    def body() -> None:
        try:
            result.append(asyncio.run(work))
        except BaseException as error:
            result.append(error)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        body()
    else:
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    outcome = result[0]
    while isinstance(outcome, BaseExceptionGroup):
        outcome = outcome.exceptions[0]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
