"""What a trainer's layout is: which sorts of rows it takes, and how a row and the files beside it look there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from curate.rows import is_plain

if TYPE_CHECKING:
    import pyarrow as pa

PAIRS, PROMPTS, COMPLETIONS, UNPAIRED, MESSAGES = (
    "trl preference",
    "trl prompts",
    "prompt/completion",
    "trl unpaired preference",
    "messages",
)  # sorts of rows, in the words of `curate.data.exported.Plan.layout`
Row = dict[
    str, Any
]  # the text columns of an export: messages as lists of dicts, tools as a list; absent where it has none


class Unfit(Exception):
    """Why a row cannot be written for a trainer: words after "rows"."""


@dataclass(frozen=True)
class About:
    """What is known of an export as a whole. standard: its rows are texts. all_turns: every assistant turn is trained (tokens.turns: all).

    source: the one source's name, "" where there are several. in_order: the trainer is not to shuffle the rows. own: columns
    beside the texts, as they are called here.
    """

    sort: str
    standard: bool
    split: str = "train"
    all_turns: bool = False
    source: str = ""
    in_order: bool = False
    own: tuple[str, ...] = ()


Convert = Callable[[Row, About], dict[str, Any]]


@dataclass(frozen=True)
class Trainer:
    """takes: sort of rows -> a row's columns there (its own apart). fields: names that its columns have, for no column of the user's.

    files: what may stand beside the data. beside: their texts, by name, from the data's file names. notes: what a reader of the card should know.
    schema: of a trainer that reads parquet, from the types of the own columns; None: JSON lines. takes_own: whether `takes` places the own columns.
    """

    name: str
    title: str
    takes: Mapping[str, Convert]
    fields: frozenset[str]
    beside: Callable[[About, Sequence[str]], dict[str, str]]
    notes: Callable[[About], list[str]]
    files: tuple[str, ...] = ("trainer_args.json",)
    why_not: Mapping[str, str] = field(default_factory=dict)
    schema: Callable[[About, Mapping[str, pa.DataType]], pa.Schema] | None = None
    takes_own: bool = False


def user_turn(prompt: Any) -> list[Any]:
    """The prompt as messages: text is what a user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def reply_turns(reply: Any) -> list[Any]:
    return [{"role": "assistant", "content": reply}] if isinstance(reply, str) else list(reply)


def plain(messages: Sequence[Any], trainer: str) -> list[dict[str, str]]:
    """The messages, if they are roles and texts and nothing else. Unfit names what they have beside."""
    for message in messages:
        if not is_plain(message):
            more = sorted(set(message) - {"role", "content"}) or ["a content of null"]
            raise Unfit(f"have messages with {', '.join(more)}, and {trainer} reads roles and texts alone")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def without_template_args(row: Row, trainer: str, *names: str) -> None:
    """Unfit where the row gives its chat template what this trainer does not pass on."""
    for name in names:
        if row.get(name):
            raise Unfit(f"have {name}, which {trainer} does not give the chat template row by row")


def whole(row: Row) -> list[Any]:
    """The prompt and its completion, or the messages, as one conversation."""
    return list(row["messages"]) if "messages" in row else [*user_turn(row["prompt"]), *reply_turns(row["completion"])]
