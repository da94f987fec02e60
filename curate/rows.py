"""The two kinds of row, and their content ids. Plain Python, nothing outside the standard library.

A row is what is trained on: a preference pair or an SFT example. Its id is a hash of its content, so the same row is the same row in
every file. Where it occurred, how often, and the user's other columns are kept beside it, never in it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict

Style = Literal["standard", "conversational"]


class Message(TypedDict):
    role: str
    content: str


Text = str | tuple[Message, ...]  # plain text (standard style) or messages (conversational style)

ROW_COLUMNS = (  # of the views `rows` and `scored`, whatever was measured
    "row_id",
    "kind",
    "source",
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "answer",
    "label",
    "style",
    "role",
    "n_occurrences",
    "position",
)

ID_DIGITS = 20  # 80 bits: one chance in 10**10 of a collision among ten million rows


_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def content_id(*parts: object) -> str:
    """20 hex digits over the parts' canonical JSON."""
    canonical = _canonical(parts)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS]


def foreign_id(source: str, key: object) -> str:
    """The id of a row known only by somebody else's key (imported logs): it has no text here."""
    return content_id("foreign", source, str(key))


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair: to `prompt`, `chosen` is preferred to `rejected`. All three are text, or all three are messages."""

    prompt: Text
    chosen: Text
    rejected: Text

    kind: ClassVar[str] = "preference"

    @property
    def style(self) -> Style:
        return "standard" if isinstance(self.chosen, str) else "conversational"

    @property
    def row_id(self) -> str:
        return content_id(self.kind, self.prompt, self.chosen, self.rejected)


@dataclass(frozen=True, slots=True)
class Example:
    """An SFT example: `completion` is the target (None where only an answer is known), `answer` what a grader compares with.

    `label` is set on unpaired preference (KTO) rows: True where the completion is desirable.
    """

    prompt: Text
    completion: Text | None = None
    answer: str | None = None
    label: bool | None = None

    kind: ClassVar[str] = "sft"

    @property
    def style(self) -> Style:
        return "standard" if isinstance(self.prompt, str) else "conversational"

    @property
    def row_id(self) -> str:
        return content_id(self.kind, self.prompt, self.completion, self.answer, self.label)


Row = Pair | Example


def text_to_column(text: Text | None) -> str | None:
    """How a text is kept in a table column: plain text as it is, messages as JSON."""
    if text is None or isinstance(text, str):
        return text
    return json.dumps(text, ensure_ascii=False)


def text_from_column(column: str | None, style: Style) -> Text | None:
    """The inverse of `text_to_column`."""
    if column is None or style == "standard":
        return column
    return tuple(json.loads(column))
