"""The prompt of a row, out of its column and the columns that belong to it.

    instruction                input, context on lines of their own; system, history
    prompt, question           system, history, tools; a prompt of text becomes messages where the source has any of them
    messages, conversations    system, tools
    chosen, rejected as whole conversations (implicit)        system, tools

`tools` (a list of schemas, or its JSON text) and `chat_template_kwargs` are no text: the chat template is given them with the row (`template_args`).

Other columns that look as if they belonged to the prompt (BESIDE) are left out; `Notes` counts them and says how to put them in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from curate.data.records import Problem
from curate.data.texts import MISSING, describe, holds, jsonable, messages, plain_text, text_or_messages
from curate.recipe.bounds import json_value
from curate.rows import RESERVED_SETTINGS, Message, Text, text_of

if TYPE_CHECKING:
    from curate.data.layout import Layout

BESIDE = (
    "system",
    "system_prompt",
    "history",
    "input",
    "context",
    "instruction",
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
)
TEMPLATE_ARGS = ("tools", "chat_template_kwargs")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def beside_prompt(format: str, prompt: str, head: list[dict[str, Any]], named: Iterable[str]) -> set[str]:
    """The columns that are put into the prompt. Beside `prompt` and `question` only where the first rows hold something there, since they
    make messages of text; or where the recipe names them.
    """
    if prompt == "instruction":
        return {"input", "context", "system", "history"}
    held = {n: [value for row in head if holds(value := _from_json(row.get(n)))] for n in TEMPLATE_ARGS}
    args = {n for n in TEMPLATE_ARGS if n in named or any(isinstance(value, (list, dict)) for value in held[n])}
    if (
        prompt in ("conversations", "messages") or format == "implicit"
    ):  # a later row may have some: only texts of the user's own are left
        return {"system", *args, *(n for n in TEMPLATE_ARGS if not held[n])}
    if prompt not in ("prompt", "question"):
        return set()
    return args | {name for name in ("system", "history") if name in named or any(holds(row.get(name)) for row in head)}


def template_args(raw: dict[str, Any], uses: frozenset[str], problems: list[Problem]) -> str:
    """What a row gives the chat template beside its messages, as JSON; "" for nothing. Lists and mappings may be JSON texts of such."""
    given: dict[str, Any] = {}
    for name, kind, expected in (("tools", list, "a list of tools"), ("chat_template_kwargs", dict, "named settings")):
        value = raw.get(name) if name in uses else None
        if not holds(value):
            continue
        value = _from_json(value)
        if isinstance(value, list):
            value = [_from_json(item) for item in value]
        if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
            problems.append((name, describe(value), expected))
            continue
        if kind is dict and (reserved := [key for key in value if key in RESERVED_SETTINGS]):
            problems.append((name, f"with {reserved[0]!r}", "settings of the template itself"))
            continue
        if isinstance(value, dict):
            value = {key: setting for key, setting in value.items() if setting is not None}
        if value:
            given[name] = jsonable(value)
    return json.dumps(given, ensure_ascii=False) if given else ""


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json_value(value)
    except ValueError:
        return value


def prompt_of(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Text | None:
    """The prompt: text, or messages. Alpaca's input follows its instruction on a new line; system and history make it messages."""
    value = raw.get(layout.prompt, MISSING)
    if layout.prompt in ("conversations", "messages"):
        turns = messages(value, layout.prompt, problems)
        return with_system(raw, turns, layout.uses, problems) if turns else None
    text: Text | None
    if layout.prompt == "instruction":
        text = instruction(raw, layout, problems)
    else:
        text = text_or_messages(value, layout.prompt, problems)
    if text is None or problems or not {"history", "system", *TEMPLATE_ARGS} & layout.uses:
        return text
    before = exchanges(raw.get("history") if "history" in layout.uses else None, problems)
    if before is None:
        return None
    if before and not isinstance(text, str):
        problems.append(("history", "beside a prompt of messages", "a history only beside a prompt of text"))
        return None
    return with_system(raw, (*before, *as_messages(text, "user")), layout.uses, problems)


def instruction(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> str | None:
    parts = [plain_text(raw.get("instruction", MISSING), "instruction", problems)]
    for column in ("input", "context"):
        extra = raw.get(column)
        if column in layout.uses and extra is not None and (not isinstance(extra, str) or extra.strip()):
            parts.append(plain_text(extra, column, problems))
    return None if problems else "\n".join(part for part in parts if part)


def exchanges(history: Any, problems: list[Problem]) -> list[Message] | None:
    """The turns of a history: pairs of instruction and response. None, and the problem noted, where it is something else."""
    turns: list[Message] = []
    if not holds(history):
        return turns
    for exchange in history if isinstance(history, (list, tuple)) else (history,):
        if not (
            isinstance(exchange, (list, tuple))
            and len(exchange) == 2
            and all(isinstance(part, str) for part in exchange)
        ):
            problems.append(("history", describe(exchange), "pairs of instruction and response"))
            return None
        turns += [Message(role="user", content=exchange[0]), Message(role="assistant", content=exchange[1])]
    return turns


def with_system(
    raw: dict[str, Any], turns: tuple[Message, ...], uses: frozenset[str], problems: list[Problem]
) -> tuple[Message, ...]:
    """The turns behind a system turn of the column `system`, if it has one. A system turn that is there already says the same, or it is a problem."""
    system = raw.get("system") if "system" in uses else None
    if not holds(system):
        return turns
    if not isinstance(system, str):
        problems.append(("system", describe(system), "text"))
    elif turns[0]["role"] != "system":
        return (Message(role="system", content=system), *turns)
    elif text_of(turns[0]).strip() != system.strip():
        problems.append(("system", "another text than the messages' own system turn", "one system prompt"))
    return turns


def as_messages(text: Text, role: str) -> tuple[Message, ...]:
    return (Message(role=role, content=text),) if isinstance(text, str) else text


def left_out(columns: dict[str, Any], prompt: Text) -> list[str]:
    """Columns that look as if they belonged to the prompt, hold something, and are not in it."""
    held = [name for name in (*BESIDE, *MEDIA) if name in columns and holds(columns[name])]
    if not held:
        return []
    whole = squeezed(prompt if isinstance(prompt, str) else "\n".join(map(text_of, prompt)))
    return [name for name in held if not (isinstance(columns[name], str) and squeezed(columns[name]) in whole)]


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().lower()
