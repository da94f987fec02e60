"""Sampling through a server that speaks OpenAI's protocol: vLLM's own, or any other.

Plain prompts go to /v1/completions as text, conversational ones to /v1/chat/completions as messages. At most `concurrency` requests are in
the air; 429, 5xx, timeouts and broken connections are tried again by the client library, with growing pauses. A server that does not know
`n`, `seed` or `logprobs` is asked without them, and `notes` says so.

A server may be restarted with other weights at any time. Who says which model is expected (server_probe.py) has it checked before the first
answer and after every call of `sample`: answers of a server that changed meanwhile are not given back.

Source: the `openai` client library (https://github.com/openai/openai-python); it is imported when a server is used.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curate.errors import EngineError, UsageError
from curate.passes.sampling.engines import sampler_identity
from curate.passes.sampling.server_probe import (
    FIXED,
    TOKENS,
    Asked,
    Noise,
    Probe,
    Spoken,
    difference,
    key_of,
    prompt_of,
)
from curate.passes.sampling.types import Prompt, Sample, Sampling, engine_seed, room

CONTEXT_WORDS = re.compile(
    r"context length|context_length|maximum.{0,20}(tokens|length)|max_model_len|too long", re.IGNORECASE
)
WITHOUT = {
    "logprobs": "log-probs of samples are unknown (NULL)",
    "seed": "samples are not seeded: a repeated shard will differ",
    "n": "one request per sample",
}

ASKED_TWICE = 1  # how often a question about the server is tried again: who waits for a plan wants to know now
PATIENCE = 60.0  # seconds that such a question may take

NO_URL = "server.url: wanted the address of an OpenAI-compatible server, found none. `--set server.url=http://localhost:8000/v1`"


class NoSuchPath(EngineError):
    """The server does not know the model, or the kind of request: 404."""


class OpenAISampler:
    """A `Sampler` (see sampling.py) over a server.

    server: {url, key_env, concurrency} and, where wanted, {model, timeout (seconds per request), retries}. Without `model` the server must
    serve exactly one. Raises UsageError for a section without url, EngineError for a server that cannot be reached, refuses the key, does
    not know the model, or keeps failing.

    expected: {said, probe, noise} of the model that answers must come from (None: whichever is there), see `confirm`. prefer: names of which one
    is meant where the server has several models.
    """

    name = "openai"

    def __init__(
        self,
        server: dict[str, Any],
        *,
        max_length: int | None = None,
        expected: Any = None,
        prefer: Sequence[str] = (),
    ):
        if not server.get("url"):
            raise UsageError(NO_URL)
        self.url = str(server["url"]).rstrip("/")
        self.key_env = str(server.get("key_env") or "OPENAI_API_KEY")
        self.concurrency = int(server.get("concurrency") or 16)
        self.timeout = float(server.get("timeout") or 600)
        self.retries = int(server["retries"]) if server.get("retries") is not None else 4
        self.notes: list[str] = []
        self._lacking: set[str] = set()
        self.chat_only = False  # whether the server was found to take messages alone
        self.expected = expected
        self._served = _run(self._list_models())
        alike = [name for name in self._served if {name, Path(name).name} & set(prefer)]
        named = alike if len(self._served) > 1 else []
        self.model = self._pick(server.get("model") or (named[0] if len(named) == 1 else None))
        served = self._served.get(self.model, {}).get("max_model_len")
        self.context = min(filter(None, (max_length, served)), default=None)
        self.engine, _ = sampler_identity("openai", None, server=server)
        self.confirm()

    def sample(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        """n samples per prompt, in the prompts' order; an empty list where the prompt leaves no room in the server's context.

        Raises EngineError where the server has another model than the expected one by now.
        """
        if not prompts:
            return []
        answers: list[list[Sample]] = _run(self._all(prompts, sampling))
        self.confirm()
        return answers

    def said(self) -> dict[str, Any]:
        """What the server says of the model, asked now: model, root, max_model_len, version (None where it does not say)."""
        self._served, version = _run(self._ask_all())
        about = self._served.get(self.model)
        if about is None and self._served:
            raise EngineError(f"{self.url} serves {_listed(self._served)} now, and no longer {self.model}.")
        about = about or {}
        return {
            "model": self.model,
            "root": about.get("root"),
            "max_model_len": about.get("max_model_len"),
            "version": version,
        }

    def probe(self, prompts: Sequence[Asked], *, at_once: bool = False) -> Probe:
        """Greedy answers to prompts (text, or messages), one by one or all at once.

        Those that the server has no room for, or fails on, are left out; EngineError where it fails on every one of the rows'.

        A server that takes messages alone is asked the texts as a user's; they stay under their own key.
        """
        return dict(_run(self._probe(prompts, self.concurrency if at_once else 1)))

    def confirm(self) -> None:
        """EngineError where the server does not serve the expected model (any more): other answers to the probe, even when asked again."""
        if self.expected is None:
            return
        said, noise = self.said(), Noise(*self.expected["noise"])
        known = {key: Spoken.from_json(spoken) for key, spoken in self.expected["probe"].items()}
        changed: str | None = ", ".join(
            f"{key} was {before}, and is {said.get(key)}"
            for key, before in self.expected["said"].items()
            if said.get(key) != before
        )
        for _ in range(0 if changed else 2):  # other traffic may have disturbed the first
            changed = difference(known, self.probe([prompt_of(key) for key in known]), noise)
            if changed is None:
                return
        raise EngineError(
            f"{self.url}: the server has another model now than when this run was planned: {changed}. Answers that it gave since the "
            "last check are thrown away, those before are kept as the earlier model's. Run the command again: it asks who is there, and "
            "measures that model."
        )

    def likelihood(self, encoded: list[Any]) -> np.ndarray:
        """Never: a server's token boundaries cannot be checked against ours."""
        raise EngineError(
            "Log-probabilities are measured with torch or a local vLLM, not through a server: `--set engine.sampler=auto --set server.url=null`."
        )

    def use(self, weights_path: str | Path, *, base: str | Path | None = None) -> None:
        """Another of the models this server serves, by its name or its folder's name."""
        wanted = (str(weights_path), Path(weights_path).name)
        found = [name for name in self._served if name in wanted]
        if not found:
            raise EngineError(
                f"{self.url} serves {_listed(self._served)}, not {weights_path}: a server cannot swap in a checkpoint. "
                "A series of checkpoints needs a local engine: `--set engine.sampler=auto --set server.url=null`."
            )
        self.model = found[0]
        self.engine = f"openai {self.url} {self.model}"

    def close(self) -> None:
        """Nothing stays open between calls."""

    def __enter__(self) -> OpenAISampler:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _client(self, *, questions: bool = False) -> Any:
        """questions: about the server, which are answered at once or not at all; else requests that are a run's work."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise EngineError(
                "engine.sampler is openai, which needs its client library: `pip install openai`."
            ) from error
        key = os.environ.get(self.key_env) or "none"  # servers of one's own often want no key
        if questions:
            self.attempts, self.waited = min(self.retries, ASKED_TWICE) + 1, min(self.timeout, PATIENCE)
        else:
            self.attempts, self.waited = self.retries + 1, self.timeout
        return AsyncOpenAI(base_url=self.url, api_key=key, timeout=self.waited, max_retries=self.attempts - 1)

    async def _list_models(self) -> dict[str, dict[str, Any]]:
        """name -> what the server says of each model; empty when it has no list. EngineError where it cannot be asked."""
        import httpx
        import openai

        async with self._client(questions=True) as client:
            try:
                answer = await client.get("/models", cast_to=httpx.Response)
            except openai.NotFoundError:
                return {}
            except openai.OpenAIError as error:
                raise self._explained(error) from error
        try:
            listed = answer.json()["data"]
            return {str(model["id"]): model for model in listed}
        except (ValueError, KeyError, TypeError):
            told = " ".join(answer.text.split())[:80]
            raise EngineError(
                f"{self.url}/models: wanted a list of models as an OpenAI-compatible server gives it, found "
                f"{answer.headers.get('content-type', 'no type')}: {told!r}. Is this the server's address? The url usually ends in /v1."
            ) from None

    async def _ask_all(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        return await self._list_models(), await self._version()

    async def _version(self) -> str | None:
        """vLLM's version, which it gives outside of /v1; None where there is none to be had."""
        import httpx
        import openai

        place = self.url.removesuffix("/v1") + "/version"
        async with self._client(questions=True) as client:
            try:
                answer = await client.get(place, cast_to=httpx.Response)
                found = answer.json()["version"]
            except (openai.OpenAIError, ValueError, KeyError, TypeError):
                return None
        return str(found)

    async def _probe(self, prompts: Sequence[Asked], most: int) -> list[tuple[str, Spoken]]:
        gate = asyncio.Semaphore(most)
        greedy = Sampling(n=1, temperature=0, max_new_tokens=TOKENS)
        failures: dict[str, EngineError] = {}  # `key_of` a prompt -> why it has no answer

        async def one(client: Any, prompt: Asked) -> list[tuple[str, Spoken]]:
            text = isinstance(prompt, str) and not self.chat_only
            messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
            asked = Prompt([], str(prompt) if text else "", None if text else messages, 0)
            try:
                answer = await self._answer(client, gate, asked, greedy, 1, 0, TOKENS)
            except NoSuchPath:
                if not text:
                    raise
                self.chat_only = True
                return await one(client, prompt)
            except EngineError as error:
                failures[key_of(prompt)] = error
                return []
            return [] if answer is None else [(key_of(prompt), _spoken(answer.choices[0], chat=not text))]

        async with self._client(questions=True) as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(client, prompt)) for prompt in prompts]
        answers = [found for task in tasks for found in task.result()]
        own = [prompt for prompt in prompts if prompt not in FIXED] or prompts
        if failures and all(key_of(prompt) in failures for prompt in own):  # then rows cannot be sampled either
            raise failures[key_of(own[0])]
        return answers

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
            samples += answer
        return samples[:wanted] * (sampling.n if sampling.temperature == 0 else 1)

    async def _request(
        self, client: Any, gate: asyncio.Semaphore, prompt: Prompt, sampling: Sampling, n: int, seed: int, most: int
    ) -> list[Sample] | None:
        """The answer's samples; None when the prompt does not fit the server's context."""
        answer = await self._answer(client, gate, prompt, sampling, n, seed, most)
        return None if answer is None else self._samples(answer, chat=bool(prompt.messages))

    async def _answer(
        self, client: Any, gate: asyncio.Semaphore, prompt: Prompt, sampling: Sampling, n: int, seed: int, most: int
    ) -> Any:
        """The server's answer, with choices; None when the prompt does not fit the server's context."""
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
                if CONTEXT_WORDS.search(_told(error)):
                    return None
                lacking = _named(_told(error), arguments)
                if lacking is None:
                    raise self._explained(error) from error
                self._lack(lacking)
                n = 1 if lacking == "n" else n
            except openai.OpenAIError as error:
                raise self._explained(error) from error
            else:
                if not getattr(answer, "choices", None):
                    raise EngineError(
                        f"{self.url} answered a request without any choice ({' '.join(str(answer).split())[:80]!r}). "
                        "Is it an OpenAI-compatible server? The url usually ends in /v1."
                    )
                return answer

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

        tried = f"after {self.attempts} attempts" if self.attempts > 1 else "at the first attempt"
        text = _told(error)[:400]
        if isinstance(error, openai.APITimeoutError):
            return EngineError(
                f"{self.url}: no answer within {self.waited:g} s {tried}. Raise `--set server.timeout=…`, or lower "
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
            return NoSuchPath(
                f"{self.url}: the server does not know the model {getattr(self, 'model', '?')!r} or this path ({text}). "
                "Name one with `--set server.model=…`; the url usually ends in /v1."
            )
        if isinstance(error, openai.RateLimitError):
            return EngineError(
                f"{self.url}: too many requests {tried} ({text}). Lower `--set server.concurrency=…` (now {self.concurrency})."
            )
        return EngineError(f"{self.url}: failed {tried} ({text}). Look at the server's log; what is measured is kept.")


def _told(error: Exception) -> str:
    """What an error says, with the server's own words where the client library leaves them out."""
    body = getattr(error, "body", None)
    words = str(error)
    if body and not isinstance(body, dict) and str(body) not in words:
        words += f": {body}"
    return " ".join(words.split())


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


def _spoken(choice: Any, *, chat: bool) -> Spoken:
    """A choice's tokens with their log-probabilities; its text where there are none, or none that are numbers."""
    text = (choice.message.content or "") if chat else (choice.text or "")
    logprobs = getattr(choice, "logprobs", None)
    logps = _token_logps(choice, chat=chat)
    if logprobs is None or not logps or not all(math.isfinite(value) for value in logps):
        return Spoken((text,))
    tokens = [token.token for token in logprobs.content] if chat else list(logprobs.tokens or [])
    return Spoken(tuple(tokens), tuple(logps)) if len(tokens) == len(logps) else Spoken((text,))


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
