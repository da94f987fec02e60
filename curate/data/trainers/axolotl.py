"""axolotl: JSON lines, and axolotl.yaml with the `datasets` section that reads them.

    text          SFT `type: input_output` (segments, trained or not); DPO `type: {field_prompt, …}`, taken as they stand
    messages      SFT `type: chat_template`, each turn saying whether it is trained; DPO `type: chat_template.default`

Its reading of pairs in messages keeps roles and texts alone.
Source: axolotl's docs/dataset-formats, docs/rlhf.qmd, and src/axolotl/prompt_strategies/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

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
    plain,
    reply_turns,
    user_turn,
    without_template_args,
)

TITLE = "axolotl"


def _pairs(row: Row, about: About) -> dict[str, Any]:
    if about.standard:
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    without_template_args(row, TITLE, "tools", "chat_template_kwargs")
    columns: dict[str, Any] = {"messages": plain(row["prompt"], TITLE)}
    for side in ("chosen", "rejected"):
        reply = plain(row[side], TITLE)
        if len(reply) != 1:
            raise Unfit(f"have responses of several turns, and {TITLE} takes one")
        columns[side] = reply[0]
    return columns


def _completions(row: Row, about: About) -> dict[str, Any]:
    if about.standard:
        segments = [{"label": False, "text": row["prompt"]}, {"label": True, "text": row["completion"]}]
        return {"segments": segments}
    without_template_args(row, TITLE, "tools", "chat_template_kwargs")
    if "messages" in row:
        prompt, reply = row["messages"][:-1], row["messages"][-1:]
    else:
        prompt, reply = user_turn(row["prompt"]), reply_turns(row["completion"])
    said = [
        turn | {"train": turn["role"] == "assistant" and (trained or about.all_turns)}
        for turns, trained in ((prompt, False), (reply, True))
        for turn in plain(turns, TITLE)
    ]
    return {"messages": said}


def _config(about: About, files: Sequence[str]) -> dict[str, str]:
    if about.sort == PAIRS:
        kind: dict[str, Any] = (
            {"type": {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}}
            if about.standard
            else {"type": "chat_template.default", "field_messages": "messages"}
        )
    elif about.standard:
        kind = {"type": "input_output"}
    else:
        kind = {
            "type": "chat_template",
            "field_messages": "messages",
            "roles_to_train": [],
            "message_field_training": "train",
        }
    entries = [{"path": file, "ds_type": "json", "split": "train", **kind} for file in files]
    config: dict[str, Any] = ({"rl": "dpo"} if about.sort == PAIRS else {}) | {"datasets": entries}
    if about.in_order:
        config |= {"curriculum_sampling": True, "shuffle_merged_datasets": False}
    said = "# Paths are those of this folder: start axolotl here, or put the folder before them.\n"
    return {"axolotl.yaml": said + yaml.safe_dump(config, sort_keys=False)}


def _notes(about: About) -> list[str]:
    notes = ["axolotl: axolotl.yaml has the `datasets` section for these files; take it into your configuration."]
    if about.standard and about.sort == COMPLETIONS:
        notes.append(
            "axolotl's input_output adds no end token to plain text, and the measured rows have one: add your tokenizer's to what is trained."
        )
    return notes


TRAINER = Trainer(
    "axolotl",
    TITLE,
    takes={PAIRS: _pairs, COMPLETIONS: _completions, MESSAGES: _completions},
    fields=frozenset(("messages", "segments", "prompt", "chosen", "rejected", "system", "train")),
    beside=_config,
    notes=_notes,
    files=("axolotl.yaml",),
    why_not={
        PROMPTS: "axolotl's GRPO reads prompts through a function of your own",
        UNPAIRED: "axolotl reads labelled replies in templates of its own alone",
    },
)
