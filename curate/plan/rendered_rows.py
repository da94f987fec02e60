"""What a chat template makes of a recipe's own rows, counted before anything runs: text that it leaves out, rows that it refuses, prompts that it
ends otherwise before an answer than before a reply that is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from curate.passes.chat import Refused, as_chat, left_out, render, turns
from curate.rows import Pair, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 1000  # rows that a plan renders
ENDS = "the prompt ends with "


def look(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, *, chat: bool, first: dict[str, int] | None = None
) -> Counter[str]:
    """How many rows the template leaves text out of (by whose turn it is: reply, system, user, …), or refuses (by what it says), and
    whose prompt it ends with what it does not have before a reply (ENDS and that text).

    first: learns at which of the rows each of these occurs first.
    """
    counts: Counter[str] = Counter()
    for i, row in enumerate(rows):
        if chat:
            row = as_chat(row)
        if isinstance(row.prompt, str):
            continue
        replies = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)
        lost: set[str] = set()
        try:
            asked = render(tokenizer, row.prompt, template_args=row.template_args) if row.prompt else ""
            for reply in replies:
                messages = () if reply is None else turns(reply)
                text = render(
                    tokenizer,
                    (*row.prompt, *messages),
                    generation_prompt=reply is None,
                    template_args=row.template_args,
                )
                if reply is not None and not text.startswith(asked.rstrip()):
                    lost.add(f"{ENDS}{_prompts_end(row, tokenizer, asked)!r}")
                lost |= {*left_out(row.prompt, text), *left_out(messages, text, of_reply=True)}
        except Refused as refused:
            lost = {str(refused)}
        counts.update(lost)
        for what in lost if first is not None else ():
            first.setdefault(what, i)  # type: ignore[union-attr]
    return counts


def _prompts_end(row: Row, tokenizer: PreTrainedTokenizerBase, asked: str) -> str:
    """What the template writes behind the turns of a prompt where an answer is to come; the prompt's last words where that cannot be told."""
    turns_alone = render(tokenizer, row.prompt, generation_prompt=False, template_args=row.template_args)  # type: ignore[arg-type]
    return asked[len(turns_alone) :] if asked.startswith(turns_alone) else asked[-40:]


def lost_text(counts: Counter[str], n: int, rows: int, model: str, first: Mapping[str, str] | None = None) -> list[str]:
    """What `look` found, in sentences. n: rows looked at, of so many rows. first: the name of the first row of each, where it is known."""
    part = f"of {n:,} rows" if n == rows else f"of {n:,} rows looked at (of {rows:,})"
    notes = []
    for what, count in sorted(counts.items()):
        if what == "reply":
            notes.append(
                f"The chat template of {model} leaves out text of the reply in {count:,} {part}: the rest alone is measured, and a training on these "
                "rows would see no more. Take a template that keeps it (chat_template.jinja beside the tokenizer); pairs that differ in nothing "
                "else get NULL and a token_problem."
            )
        elif what.startswith("reply: "):
            notes.append(
                f"The chat template of {model} leaves out `{what.removeprefix('reply: ')}` of the reply in {count:,} {part}: it is neither "
                "measured nor trained on. Take a template that renders it (chat_template.jinja beside the tokenizer)."
            )
        elif what.startswith(ENDS):
            notes.append(
                f"The chat template of {model} ends the prompt with {what.removeprefix(ENDS)} where an answer is to come, and otherwise before a "
                f"reply that is there, in {count:,} {part}. The reply is measured as TRL trains it, behind what both have; answers are sampled "
                "behind the whole of it."
            )
        elif ": " in what and not what.startswith("the chat template refuses"):
            role, _, key = what.partition(": ")
            notes.append(
                f"The chat template of {model} leaves out `{key}` of earlier {role} turns in {count:,} {part}: neither the model that is "
                "measured nor one trained on them sees it."
            )
        elif what.startswith("the chat template refuses"):
            notes.append(
                f"{count:,} {part} cannot be measured: {what}."
                + (f" The first is {first[what]}." if first and what in first else "")
            )
        else:
            notes.append(
                f"The chat template of {model} leaves out text of {'an' if what[0] in 'aeiou' else 'a'} {what} turn in {count:,} {part}: neither the "
                "model that is measured nor one trained on them sees it."
            )
    return notes
