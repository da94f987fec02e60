"""Dialogues and their turns: where the prompt of a whole conversation ends.

Two whole conversations share a prompt: their longest common run of turns, cut back until an assistant turn follows in both. Never a
common run of characters: two replies that begin alike are two replies. One conversation splits at its last assistant turn.

Text dialogues are those of HH-RLHF ("\\n\\nHuman: ... \\n\\nAssistant: ..."): the prompt keeps everything through "\\n\\nAssistant:", the
reply its leading space. Source: Bai et al. 2022, arXiv:2204.05862, and the files of github anthropics/hh-rlhf.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from curate.data.records import Problem
from curate.rows import Message

SAYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")  # keys
HEADER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


class Turn(NamedTuple):
    speaker: str  # Human, Assistant, or "" for text before the first header
    header: str  # as it stands, newlines included
    text: str


def is_dialogue(text: object) -> bool:
    """Whether a text holds a turn of each speaker."""
    return isinstance(text, str) and {"Human", "Assistant"} <= set(HEADER.findall(text))


def turns_of(text: str) -> list[Turn]:
    """The turns of a text dialogue; joined again they are the text."""
    turns, end, open_turn = [], 0, Turn("", "", "")
    for match in HEADER.finditer(text):
        if match.start() > end or open_turn.speaker:
            turns.append(open_turn._replace(text=text[end : match.start()]))
        open_turn, end = Turn(match.group(1), match.group(0), ""), match.end()
    turns.append(open_turn._replace(text=text[end:]))
    return turns


def shared_turns(first: Sequence[Any], second: Sequence[Any], *, is_reply: Callable[[Any], bool]) -> int | None:
    """How many turns are the prompt of both: the longest common run after which a reply follows in both. None: they share no prompt."""
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    while shared > 0:
        if shared < min(len(first), len(second)) and is_reply(first[shared]) and is_reply(second[shared]):
            return shared
        shared -= 1
    return None


NOT_SHARED = ("sharing no prompt with 'chosen'", "a conversation that begins with the same turns as 'chosen'")


def split_text_pair(chosen: str, rejected: str, problems: list[Problem]) -> tuple[str, str, str] | None:
    """(prompt, chosen, rejected) of two whole text dialogues; None, and problems noted, where they cannot be split."""
    dialogues = {"chosen": turns_of(chosen), "rejected": turns_of(rejected)}
    for column, turns in dialogues.items():
        if turns[-1].speaker != "Assistant":
            last = f"by {turns[-1].speaker}" if turns[-1].speaker else "by nobody (no 'Human:' and 'Assistant:' turns)"
            problems.append(
                (column, f"a dialogue whose last turn is {last}", "a dialogue whose last turn is the assistant's")
            )
    if problems:
        return None
    shared = shared_turns(dialogues["chosen"], dialogues["rejected"], is_reply=lambda turn: turn.speaker == "Assistant")
    if shared is None:
        problems.append(("rejected", *NOT_SHARED))
        return None
    prompt = (
        "".join(turn.header + turn.text for turn in dialogues["chosen"][:shared]) + dialogues["chosen"][shared].header
    )
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def is_assistant(message: Message) -> bool:
    return message["role"] == "assistant"


Messages = tuple[Message, ...]


def split_message_pair(
    chosen: Messages, rejected: Messages, problems: list[Problem]
) -> tuple[Messages, Messages, Messages] | None:
    """(prompt, chosen, rejected) of two whole conversations; None, and problems noted, where they cannot be split."""
    for column, conversation in (("chosen", chosen), ("rejected", rejected)):
        check_last_turn(conversation, column, problems)
    if problems:
        return None
    shared = shared_turns(list(map(_role_and_text, chosen)), list(map(_role_and_text, rejected)), is_reply=is_assistant)
    if shared is None:
        problems.append(("rejected", *NOT_SHARED))
        return None
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _role_and_text(message: Message) -> Message:
    """What a turn says, without what is noted about it (ids, times, ratings)."""
    return {key: message[key] for key in SAYS if key in message}


def split_messages(conversation: Messages, column: str, problems: list[Problem]) -> tuple[Messages, Messages] | None:
    """(prompt, completion) of one conversation, split at its last assistant turn, which has to be its last."""
    if not check_last_turn(conversation, column, problems):
        return None
    return conversation[:-1], conversation[-1:]


def check_last_turn(conversation: Messages, column: str, problems: list[Problem]) -> bool:
    if is_assistant(conversation[-1]):
        return True
    problems.append(
        (column, f"messages whose last turn is by '{conversation[-1]['role']}'", "a last turn by the assistant")
    )
    return False
