"""A server that speaks OpenAI's protocol: its address and key, how long it is waited for, and its errors in words.

429, 5xx, timeouts and broken connections are tried again by the client library, with growing pauses. Questions about the server are answered
at once or not at all: who waits for a plan wants to know now.

Source: the `openai` client library (https://github.com/openai/openai-python); it is imported when a server is used.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Coroutine
from typing import Any
from urllib.parse import unquote

from curate.errors import EngineError, UsageError, without_secrets

ASKED_TWICE = 1  # how often a question about the server is tried again
LOGIN = re.compile(r"(?<=//)[^/?#]*@")  # user:password@, which is sent and never said
PATIENCE = 60.0  # seconds that such a question may take

NO_URL = "server.url: wanted the address of an OpenAI-compatible server, found none. `--set server.url=http://localhost:8000/v1`"


class NoSuchPath(EngineError):
    """The server does not know the model, or the kind of request: 404."""


class Server:
    """An address to send requests to. model: which of its models is asked, None until it is known.

    settings: {url, key_env, concurrency, timeout (seconds per request), retries}. UsageError without url.
    """

    def __init__(self, settings: dict[str, Any]):
        if not settings.get("url"):
            raise UsageError(NO_URL)
        url = str(settings["url"]).rstrip("/")
        login = LOGIN.search(url)
        self.url = LOGIN.sub("", url, count=1)  # what is said and kept
        self._login = getattr(settings["url"], "login", "") or (login[0] if login else "")
        self.key_env = str(settings.get("key_env") or "OPENAI_API_KEY")
        self.concurrency = int(settings.get("concurrency") or 16)
        self.timeout = float(settings.get("timeout") or 600)
        self.retries = int(settings["retries"]) if settings.get("retries") is not None else 4
        self.model: str | None = None

    def client(self, *, questions: bool = False) -> Any:
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
        return AsyncOpenAI(
            base_url=self._sent_to(self.url), api_key=key, timeout=self.waited, max_retries=self.attempts - 1
        )

    async def models(self) -> dict[str, dict[str, Any]]:
        """name -> what the server says of each model; empty when it has no list. EngineError where it cannot be asked."""
        import httpx
        import openai

        async with self.client(questions=True) as client:
            try:
                answer = await client.get("/models", cast_to=httpx.Response)
            except openai.NotFoundError:
                return {}
            except openai.OpenAIError as error:
                raise self.explained(error) from error
        try:
            data = answer.json()["data"]
            return {str(model["id"]): model for model in data}
        except (ValueError, KeyError, TypeError):
            start = self._without_secrets(" ".join(answer.text.split()))[:80]
            raise EngineError(
                f"{self.url}/models: wanted a list of models as an OpenAI-compatible server gives it, found "
                f"{answer.headers.get('content-type', 'no type')}: {start!r}. Is this the server's address? The url usually ends in /v1."
            ) from None

    async def version(self) -> str | None:
        """vLLM's version, which it gives outside of /v1; None where there is none to be had."""
        import httpx
        import openai

        address = self._sent_to(self.url.removesuffix("/v1") + "/version")
        async with self.client(questions=True) as client:
            try:
                answer = await client.get(address, cast_to=httpx.Response)
                version = answer.json()["version"]
            except (openai.OpenAIError, ValueError, KeyError, TypeError):
                return None
        return str(version)

    def _sent_to(self, url: str) -> str:
        return url.replace("//", f"//{self._login}", 1)

    def _without_secrets(self, text: str) -> str:
        """What a server or the client library says, which may repeat the login or the key."""
        login = self._login.removesuffix("@")
        password = login.partition(":")[2]
        return without_secrets(
            text, [login, unquote(login), password, unquote(password), os.environ.get(self.key_env, "")]
        )

    def explained(self, error: Exception) -> EngineError:
        """What the user can do about a client library's error."""
        import openai

        tried = f"after {self.attempts} attempts" if self.attempts > 1 else "at the first attempt"
        text = self._without_secrets(error_text(error))[:400]
        cause = self._without_secrets(str(error.__cause__)) if error.__cause__ else text
        if isinstance(error, openai.APITimeoutError):
            return EngineError(
                f"{self.url}: no answer within {self.waited:g} s {tried}. Raise `--set server.timeout=…`, or lower "
                f"`--set server.concurrency=…` (now {self.concurrency})."
            )
        if isinstance(error, openai.APIConnectionError):
            return EngineError(
                f"{self.url}: no server reached {tried} ({cause}). Check `server.url`, or start one: "
                "`python -m vllm.entrypoints.openai.api_server --model MODEL`."
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            state = "is set, but refused" if os.environ.get(self.key_env) else "is not set"
            return EngineError(
                f"{self.url}: wanted a valid key, and the environment variable {self.key_env} {state} ({text}). Set it, or `--set server.key_env=…`."
            )
        if isinstance(error, openai.NotFoundError):
            return NoSuchPath(
                f"{self.url}: the server does not know the model {self.model or '?'!r} or this path ({text}). "
                "Name one with `--set server.model=…`; the url usually ends in /v1."
            )
        if isinstance(error, openai.RateLimitError):
            return EngineError(
                f"{self.url}: too many requests {tried} ({text}). Lower `--set server.concurrency=…` (now {self.concurrency})."
            )
        return EngineError(f"{self.url}: failed {tried} ({text}). Look at the server's log; what is measured is kept.")


def error_text(error: Exception) -> str:
    """What an error says, with the server's own words where the client library leaves them out."""
    body = getattr(error, "body", None)
    words = str(error)
    if body and not isinstance(body, dict) and str(body) not in words:
        words += f": {body}"
    return " ".join(words.split())


def listed(names: Any) -> str:
    return ", ".join(names) or "nothing"


def run(work: Coroutine[Any, Any, Any]) -> Any:
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
