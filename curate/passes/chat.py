"""A chat template: what it makes of messages, and what it leaves out, adds or does not end.

Source: transformers' `apply_chat_template`, as TRL 1.16 calls it; nothing is appended to what the template gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from curate.errors import ModelError
from curate.passes.thinking import special_tokens, tags_of
from curate.rows import Example, Message, Pair, Row, Text, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The day that templates are told where they ask for today's: a value does not depend on the day that it was measured on. It is the one that
# Llama 3's templates fall back to by themselves.
DATE = date(2024, 7, 26)
ASKED = Message(role="user", content="first six")
QUESTIONS: tuple[
    tuple[Message, ...], ...
] = (  # the plainest first; some templates want a system turn, or several turns
    (ASKED,),
    (Message(role="system", content="five more"), ASKED),
    (ASKED, Message(role="assistant", content="third"), ASKED),
)
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of what a turn thinks before its content
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as TRL looks for them
PROMPT_END = 80  # characters of a prompt that are kept: more than any tag has
THOUGHT = "<think>\nfirst seven\n</think>\nlast eight"


class Refused(Exception):
    """The chat template refuses these messages; a row's problem, not the run's."""


@dataclass(frozen=True)
class Template:
    """What is known of a tokenizer's chat template, from a few messages of our own.

    end: the special token that closes a reply, None where the template gives none, or where it is not known because the template refuses every
    conversation of ours: refuses is then what it says of the plainest one. dated: whether it asks for today's date.
    keeps_reasoning: whether the text between <think> and </think> of a reply is in what it renders. eos: the tokenizer's own end token. stops: the
    tokens that end an answer when it is sampled: eos, and those of the model's generation settings. marks_turns: whether it says itself, by
    {% generation %}, which text is the assistant's. thinks_in: what opens and closes the model's thinking. prompt_end: how a prompt
    ends where an answer is to come. special: the tokens that a decoded text leaves out.
    """

    end: str | None
    dated: bool = False
    keeps_reasoning: bool = True
    eos: str | None = None
    stops: tuple[str, ...] = ()
    refuses: str | None = None
    marks_turns: bool = False
    thinks_in: tuple[str, str] | None = None
    prompt_end: str = ""
    special: tuple[str, ...] = ()


def as_chat(row: Row) -> Row:
    """The row as messages: its prompt a user's turn, its responses an assistant's. A row of messages is as it was."""
    if isinstance(row, Pair):
        return replace(row, prompt=turns(row.prompt, "user"), chosen=turns(row.chosen), rejected=turns(row.rejected))
    completion = None if row.completion is None else turns(row.completion)
    return replace(row, prompt=turns(row.prompt, "user"), completion=completion)


def turns(text: Text, role: str = "assistant") -> tuple[Message, ...]:
    return (Message(role=role, content=text),) if isinstance(text, str) else text


@lru_cache(maxsize=64)
def arguments(template_args: str) -> dict[str, Any]:
    """A row's `template_args` as arguments of `apply_chat_template`, as TRL gives them."""
    given = json.loads(template_args) if template_args else {}
    return {"tools": given.get("tools"), **given.get("chat_template_kwargs", {})}


