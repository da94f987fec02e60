"""OpenRLHF: JSON lines, and the keys of its command line that name their columns (trainer_args.json).

    pairs          --prompt_key prompt --chosen_key chosen --rejected_key rejected      (train_dpo)
    completions    --input_key prompt --output_key completion                           (train_sft)
    prompts        --input_key prompt --label_key answer                                (train_ppo_ray, for GRPO and others)

Messages go with --apply_chat_template, which is given no tools.
Source: OpenRLHF's openrlhf/datasets/{reward,sft,prompts}_dataset.py.
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
    plain,
    without_template_args,
)

TITLE = "OpenRLHF"
KEYS = {
    PAIRS: {"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"},
    COMPLETIONS: {"input_key": "prompt", "output_key": "completion"},
    MESSAGES: {"input_key": "messages"},
    PROMPTS: {"input_key": "prompt", "label_key": "answer"},
}


def _row(row: Row, about: About) -> dict[str, Any]:
    without_template_args(row, TITLE, "tools", "chat_template_kwargs")
    names = KEYS[about.sort].values()
    if about.sort == PROMPTS and row.get("answer") is None:
        raise Unfit("have no answer to grade by")
    return {name: value if isinstance(value := row[name], str) else plain(value, TITLE) for name in names}


def _args(about: About, files: Sequence[str]) -> dict[str, str]:
    named = "prompt_data" if about.sort == PROMPTS else "dataset"
    args: dict[str, Any] = {named: files[0] if len(files) == 1 else "data", **KEYS[about.sort]}
    if not about.standard:
        args["apply_chat_template"] = True
    if about.all_turns and about.sort == MESSAGES:
        args["multiturn"] = True
    return {"trainer_args.json": json.dumps(args, indent=2) + "\n"}


def _notes(about: About) -> list[str]:
    said = "OpenRLHF: the keys of trainer_args.json are options of its command line (`--input_key prompt …`), their files those of this folder."
    return [said, *(["OpenRLHF shuffles rows: their order is kept in the file alone."] if about.in_order else [])]


TRAINER = Trainer(
    "openrlhf",
    TITLE,
    takes=dict.fromkeys(KEYS, _row),
    fields=frozenset(("prompt", "chosen", "rejected", "completion", "messages", "answer", "margin", "datasource")),
    beside=_args,
    notes=_notes,
    why_not={UNPAIRED: "OpenRLHF's readers of labelled replies differ from version to version"},
)
