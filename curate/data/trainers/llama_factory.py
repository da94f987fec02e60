"""LLaMA-Factory: JSON lines, and dataset_info.json, which says what their columns are.

    text          alpaca      {"instruction", "output"}, {"instruction", "chosen", "rejected"} with ranking, "label" as kto_tag
    messages      sharegpt    {"messages"}, {"messages", "chosen", "rejected"}, with tags for role and content; "tools" as JSON text

Turns alternate there: user or tool, then assistant; a row whose turns do not is left out by its loader without an error, so it is refused here. A
call of tools is a turn of its own (function_call), its functions as JSON.
Source: LLaMA-Factory's data/README.md and src/llamafactory/data/converter.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from curate.data.trainers.base import (
    COMPLETIONS,
    MESSAGES,
    PAIRS,
    PROMPTS,
    UNPAIRED,
    About,
    Row,
    Trainer,
    Unfit,
    whole,
    without_template_args,
)
from curate.recipe.bounds import json_value

TITLE = "LLaMA-Factory"
TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
    "observation_tag": "tool", "function_tag": "function_call",
}  # fmt: skip


def turn(message: dict[str, Any]) -> dict[str, str]:
    """A message as a role and a text; a call of tools as its functions in JSON."""
    more = sorted(set(message) - {"role", "content", "tool_calls", "tool_call_id", "name"})
    if more:
        raise Unfit(f"have messages with {', '.join(more)}, and {TITLE} reads roles, texts and calls of tools alone")
    if calls := message.get("tool_calls"):
        if message.get("content"):
            raise Unfit(f"have messages with a text beside a call of tools, which are turns of their own in {TITLE}")
        functions = [_function(call) for call in calls]
        return {"role": "function_call", "content": json.dumps(functions[0] if len(functions) == 1 else functions)}
    if message.get("content") is None:
        raise Unfit(f"have messages without a text, and {TITLE} has no such turns")
    return {"role": message["role"], "content": message["content"]}


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json_value(function["arguments"] or "{}")
        except ValueError:
            raise Unfit(f"have calls of tools whose arguments are no JSON, and {TITLE} reads JSON") from None
    return {"name": function.get("name"), "arguments": function.get("arguments")}


def turns(messages: Sequence[Any], *, ends: str) -> list[dict[str, str]]:
    """The messages as turns that alternate, the last by `ends`: user (a prompt) or assistant (a whole conversation)."""
    made = [turn(message) for message in messages]
    spoken = made[1:] if made and made[0]["role"] == "system" else made
    sides = (("user", "tool"), ("assistant", "function_call"))
    in_order = all(message["role"] in sides[i % 2] for i, message in enumerate(spoken))
    if not spoken or not in_order or (len(spoken) % 2 == 0) != (ends == "assistant"):
        raise Unfit(
            f"have turns that do not alternate between user (or one tool) and assistant, which {TITLE} leaves out"
        )
    return made


def _with_tools(row: Row, about: About, columns: dict[str, Any]) -> dict[str, Any]:
    without_template_args(row, TITLE, "chat_template_kwargs")
    if "tools" in about.own:
        columns["tools"] = json.dumps(row["tools"]) if row.get("tools") else ""
    return columns


def _pairs(row: Row, about: About) -> dict[str, Any]:
    if about.standard:
        return {"instruction": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
    columns: dict[str, Any] = {"messages": turns(row["prompt"], ends="user")}
    for side in ("chosen", "rejected"):
        reply = [turn(message) for message in row[side]]
        if len(reply) != 1:
            raise Unfit(f"have responses of several turns, and {TITLE} takes one")
        columns[side] = reply[0]
    return _with_tools(row, about, columns)


def _completions(row: Row, about: About) -> dict[str, Any]:
    if about.standard:
        columns = {"instruction": row["prompt"], "output": row["completion"]}
    else:
        columns = _with_tools(row, about, {"messages": turns(whole(row), ends="assistant")})
    return columns | ({"label": row["label"]} if about.sort == UNPAIRED else {})


def _info(about: About, files: Sequence[str]) -> dict[str, str]:
    """dataset_info.json: an entry a file, since a folder's files come in any order."""
    names = ["messages", "chosen", "rejected"] if not about.standard else []
    columns = {name: name for name in names if name == "messages" or about.sort == PAIRS}
    if about.standard:
        columns = {"prompt": "instruction"} | (
            {"chosen": "chosen", "rejected": "rejected"} if about.sort == PAIRS else {"response": "output"}
        )
    if about.sort == UNPAIRED:
        columns["kto_tag"] = "label"
    if "tools" in about.own:
        columns["tools"] = "tools"
    entry: dict[str, Any] = {"formatting": "alpaca"} if about.standard else {"formatting": "sharegpt", "tags": TAGS}
    entry |= ({"ranking": True} if about.sort == PAIRS else {}) | {"columns": columns}
    info = {name: {"file_name": file, **entry} for name, file in zip(_names(about, files), files, strict=True)}
    return {"dataset_info.json": json.dumps(info, indent=2) + "\n"}


def _names(about: About, files: Sequence[str]) -> list[str]:
    return [about.split] if len(files) == 1 else [f"{about.split}_{i:05d}" for i in range(len(files))]


def _notes(about: About) -> list[str]:
    notes = [
        f"LLaMA-Factory: `dataset_dir` is this folder, `dataset: {about.split}` (several files: their names in dataset_info.json, in order)."
    ]
    if about.in_order:
        notes.append("`disable_shuffling: true` keeps the rows' order in LLaMA-Factory.")
    if about.standard:
        notes.append(
            "LLaMA-Factory puts instructions into its `template`; these rows were measured as plain text, so take `template: empty`."
        )
    elif about.sort in (COMPLETIONS, MESSAGES) and not about.all_turns:
        notes.append("Measured was the last reply alone: `mask_history: true` trains it alone in LLaMA-Factory too.")
    return notes


TRAINER = Trainer(
    "llama_factory",
    TITLE,
    takes={PAIRS: _pairs, COMPLETIONS: _completions, MESSAGES: _completions, UNPAIRED: _completions},
    fields=frozenset(("instruction", "input", "output", "history", "messages", "chosen", "rejected", "label", "tools")),
    beside=_info,
    notes=_notes,
    files=("dataset_info.json",),
    why_not={PROMPTS: "LLaMA-Factory trains by no method that samples and grades answers to prompts"},
)
