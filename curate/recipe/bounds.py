"""How large, deep and packed an input may be: bounds that no real one meets, so that a broken or hostile one is a sentence and no full memory.

JSON that is read goes through here: the standard library's reader ends in a RecursionError where lists stand in lists, in a ValueError that is no
JSONDecodeError where a number has more than 4,300 digits, and in memory where a file never ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from curate.errors import StoreError

ROW = 64 << 20  # bytes of one row: some 16 million tokens
OBJECT = 1 << 30  # bytes of a .json file that is one object, which is held in memory whole
SETTINGS = 64 << 20  # bytes of a model's, a trainer's or our own JSON file
TEXT = 1 << 20  # bytes of a text that a person writes: a recipe, a template, few-shot examples, a card
DEPTH = 100  # lists and mappings inside each other
RATIO = 500  # bytes out of a compressed file for each in it: text gives 3 to 30
PACKED = 64 << 20  # bytes out of it, before which RATIO is not asked for
WHOLE = 2**63  # whole numbers below this, and down to its negative, are numbers to every file and table

DEEP = f"lists and objects stand more than {DEPTH} deep in each other"


def size(n: int) -> str:
    """64 MiB, as a person writes it."""
    return f"{n >> 30:,} GiB" if n >= 1 << 30 else f"{n >> 20:,} MiB"


def json_value(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError where it is none, or is too deep, or has a number of thousands of digits."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(DEEP) from None
    opened = (text.count("[") + text.count("{")) if isinstance(text, str) else (text.count(b"[") + text.count(b"{"))
    if opened > DEPTH and is_deep(value):
        raise ValueError(DEEP)
    return value


def is_deep(value: Any) -> bool:
    """Whether lists and mappings stand more than DEPTH deep in each other; looked at without recursion."""
    level = [value] if isinstance(value, dict | list | tuple) else []
    for _ in range(DEPTH):
        inside = [part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer)]
        level = [part for part in inside if isinstance(part, dict | list | tuple)]
        if not level:
            return False
    return True


def read_text(file: Path, limit: int = TEXT) -> str:
    """A small file's text. ValueError where it is no UTF-8 or larger than the limit; OSError passes through."""
    with file.open("rb") as opened:
        held = opened.read(limit + 1)
    if len(held) > limit:
        raise ValueError(f"larger than {size(limit)}, which no such file is")
    try:
        return held.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(file: Path) -> Any:
    """The value of a small JSON file. ValueError for what `json_value` and `read_text` refuse; OSError passes through."""
    return json_value(read_text(file, SETTINGS))


def read_object(file: Path) -> dict[str, Any]:
    """The object of a small JSON file. ValueError where it holds anything else; OSError passes through."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, expected an object")
    return value


def own_object(file: Path) -> dict[str, Any]:
    """The object of a JSON file that curate wrote itself. StoreError where that cannot be read."""
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{file}: cannot be read ({error}). curate wrote it, and something else has changed it: delete it, and run the same command again."
        ) from None
