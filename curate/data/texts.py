"""Text and messages out of raw values, with a problem noted for everything else; and raw values made JSON-able.

Roles are mapped to those of chat templates (human -> user, gpt -> assistant); a role that is not known passes as it is.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from curate.data.records import Problem
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


def messages(value: Any, column: str, problems: list[Problem]) -> tuple[Message, ...] | None:
    """Messages of a list (or of a single message, or of either as JSON text), in role/content or from/value keys; else None, noted.

    A content of several text parts is joined; keys other than role and content are not kept. Blank turns pass: replies are checked later.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)):
        problems.append((column, describe(value), "messages"))
        return None
    if not value:
        problems.append((column, "an empty list", "messages"))
        return None
    found: list[Message] = []
    for position, item in enumerate(value):
        if not isinstance(item, dict):
            problems.append(
                (column, f"not a message at turn {position}: {describe(item)}", "messages with role and content")
            )
            return None
        role = item.get("role")
        if role is None:
            role = item.get("from", MISSING)
        content = item.get("content")
        if content is None:
            content = item.get("value", MISSING)
        if (
            isinstance(content, list)
            and content
            and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content)
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not role.strip():
            problems.append(
                (column, f"without a role at turn {position}: {describe(role)}", "messages with role and content")
            )
            return None
        if not isinstance(content, str):
            problems.append(
                (
                    column,
                    f"without text content at turn {position}: {describe(content)}",
                    "messages with role and content",
                )
            )
            return None
        if not valid_unicode(content):
            problems.append(
                (column, f"not valid Unicode at turn {position} (a lone surrogate)", "messages with role and content")
            )
            return None
        found.append({"role": ROLES.get(role, role), "content": content})
    return tuple(found)


def text_or_messages(value: Any, column: str, problems: list[Problem]) -> Text | None:
    """Text, or messages; a single message counts as messages."""
    if isinstance(value, (list, tuple, dict)):
        return messages(value, column, problems)
    return plain_text(value, column, problems, expected="text or messages")


def jsonable(value: Any) -> Any:
    """A user's value as JSON has it: NaN and infinities become None, dates ISO text, unknown things their text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return value if valid_unicode(value) else value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [jsonable(item) for item in value]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value) if value.is_finite() else None
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value)} bytes>"
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return str(value)