def template_arguments(tokenizer: PreTrainedTokenizerBase, template_args: str) -> dict[str, Any]:
    """What `apply_chat_template` is given beside the messages: a row's own arguments, and the day that every measurement is made on."""
    dated = "strftime_now" in str(getattr(tokenizer, "chat_template", ""))
    return {**({"strftime_now": DATE.strftime} if dated else {}), **arguments(template_args)}


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    generation_prompt: bool = True,
    template_args: str = "",
) -> str:
    """The template's text of these messages. Refused where the template raises; ModelError where the tokenizer has no template."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ModelError(
            f"{tokenizer.name_or_path or 'this tokenizer'}: wanted a chat template, because rows are conversational "
            "(lists of messages); the tokenizer has none.\n"
            "  Use a model whose tokenizer has one, save one beside the weights (chat_template.jinja), or give the "
            "rows as plain text."
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **template_arguments(tokenizer, template_args),
            )
        )
    except Exception as problem:  # templates raise jinja2's errors, and Python's own on unexpected roles or contents
        words = (str(problem).strip().splitlines() or [""])[0][:300]
        raise Refused(f"the chat template refuses these messages ({type(problem).__name__}: {words})") from problem


def left_out(messages: Sequence[Message], rendered: str, *, of_reply: bool = False) -> list[str]:
    """The roles of the turns whose text is not in what was rendered of them, white space around it aside; "role: key" where something else that
    the turn says is not: its reasoning, or the name of a tool that it calls. of_reply: the turns are the response's, whose role is called "reply".
    """
    roles: list[str] = []
    for message in messages:
        content, role = message.get("content"), "reply" if of_reply else str(message["role"])
        if isinstance(content, str) and content.strip() not in rendered:
            roles.append(role)
        if len(message) > 2:
            texts = {key: [message[key]] for key in REASONING if isinstance(message.get(key), str)}
            texts["tool_calls"] = [name for name in map(_called, message.get("tool_calls") or ()) if name]
            roles += [f"{role}: {key}" for key in texts if any(text.strip() not in rendered for text in texts[key])]
    return list(dict.fromkeys(roles)) if of_reply else roles


def _called(call: Any) -> str | None:
    """The name of the tool that a call is of."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def closing_token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """The special token that ends these ids, white space after it aside; None where they end in text."""
    special = set(tokenizer.all_special_ids) | {
        i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special
    }
    for token in reversed(ids):
        if token in special:
            return token
        if tokenizer.decode([token]).strip():
            return None
    return None


def marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says itself, by {% generation %}, which text is the assistant's."""
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default", "") if isinstance(template, dict) else template
    return MARKERS.search(template or "") is not None


def template_of(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int] = ()) -> Template | None:
    """What the tokenizer's template does with a question and a reply; None where there is no template. stops: see `Template`, beside EOS."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    refused: list[str] = []

    def shown(*messages: Message, generation_prompt: bool = False) -> str | None:
        try:
            return render(tokenizer, messages, generation_prompt=generation_prompt)
        except Refused as refusal:
            refused.append(str(refusal))
            return None

    reply, before = None, QUESTIONS[0]
    for before in QUESTIONS:
        reply = shown(*before, Message(role="assistant", content="last eight"))
        if reply is not None:
            break
    asked = shown(*before, generation_prompt=True)
    end = None if reply is None else closing_token(tokenizer, ids_of(tokenizer, reply))
    thought = shown(*before, Message(role="assistant", content=THOUGHT))
    ends = dict.fromkeys((*([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []), *stops))
    return Template(
        end=None if end is None else str(tokenizer.convert_ids_to_tokens(end)),
        dated="strftime_now" in str(template),
        keeps_reasoning=thought is None or "first seven" in thought,
        eos=tokenizer.eos_token,
        stops=tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in ends if 0 <= i < len(tokenizer)),
        refuses=refused[0] if reply is None else None,
        marks_turns=marks_turns(tokenizer),
        thinks_in=tags_of(tokenizer),
        prompt_end=(asked or "")[-PROMPT_END:],
        special=tuple(sorted(special_tokens(tokenizer))),
    )


def ids_of(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Token ids of a rendered text, as `apply_chat_template` makes them: nothing is put before or after it."""
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def template_to_json(template: Template | None) -> str:
    return json.dumps(None if template is None else template.__dict__)


def template_from_json(text: str) -> Template | None:
    fields = json.loads(text)
    tuples = {
        name: tuple(fields[name]) for name in ("stops", "thinks_in", "special") if fields and fields[name] is not None
    }
    return None if fields is None else Template(**{**fields, **tuples})


def with_context(
    prompt: tuple[Message, ...], system: str | None, few_shot: str | Sequence[Example] | None
) -> tuple[Message, ...]:
    own = [m for m in prompt if m["role"] == "system"]
    rest = [m for m in prompt if m["role"] != "system"]
    head: list[Message] = own or ([{"role": "system", "content": system}] if system else [])
    if isinstance(few_shot, str):
        last = max((i for i, m in enumerate(rest) if m["role"] == "user"), default=None)
        if last is not None:
            rest[last] = {**rest[last], "content": few_shot + text_of(rest[last])}
    else:
        shots: list[Message] = []
        for example in few_shot or ():
            question = example.prompt
            shots += [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
            shots += turns(example.completion or "")
        rest = shots + rest
    return (*head, *rest)
