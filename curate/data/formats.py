"""The formats rows come in: how each is recognised, and a small converter of each.

Recognised by column names, and by the types of the first rows where names do not tell (`layouts`). Sources of the formats: TRL's
"dataset formats and types" (standard, conversational, implicit prompt, unpaired), Alpaca and ShareGPT as LLaMA-Factory's data README has
them, HH-RLHF's dialogues, GSM8K's question/answer with "#### final answer".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from curate.data.dialogues import (
    check_last_turn,
    is_assistant,
    is_dialogue,
    split_message_pair,
    split_messages,
    split_text_pair,
)
from curate.data.layout import Layout
from curate.data.prompts import TEMPLATE_ARGS, as_messages, beside_prompt, prompt_of, with_system
from curate.data.records import Problem
from curate.data.texts import MISSING, answer_text, describe, messages, plain_text, says_besides, text_or_messages
from curate.rows import Example, Pair, Row, Text, text_of

FORMATS = {
    "preference": "prompt (or question), chosen, rejected: text or messages (TRL)",
    "implicit": "chosen, rejected: whole conversations as messages; the prompt is what they share (TRL)",
    "hh": "chosen, rejected: whole dialogues as text with Human: and Assistant: turns (HH-RLHF)",
    "alpaca_preference": "instruction, input, chosen, rejected (LLaMA-Factory)",
    "sharegpt_preference": "conversations, and chosen, rejected as one message each (LLaMA-Factory)",
    "messages": "messages of role and content; the last assistant turn is the completion (TRL)",
    "sharegpt": "conversations of from and value, system; the last turn is the completion",
    "prompt_completion": "prompt (or question, or instruction and input), completion: text or messages (TRL)",
    "kto": "messages, or prompt and completion, with a label: unpaired preferences (TRL)",
    "alpaca": "instruction, input, output (or response)",
    "question_answer": "question (or prompt), answer; a final answer stands after '####' or in final_answer",
    "prompts": "prompt (or question), answer (or final_answer): to sample and grade, without a completion (RLVR)",
}  # beside each prompt: system, and history where it is text
THOUSANDS = re.compile(r"[^\d\s,(\[{]*\d{1,3}(?:,\d{3})+(?!\d)[^,]*")
KNOWN_COLUMNS = (
    "prompt", "chosen", "rejected", "completion", "answer", "final_answer", "label", "messages", "conversations", "question",
    "instruction", "input", "context", "output", "response", "system", "history", "tools", "chat_template_kwargs",
)  # fmt: skip


def layouts(
    names: Iterable[str], head: list[dict[str, Any]], named: Iterable[str] = (), spent: Iterable[str] = ()
) -> list[Layout]:
    """Every layout these columns (and the types in the first rows) allow, the likeliest first: of columns the user `named`, if any.

    spent: columns that a template has put into a text already; they are not put there again.
    """
    columns = set(names)
    spare = columns - (set(spent) - set(named))
    layouts_read: list[Layout] = []

    def first(*candidates: str) -> str:
        return next((name for name in candidates if name in columns), "")

    def add(name: str, convert: Any, prompt: str = "", reply: str = "", *more: str) -> None:
        used = {prompt, reply, *more} & columns | beside_prompt(name, prompt, head, named) & {*spare, *TEMPLATE_ARGS}
        layouts_read.append(Layout(name, convert, prompt, reply, frozenset(used)))

    def majority(column: str, is_so: Callable[[Any], bool]) -> bool:
        values = [row[column] for row in head if row.get(column) is not None]
        return 2 * sum(map(is_so, values)) > len(values)

    if {"chosen", "rejected"} <= columns:
        if prompt := first("prompt", "instruction", "conversations", "messages", "question"):
            name = {
                "instruction": "alpaca_preference",
                "conversations": "sharegpt_preference",
                "messages": "sharegpt_preference",
            }
            add(name.get(prompt, "preference"), preference, prompt, "", "chosen", "rejected")
        elif majority("chosen", lambda value: isinstance(value, str)):
            if majority("chosen", is_dialogue):
                add("hh", hh, "", "", "chosen", "rejected")
        else:
            add("implicit", implicit, "", "", "chosen", "rejected")
    labelled = "label" in columns and majority(
        "label", lambda value: isinstance(value, bool) or str(value).lower() in ("true", "false")
    )
    if turns := first("messages", "conversations"):
        if labelled:
            add("kto", kto, turns, "", "label")
        foreign = majority(
            turns, lambda v: isinstance(v, list) and bool(v) and isinstance(v[0], dict) and "from" in v[0]
        )
        add("sharegpt" if foreign else "messages", conversation, turns, "", "answer")
    if "completion" in columns and (prompt := first("prompt", "instruction", "question")):
        if labelled:
            add("kto", kto, prompt, "completion", "label")
        add("prompt_completion", prompt_completion, prompt, "completion", "answer")
    if "instruction" in columns and (reply := first("output", "response")):
        add("alpaca", prompt_completion, "instruction", reply, "answer")
        if "prompt" in columns:
            add("prompt_completion", prompt_completion, "prompt", reply, "answer")
    if "answer" in columns:
        for prompt in ("question", "prompt"):
            if prompt in columns:
                add("question_answer", question_answer, prompt, "answer")
    if (prompt := first("prompt", "question")) and (reply := first("answer", "final_answer")):
        add("prompts", prompts, prompt, reply)
    return sorted(layouts_read, key=lambda layout: -len(layout.uses & set(named)))


def same_style(prompt: Text, *replies: Text) -> tuple[Text, ...]:
    """All text, or all messages: text beside messages becomes a user turn (prompt) or an assistant turn (reply)."""
    if all(isinstance(text, str) for text in (prompt, *replies)):
        return (prompt, *replies)
    return (as_messages(prompt, "user"), *(as_messages(reply, "assistant") for reply in replies))


def check_prompt(prompt: Text, column: str, problems: list[Problem]) -> None:
    """A prompt may not be blank: without one there is nothing that a reply is a reply to."""
    if not prompt or not (prompt if isinstance(prompt, str) else "".join(map(text_of, prompt))).strip():
        problems.append((column, "blank", "text or messages before the reply"))


def check_reply(reply: Text, column: str, problems: list[Problem]) -> None:
    text = reply if isinstance(reply, str) else text_of(reply[-1])
    if not text.strip() and (isinstance(reply, str) or not says_besides(reply[-1])):
        problems.append((column, "blank", "a reply"))
    elif not isinstance(reply, str) and check_last_turn(reply, column, problems) and not is_assistant(reply[0]):
        problems.append(
            (column, f"messages whose first turn is by '{reply[0]['role']}'", "a first turn by the assistant")
        )


def pair(
    prompt: Text, chosen: Text, rejected: Text, problems: list[Problem], *, prompt_column: str = "prompt"
) -> Pair | None:
    check_prompt(prompt, prompt_column, problems)
    check_reply(chosen, "chosen", problems)
    check_reply(rejected, "rejected", problems)
    if not problems and chosen == rejected:
        problems.append(("rejected", "the same as 'chosen'", "another reply"))
    return None if problems else Pair(prompt, chosen, rejected)


def preference(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Row | None:
    """prompt, chosen, rejected. Where these two are whole conversations, the turns that they share are the prompt."""
    prompt = prompt_of(raw, layout, problems)
    chosen = text_or_messages(raw.get("chosen", MISSING), "chosen", problems)
    rejected = text_or_messages(raw.get("rejected", MISSING), "rejected", problems)
    if prompt is None or chosen is None or rejected is None:
        return None
    prompt, chosen, rejected = same_style(prompt, chosen, rejected)
    if isinstance(prompt, str) or is_assistant(chosen[0]) or is_assistant(rejected[0]):  # type: ignore[arg-type]
        return pair(prompt, chosen, rejected, problems, prompt_column=layout.prompt)
    split = split_message_pair(chosen, rejected, problems)  # type: ignore[arg-type]
    if split is None:
        return None
    before = () if all(turn in split[0] for turn in prompt) else prompt
    return pair((*before, *split[0]), split[1], split[2], problems, prompt_column=layout.prompt)


def implicit(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Row | None:
    chosen = messages(raw.get("chosen", MISSING), "chosen", problems)
    rejected = messages(raw.get("rejected", MISSING), "rejected", problems)
    if chosen is None or rejected is None:
        return None
    split = split_message_pair(chosen, rejected, problems)
    if split is None:
        return None
    prompt = with_system(raw, split[0], layout.uses, problems)
    return pair(prompt, *split[1:], problems, prompt_column="chosen")


def hh(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Row | None:
    chosen = plain_text(raw.get("chosen", MISSING), "chosen", problems)
    rejected = plain_text(raw.get("rejected", MISSING), "rejected", problems)
    if chosen is None or rejected is None:
        return None
    split = split_text_pair(chosen, rejected, problems)
    return pair(*split, problems, prompt_column="chosen") if split else None


def example(
    prompt: Text,
    completion: Text,
    raw: dict[str, Any],
    problems: list[Problem],
    columns: tuple[str, str],
    label: bool | None = None,
) -> Example | None:
    """`columns` are what the prompt and the completion are called in a problem; a labelled (KTO) row has no answer."""
    prompt, completion = same_style(prompt, completion)
    check_prompt(prompt, columns[0], problems)
    check_reply(completion, columns[1], problems)
    if problems:
        return None
    return Example(prompt, completion, answer=None if label is not None else final_answer(raw, completion), label=label)


def final_answer(raw: dict[str, Any], completion: Text) -> str | None:
    """What a grader compares with: after '####' in answer or completion, else final_answer, else answer. A number is without its commas."""
    text = completion if isinstance(completion, str) else text_of(completion[-1])
    for candidate in (raw.get("answer"), text):
        if isinstance(candidate, str) and "####" in candidate:
            return without_commas(candidate.rsplit("####", 1)[1].strip()) or None
    return answer_text(raw.get("final_answer")) or answer_text(raw.get("answer"))


def without_commas(answer: str) -> str:
    """1,200 -> 1200, $1,234.50 -> $1234.50, 1,200 apples -> 1200 apples; (1,2), 3,5 and Paris, France as they are."""
    return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer


def conversation(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Row | None:
    turns = prompt_of(raw, layout, problems)
    split = split_messages(turns, layout.prompt, problems) if turns else None  # type: ignore[arg-type]
    return example(*split, raw, problems, (layout.prompt, layout.prompt)) if split else None


def prompt_completion(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Row | None:
    prompt = prompt_of(raw, layout, problems)
    completion = text_or_messages(raw.get(layout.reply, MISSING), layout.reply, problems)
    if prompt is None or completion is None:
        return None
    return example(prompt, completion, raw, problems, (layout.prompt, layout.reply))


def question_answer(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Row | None:
    """The whole answer text is the completion, its final answer the answer. A number is both."""
    prompt = prompt_of(raw, layout, problems)
    value = raw.get("answer", MISSING)
    completion = text_or_messages(value if isinstance(value, bool) else answer_text(value) or value, "answer", problems)
    if prompt is None or completion is None:
        return None
    if isinstance(value, str):
        completion = value  # as it stands: its leading space belongs to it
    return example(prompt, completion, raw, problems, (layout.prompt, "answer"))


def prompts(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Row | None:
    """A prompt and what its samples are graded by: of an answer with '####', what stands behind it."""
    prompt = prompt_of(raw, layout, problems)
    value = raw.get(layout.reply, MISSING)
    text = answer_text(value)
    answer = final_answer({**raw, "answer": value}, text) if text else None
    if answer is None:
        problems.append((layout.reply, describe(value), "the answer that samples are graded by: text or a number"))
    if prompt is not None:
        check_prompt(prompt, layout.prompt, problems)
    if problems or prompt is None:
        return None
    return Example(prompt, answer=answer)


def kto(raw: dict[str, Any], layout: Layout, problems: list[Problem]) -> Row | None:
    value = raw.get("label", MISSING)
    label = {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower())
    if label is None:
        problems.append(("label", describe(value), "true or false"))
    prompt = prompt_of(raw, layout, problems)
    if layout.reply:
        completion = text_or_messages(raw.get(layout.reply, MISSING), layout.reply, problems)
    else:
        split = split_messages(prompt, layout.prompt, problems) if prompt else None  # type: ignore[arg-type]
        prompt, completion = split or (None, None)
    if prompt is None or completion is None or label is None:
        return None
    return example(prompt, completion, raw, problems, (layout.prompt, layout.reply or layout.prompt), label)
