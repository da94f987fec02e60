"""Text and messages out of raw values, with a problem noted for everything else; and raw values made JSON-able.

Roles are mapped to those of chat templates (human -> user, gpt -> assistant); a role that is not known passes as it is.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from curate.data.by_column import is_message, turned_messages
from curate.data.records import Problem
from curate.recipe.bounds import json_value
from curate.rows import Message, Text

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "missing"})()

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
LONGEST_SHOWN = 40
PRINTED = re.compile(r"\[?\s*\{\s*'")  # a list of dicts as Python prints it
TURN_KEYS = frozenset(("role", "from", "content", "value"))
SAID_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # said besides the content


def describe(value: Any) -> str:
    """A value as an error shows it: `true (bool)`, `12 (int)`, `null`, `missing`."""
    if value is MISSING:
        return "missing"
    if value is None:
        return "null"
    try:
        shown = json.dumps(value, ensure_ascii=True, default=str)
    except (TypeError, ValueError):
        shown = repr(value)
    if len(shown) > LONGEST_SHOWN:
        shown = shown[:LONGEST_SHOWN] + "..."
    return f"{shown} ({type(value).__name__})"


def valid_unicode(text: str) -> bool:
    """False for a lone surrogate, which no file, tokenizer or table takes."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def plain_text(value: Any, column: str, problems: list[Problem], *, expected: str = "text") -> str | None:
    """The value if it is text that is not blank; else None, and the problem is noted."""
    if not isinstance(value, str):
        problems.append((column, describe(value), expected))
    elif not value.strip():
        problems.append((column, "blank", expected))
    elif not valid_unicode(value):
        problems.append((column, "not valid Unicode (a lone surrogate)", expected))
    else:
        return value
    return None


def answer_text(value: Any) -> str | None:
    """An answer as text: a whole number without its `.0`, blank and unknown ones as None."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value).strip() or None


def unpacked(value: Any) -> Any:
    """Messages as a list of dicts, however they are stored: as JSON text (or as Python prints them, which is what pandas writes to a CSV), or by
    columns, {role: […], content: […]}. Everything else as it is, text that happens to be JSON of something else too.
    """
    if isinstance(value, str):
        text = value.strip()
        if text[:1] + text[-1:] not in ("[]", "{}") or not ("role" in text or "from" in text):
            return value
        read: Any = None
        with suppress(ValueError, RecursionError):
            read = json_value(text)
        if read is None and PRINTED.match(text):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                read = ast.literal_eval(text)
        read = unpacked(read) if isinstance(read, dict) else read
        whole = isinstance(read, list) and bool(read) and all(map(is_message, read))
        return read if whole or is_message(read) else value
    if isinstance(value, list) and value and isinstance(value[0], str) and value[0].lstrip().startswith("{"):
        turns = [unpacked(item) for item in value]  # each message as JSON text: `datasets` has such a type
        return turns if all(map(is_message, turns)) else value
    by_column = turned_messages(value)
    return value if by_column is None else by_column


def without_padding(value: Any) -> Any:
    """A value of an Arrow table without the keys that hold nothing: rows of a table have all keys that any of them has."""
    if isinstance(value, dict):
        return {key: without_padding(item) for key, item in value.items() if item is not None}
    return [without_padding(item) for item in value] if isinstance(value, list) else value


def unread_keys(value: Any) -> list[str]:
    """Keys of the text parts of messages that hold something and that nobody reads, as often as they occur."""
    notes = []
    for message in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(message, dict) and is_message(message):
            parts = message.get("content")
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict):
                    notes += [
                        f"content.{key}" for key, held in part.items() if key not in ("type", "text") and holds(held)
                    ]
    return notes


def holds(value: Any) -> bool:
    """Whether a value says anything: no None, no blank text, nothing empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return False
    return not (isinstance(value, (list, tuple, dict)) and not value)


def messages(value: Any, column: str, problems: list[Problem]) -> tuple[Message, ...] | None:
    """Messages of a list (or of a single message), in role/content or from/value keys; else None, noted.

    Every other key that has a value is kept, for the chat template. A content of several text parts is joined; any other part (an image) is a
    problem. A turn without content passes where it says something besides (SAID_KEYS). Blank turns pass: replies are checked later.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)):
        problems.append((column, describe(value), "messages"))
        return None
    if not value:
        problems.append((column, "an empty list", "messages"))
        return None
    turns: list[Message] = []
    for position, item in enumerate(value, start=1):
        wrong = _wrong_message(item, position)
        if wrong:
            problems.append((column, *wrong))
            return None
        content = _content(item)
        turn: Message = {
            "role": ROLES.get(_role(item), _role(item)),
            "content": None if content is MISSING else content,
        }
        if not item.keys() <= TURN_KEYS:
            turn |= {str(k): jsonable(v) for k, v in item.items() if k not in TURN_KEYS and holds(v)}
        turns.append(turn)
    return tuple(turns)


def says_besides(message: Mapping[str, Any]) -> bool:
    """Whether a turn says something besides its content: calls of tools, reasoning."""
    return any(holds(message.get(key)) for key in SAID_KEYS)


def _wrong_message(item: Any, position: int) -> tuple[str, str] | None:
    """What was found instead of a message, and what was expected."""
    expected = "messages with role and content"
    if not isinstance(item, dict):
        return f"not a message at turn {position}: {describe(item)}", expected
    role, content = _role(item), _content(item)
    if not isinstance(role, str) or not role.strip():
        return f"without a role at turn {position}: {describe(role)}", expected
    if isinstance(content, list):
        other = next((part for part in content if not _is_text_part(part)), content)
        kind = other.get("type") if isinstance(other, dict) else None
        what = f"with a part of type {kind!r}" if kind else f"with content {describe(other)}"
        return f"{what} at turn {position}, which no pass reads", "messages of text"
    if content is None or content is MISSING:
        shown = describe(item.get("content", MISSING))
        return None if says_besides(item) else (f"without text content at turn {position}: {shown}", expected)
    if not isinstance(content, str):
        return f"without text content at turn {position}: {describe(content)}", expected
    if not valid_unicode(content):
        return f"not valid Unicode at turn {position} (a lone surrogate)", expected
    return None


def _role(item: dict[str, Any]) -> Any:
    role = item.get("role")
    return item.get("from", MISSING) if role is None else role


def _content(item: dict[str, Any]) -> Any:
    """The text, joined where it comes in text parts; else the value as it is."""
    content = item.get("content")
    if content is None:
        content = item.get("value", MISSING)
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    return content


def _is_text_part(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") in ("text", None)
    )


def text_or_messages(value: Any, column: str, problems: list[Problem]) -> Text | None:
    """Text, or messages; a single message counts as messages."""
    if isinstance(value, (list, tuple, dict)):
        return messages(value, column, problems)
    return plain_text(value, column, problems, expected="text or messages")


def exact(value: Decimal) -> int | float | str:
    """A decimal as the number that it is, as text where no number of ours is that."""
    if value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else str(value)


def has_binary(value: Any) -> bool:
    """Whether bytes are in it: images and audio, which `jsonable` does not keep."""
    if isinstance(value, (bytes, bytearray)):
        return True
    if isinstance(value, dict):
        return any(map(has_binary, value.values()))
    return isinstance(value, (list, tuple)) and any(map(has_binary, value))


def jsonable(value: Any) -> Any:
    """A user's value as JSON has it: NaN and infinities become None, dates ISO text, unknown things their text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return value if valid_unicode(value) else value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {jsonable(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [jsonable(item) for item in value]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return exact(value) if value.is_finite() else None
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value)} bytes>"
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return str(value)
