"""A user's SQL expressions, as a recipe's `select` has them: one expression each, and nothing that gets out of it."""

from __future__ import annotations

import re

from curate.errors import UsageError


def order_keys(order_by: str) -> list[tuple[str, str]]:
    """ "flip_loss desc, ches" -> [("flip_loss", "DESC NULLS LAST"), ("ches", "ASC NULLS LAST")]; `nulls first` is kept.

    Raises UsageError for text that is not a list of expressions.
    """
    check_expression(order_by, "select.order_by")
    keys = []
    for part in split_top(order_by):
        match = re.fullmatch(r"(?is)\s*(.*?)(?:\s+(asc|desc))?(?:\s+nulls\s+(first|last))?\s*", part)
        if match is None or not match[1]:
            raise UsageError(f"select.order_by: expected columns such as `flip_loss desc, ches`; found {order_by!r}.")
        keys.append((match[1], f"{match[2] or 'asc'} nulls {match[3] or 'last'}".upper()))
    return keys


def check_expression(text: str, key: str) -> None:
    """One SQL expression: no second statement, nothing that leaves its brackets, no comment that swallows what follows."""
    depth, i = 0, 0
    while i < len(text):
        char = text[i]
        if char in "'\"":
            end = text.find(char, i + 1)
            if end < 0:
                raise UsageError(f"{key}: the quote {char} in {text!r} is not closed.")
            i = end
        elif char == ";":
            raise UsageError(f"{key}: expected one SQL condition; found `;` in {text!r}.")
        elif text.startswith("--", i) or text.startswith("/*", i):
            raise UsageError(f"{key}: no comments in here; found one in {text!r}.")
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        i += 1
    if depth or not text.strip():
        raise UsageError(
            f"{key}: "
            + (
                f"the brackets of {text!r} do not match."
                if depth
                else "the condition is empty. Leave it out, or give one."
            )
        )


def split_top(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quoted, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quoted:
            quoted = "" if char == quoted else quoted
        elif char in "'\"":
            quoted = char
        elif char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
