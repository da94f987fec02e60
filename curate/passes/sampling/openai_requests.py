"""Requests to a server that speaks OpenAI's protocol, and what its answers hold.

Plain prompts go to /v1/completions as text, conversational ones to /v1/chat/completions as messages. A server that does not know `n`, `seed` or
`logprobs` is asked without them from then on, and `notes` says so.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from curate.errors import EngineError
from curate.passes.sampling.openai_client import Server, error_text
from curate.passes.sampling.server_probe import Spoken
from curate.passes.sampling.types import Prompt, Sample, Sampling
from curate.rows import Message

CONTEXT_WORDS = re.compile(
    r"context length|context_length|maximum.{0,20}(tokens|length)|max_model_len|too long", re.IGNORECASE
)
ENDED = ("stop", "tool_calls", "function_call")  # why an answer ended, where it was not cut
WITHOUT = {
    "logprobs": "log-probs of samples are unknown (NULL)",
    "seed": "samples are not seeded: a repeated shard will differ",
    "n": "one request per sample",
}


class Requests:
    """Asks one server, and learns what it does not take. lacking: the names of those arguments. notes: the same, in words for the user."""

    def __init__(self, server: Server):
        self.server = server
        self.lacking: set[str] = set()
        self.notes: list[str] = []

    async def ask(
        self, client: Any, gate: asyncio.Semaphore, prompt: Prompt, sampling: Sampling, n: int, seed: int, most: int
    ) -> Any:
        """The server's answer, with choices; None when the prompt does not fit the server's context."""
        import openai

        while True:
            arguments: dict[str, Any] = {
                "model": self.server.model,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
            limit = "max_completion_tokens" if "max_tokens" in self.lacking else "max_tokens"
            arguments[limit] = most
            if sampling.stop:
                arguments["stop"] = list(sampling.stop)
            if n > 1:
                arguments["n"] = n
            if "seed" not in self.lacking:
                arguments["seed"] = seed
            if "logprobs" not in self.lacking:
                arguments["logprobs"] = True if prompt.messages else 0
            known = set(self.lacking)
            try:
                async with gate:
                    if prompt.messages:
                        messages = _sent(prompt.messages)
                        answer = await client.chat.completions.create(
                            messages=messages, **arguments, **_further(sampling, prompt.template_args)
                        )
                    else:
                        answer = await client.completions.create(
                            prompt=prompt.text, **arguments, **_further(sampling, "")
                        )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if known != self.lacking:
                    if n > 1 and "n" in self.lacking:
                        n = 1
                    continue  # another row learned it meanwhile
                if CONTEXT_WORDS.search(error_text(error)):
                    return None
                lacking = _named(error_text(error), arguments)
                if lacking is None:
                    raise self.server.explained(error) from error
                self.lack(lacking)
                n = 1 if lacking == "n" else n
            except openai.OpenAIError as error:
                raise self.server.explained(error) from error
            else:
                if not getattr(answer, "choices", None):
                    raise EngineError(
                        f"{self.server.url} answered a request without any choice ({' '.join(str(answer).split())[:80]!r}). "
                        "Is it an OpenAI-compatible server? The url usually ends in /v1."
                    )
                return answer

    def samples(self, answer: Any, *, chat: bool) -> list[Sample]:
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        samples = []
        for choice in choices:
            text = _text(choice.message) if chat else (choice.text or "")
            logps = _token_logps(choice, chat=chat)
            tokens = (
                len(logps)
                if logps is not None
                else answer.usage.completion_tokens
                if answer.usage and len(choices) == 1
                else None
            )
            logp = float(np.sum(logps)) if logps is not None else None
            reasoning = _reasoning(choice.message) if chat else None
            ended = choice.finish_reason in ENDED
            samples.append(Sample(text=text, n_tokens=tokens, logp=logp, finished=ended, reasoning=reasoning))
        if samples and samples[0].logp is None:
            self.lack("logprobs")
        return samples

    def lack(self, ability: str) -> None:
        if ability not in self.lacking:
            self.lacking.add(ability)
            if ability in WITHOUT:
                self.notes.append(f"{self.server.url} does not take `{ability}`: {WITHOUT[ability]}.")


def _sent(messages: Sequence[Message]) -> list[Message]:
    """Turns as the protocol has them: the arguments of a tool's call are JSON text there, and calls have ids, which the turns of tools name."""
    turns: list[Message] = []
    unanswered: list[str] = []
    number = 0
    for message in messages:
        turn = dict(message)
        if isinstance(message.get("tool_calls"), list):
            turn["tool_calls"] = [_sent_call(call, number + i) for i, call in enumerate(message["tool_calls"])]
            number += len(turn["tool_calls"])
            unanswered = [call["id"] for call in turn["tool_calls"] if isinstance(call, dict) and "id" in call]
        elif message["role"] == "tool" and unanswered:
            turn.setdefault("tool_call_id", unanswered[0])
            unanswered = [one for one in unanswered if one != turn["tool_call_id"]]
        turns.append(turn)
    return turns


def _sent_call(call: Any, number: int) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        return call
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    named = {"name": function["name"], "arguments": text}
    return {"id": call.get("id") or f"call_{number}", "type": "function", "function": named}


def _further(sampling: Sampling, template_args: str) -> dict[str, Any]:
    """What a row gives the template beside its messages, and what OpenAI's protocol has no name for, as arguments of the client."""
    given = json.loads(template_args) if template_args else {}
    found = {"tools": given["tools"]} if given.get("tools") else {}
    settings = given.get("chat_template_kwargs")
    body = {**sampling.further, **sampling.extra_body, **({"chat_template_kwargs": settings} if settings else {})}
    return found | ({"extra_body": body} if body else {})


def _text(message: Any) -> str:
    """What a server's answer says; calls of tools that it has told apart stand behind it, a line of JSON each."""
    calls = [
        json.dumps({"name": call.function.name, "arguments": call.function.arguments}, ensure_ascii=False)
        for call in getattr(message, "tool_calls", None) or ()
        if getattr(call, "function", None) is not None
    ]
    return "\n".join([*([message.content] if message.content else []), *calls])


def _reasoning(message: Any) -> str | None:
    """What a server with a reasoning parser has told apart from its answer; None where it has nothing of the kind."""
    texts = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
    return next((text for text in texts if isinstance(text, str) and text), None)


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


def spoken(choice: Any, *, chat: bool) -> Spoken:
    """A choice's tokens with their log-probabilities; its text where there are none, or none that are numbers."""
    text = _text(choice.message) if chat else (choice.text or "")
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
