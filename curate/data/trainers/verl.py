"""verl: parquet for its RL trainers (PPO, GRPO, DAPO), and messages for its multi-turn SFT.

    prompts        data_source, prompt (messages), ability, reward_model {style, ground_truth}, extra_info {split, index, row_id, your columns}
    completions    messages, and your columns

`data_source` and `ability` are columns of yours where the rows have them; verl chooses its reward function by data_source. In parquet a message has
the keys of all others, so rows with more than roles and texts are refused.
Source: verl's docs/preparation/prepare_data.rst, verl/utils/dataset/{rl_dataset,multiturn_sft_dataset}.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    user_turn,
    whole,
    without_template_args,
)

if TYPE_CHECKING:
    import pyarrow as pa

TITLE = "verl"
OF_ROWS = ("data_source", "ability")  # columns of verl's that the user may have
EXTRA = ("split", "index", "row_id")


def _prompts(row: Row, about: About) -> dict[str, Any]:
    without_template_args(row, TITLE, "tools", "chat_template_kwargs")
    if row.get("answer") is None:
        raise Unfit("have no answer, which is the ground truth that verl's reward functions compare with")
    own = row["own"]
    return {
        "data_source": str(own.get("data_source") or about.source or "curate"),
        "prompt": plain(user_turn(row["prompt"]), TITLE),
        "ability": str(own.get("ability") or ""),
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"split": about.split, "index": row["index"], "row_id": row["row_id"], **_beside(own)},
    }


def _completions(row: Row, about: About) -> dict[str, Any]:
    without_template_args(row, TITLE, "tools", "chat_template_kwargs")
    return {"messages": plain(whole(row), TITLE), **row["own"]}


def _beside(own: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name not in OF_ROWS}


def _schema(about: About, own: Mapping[str, pa.DataType]) -> pa.Schema:
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    if about.sort != PROMPTS:
        return pa.schema([("messages", messages), *own.items()])
    extra = [("split", pa.string()), ("index", pa.int64()), ("row_id", pa.string())]
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", messages),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", pa.struct([*extra, *_beside(own).items()])),
        ]
    )


def _args(about: About, files: Sequence[str]) -> dict[str, str]:
    args: dict[str, Any] = {"data.train_files": list(files)}
    if about.in_order:
        args["data.shuffle"] = False
    if about.sort == PROMPTS:
        args |= {"data.prompt_key": "prompt", "data.reward_fn_key": "data_source"}
    else:
        args |= {"data.multiturn.enable": True, "data.multiturn.messages_key": "messages"}
    return {"trainer_args.json": json.dumps(args, indent=2) + "\n"}


def _notes(about: About) -> list[str]:
    notes = ["verl: the keys of trainer_args.json are settings of its configuration, their files those of this folder."]
    if about.standard:
        notes.append(
            "verl asks prompts as messages, through the model's chat template; these rows were measured as plain text."
        )
    if about.sort == PROMPTS:
        source = "yours" if "data_source" in about.own else repr(about.source or "curate")
        notes.append(
            f"`data_source` is {source}: verl chooses its reward function by it, or takes yours (custom_reward_function.path), which should grade as "
            "`sampling.grader` did."
        )
    elif not about.all_turns:
        notes.append(
            "verl trains every assistant turn of a conversation; measured was the last one (tokens.turns: last)."
        )
    return notes


TRAINER = Trainer(
    "verl",
    TITLE,
    takes={PROMPTS: _prompts, COMPLETIONS: _completions, MESSAGES: _completions},
    fields=frozenset(("messages", "reward_model", "extra_info", *EXTRA)),
    beside=_args,
    notes=_notes,
    why_not=dict.fromkeys((PAIRS, UNPAIRED), "verl has no trainer of its own for preferences"),
    schema=_schema,
    takes_own=True,
)
