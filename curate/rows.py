"""The two kinds of row, and their content ids. Plain Python, nothing outside the standard library.

A row is what is trained on: a preference pair or an SFT example. Its id is a hash of its content, so the same row is the same row in
every file. Where it occurred, how often, and the user's other columns are kept beside it, never in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, ClassVar, Literal

Style = Literal["standard", "conversational"]


# A turn: role, content (text; None where the turn says nothing in it), and whatever else a chat template may read of it: tool_calls, name,
# reasoning_content. A key without a value is not there.
Message = dict[str, Any]
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

RESERVED_SETTINGS = frozenset(  # arguments of transformers' `apply_chat_template` that are no row's to set
    {
        *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        "return_assistant_tokens_mask",
    }
)

ID_DIGITS = 20  # 80 bits: one chance in 10**10 of a collision among ten million rows


_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def content_id(*parts: object) -> str:
    """20 hex digits over the parts' canonical JSON."""
    canonical = _canonical(parts)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS]


def text_ids(kind: str, columns: Sequence[Sequence[str] | None]) -> list[str]:
    """`content_id(kind, *row)` of many rows of text, a column a sequence; None for a column of nothing."""
    template = ",".join(
        [_canonical(kind).replace("%", "%%"), *("null" if column is None else "%s" for column in columns)]
    )
    written = [map(encode_basestring, column) for column in columns if column is not None]
    lines = (f"[{template}]" % row for row in zip(*written, strict=True))
    return [hashlib.sha256(line.encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS] for line in lines]


def foreign_id(source: str, key: object) -> str:
    """The id of a row known only by somebody else's key (imported logs): it has no text here."""
    return content_id("foreign", source, str(key))


def text_of(message: Message) -> str:
    """What a turn says in its content; "" where it has none."""
    return message["content"] or ""


def is_plain(message: Message) -> bool:
    """Whether a turn is a role and a text, and nothing else."""
    return len(message) == 2 and message["content"] is not None


def _beside(texts: tuple[Text | None, ...], template_args: str) -> tuple[str, ...]:
    """What counts for a row's id beside its texts. In what a template writes out as JSON the order of keys is seen."""
    more = [text for text in texts if text is not None and not isinstance(text, str) and not all(map(is_plain, text))]
    return (*(json.dumps(text, ensure_ascii=False) for text in more), *([template_args] if template_args else []))


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair: to `prompt`, `chosen` is preferred to `rejected`. All three are text, or all three are messages.

    template_args: what the chat template is given beside the messages, as JSON: {"tools": […], "chat_template_kwargs": {…}}; "" for nothing.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    template_args: str = ""

    kind: ClassVar[str] = "preference"

    @property
    def style(self) -> Style:
        return "standard" if isinstance(self.chosen, str) else "conversational"

    @property
    def row_id(self) -> str:
        texts = (self.prompt, self.chosen, self.rejected)
        return content_id(self.kind, *texts, *_beside(texts, self.template_args))


@dataclass(frozen=True, slots=True)
class Example:
    """An SFT example: `completion` is the target (None where only an answer is known), `answer` what a grader compares with.

    `label` is set on unpaired preference (KTO) rows: True where the completion is desirable. template_args: as those of a `Pair`.
    """

    prompt: Text
    completion: Text | None = None
    answer: str | None = None
    label: bool | None = None
    template_args: str = ""

    kind: ClassVar[str] = "sft"

    @property
    def style(self) -> Style:
        return "standard" if isinstance(self.prompt, str) else "conversational"

    @property
    def row_id(self) -> str:
        beside = _beside((self.prompt, self.completion), self.template_args)
        return content_id(self.kind, self.prompt, self.completion, self.answer, self.label, *beside)


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
