"""Sampling through a server that speaks OpenAI's protocol: vLLM's own, or any other.

At most `concurrency` requests are in the air. The address, its key and its errors are openai_client.py; one request and its answer are
openai_requests.py.

A server may be restarted with other weights at any time. Who says which model is expected (server_probe.py) has it checked before the first
answer and after every call of `sample`: answers of a server that changed meanwhile are not given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curate.errors import EngineError
from curate.passes.sampling.engines import sampler_identity
from curate.passes.sampling.openai_client import NoSuchPath, Server, listed, run
from curate.passes.sampling.openai_requests import Requests, spoken
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


class OpenAISampler:
    """A `Sampler` (see types.py) over a server.

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
        self.server = Server(server)
        self.requests = Requests(self.server)
        self.url, self.notes = self.server.url, self.requests.notes
        self.chat_only = False  # whether the server was found to take messages alone
        self.expected = expected
        self._served = run(self.server.models())
        alike = [name for name in self._served if {name, Path(name).name} & set(prefer)]
        named = alike if len(self._served) > 1 else []
        self.server.model = self._pick(server.get("model") or (named[0] if len(named) == 1 else None))
        served = self._served.get(self.model, {}).get("max_model_len")
        self.context = min(filter(None, (max_length, served)), default=None)
        self.engine, _ = sampler_identity("openai", None, server=server)
        self.confirm()

    @property
    def model(self) -> str:
        """The name of the model that is asked."""
        return str(self.server.model)

    def sample(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        """n samples per prompt, in the prompts' order; an empty list where the prompt leaves no room in the server's context.

        Raises EngineError where the server has another model than the expected one by now.
        """
        if not prompts:
            return []
        answers: list[list[Sample]] = run(self._all(prompts, sampling))
        self.confirm()
        return answers

    def description(self) -> dict[str, Any]:
        """What the server says of the model, asked now: model, root, max_model_len, version (None where it does not say)."""
        self._served, version = run(self._ask_all())
        about = self._served.get(self.model)
        if about is None and self._served:
            raise EngineError(f"{self.url} serves {listed(self._served)} now, and no longer {self.model}.")
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
        return dict(run(self._probe(prompts, self.server.concurrency if at_once else 1)))

    def confirm(self) -> None:
        """EngineError where the server does not serve the expected model (any more): other answers to the probe, even when asked again."""
        if self.expected is None:
            return
        now, noise = self.description(), Noise(*self.expected["noise"])
        known = {key: Spoken.from_json(spoken) for key, spoken in self.expected["probe"].items()}
        changed: str | None = ", ".join(
            f"{key} was {before}, and is {now.get(key)}"
            for key, before in self.expected["said"].items()
            if now.get(key) != before
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

    def use(self, weights_path: str | Path, *, base: str | Path | None = None) -> None:
        """Another of the models this server serves, by its name or its folder's name."""
        names = (str(weights_path), Path(weights_path).name)
        served = [name for name in self._served if name in names]
        if not served:
            raise EngineError(
                f"{self.url} serves {listed(self._served)}, not {weights_path}: a server cannot swap in a checkpoint. "
                "A series of checkpoints needs a local engine: `--set engine.sampler=auto --set server.url=null`."
            )
        self.server.model = served[0]
        self.engine = f"openai {self.url} {self.model}"

    def close(self) -> None:
        """Nothing stays open between calls."""

    def __enter__(self) -> OpenAISampler:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def _ask_all(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        return await self.server.models(), await self.server.version()

    async def _probe(self, prompts: Sequence[Asked], most: int) -> list[tuple[str, Spoken]]:
        gate = asyncio.Semaphore(most)
        greedy = Sampling(n=1, temperature=0, max_new_tokens=TOKENS)
        failures: dict[str, EngineError] = {}  # `key_of` a prompt -> why it has no answer

        async def one(client: Any, prompt: Asked) -> list[tuple[str, Spoken]]:
            text = isinstance(prompt, str) and not self.chat_only
            messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
            asked = Prompt([], str(prompt) if text else "", None if text else messages, 0)
            try:
                answer = await self.requests.ask(client, gate, asked, greedy, 1, 0, TOKENS)
            except NoSuchPath:
                if not text:
                    raise
                self.chat_only = True
                return await one(client, prompt)
            except EngineError as error:
                failures[key_of(prompt)] = error
                return []
            return [] if answer is None else [(key_of(prompt), spoken(answer.choices[0], chat=not text))]

        async with self.server.client(questions=True) as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(client, prompt)) for prompt in prompts]
        answers = [pair for task in tasks for pair in task.result()]
        own = [prompt for prompt in prompts if prompt not in FIXED] or prompts
        if failures and all(key_of(prompt) in failures for prompt in own):  # then rows cannot be sampled either
            raise failures[key_of(own[0])]
        return answers

    def _pick(self, requested: str | None) -> str:
        if requested and (not self._served or requested in self._served):
            return requested
        if requested:
            raise EngineError(
                f"server.model: wanted one that {self.url} serves ({listed(self._served)}), found {requested!r}."
            )
        if len(self._served) == 1:
            return next(iter(self._served))
        what_is_served = (
            f"{len(self._served)}: {listed(self._served)}"
            if self._served
            else "no list of models (does the url end in /v1?)"
        )
        raise EngineError(
            f"{self.url}: wanted a server of one model, found {what_is_served}. Name one: `--set server.model=…`."
        )

    async def _all(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        gate = asyncio.Semaphore(self.server.concurrency)
        async with self.server.client() as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._row(client, gate, prompt, sampling)) for prompt in prompts]
        return [task.result() for task in tasks]

    async def _row(self, client: Any, gate: asyncio.Semaphore, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        most = room(len(prompt.ids), sampling.max_new_tokens, self.context) if prompt.ids else sampling.max_new_tokens
        if most <= 0:
            return []
        count = 1 if sampling.temperature == 0 else sampling.n
        samples: list[Sample] = []
        while len(samples) < count:
            n = 1 if "n" in self.requests.lacking else count - len(samples)
            seed = (
                engine_seed(prompt.seed) + prompt.first + len(samples)
            )  # vLLM gives sample k of a request seed + k: the same either way
            answer = await self.requests.ask(client, gate, prompt, sampling, n, seed, most)
            if answer is None:
                return []
            drawn = self.requests.samples(answer, chat=bool(prompt.messages))
            if len(drawn) < n:
                self.requests.lack("n")
            samples += drawn
        return samples[:count] * (sampling.n if sampling.temperature == 0 else 1)
