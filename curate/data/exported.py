"""A row as an export has it: which text columns its format has, the user's columns beside them, and copies by weight."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from curate.data.columns import free_name
from curate.data.texts import jsonable
from curate.errors import ValidationError
from curate.rows import Example, Pair, Row, Text, is_plain

if TYPE_CHECKING:
    import pyarrow as pa

TEMPLATE_ARGS = ("tools", "chat_template_kwargs")  # columns of rows in messages that TRL gives the chat template
TEXTS = ("prompt", "chosen", "rejected", "completion", "messages", "label")
# Columns that TRL refuses, or takes for its own (TRL 1.16, dpo_trainer and sft_trainer), and what fairseq2 takes for the reference's scores.
OF_TRAINERS = (
    "text conversations image images input_ids labels attention_mask position_ids completion_mask assistant_masks seq_lengths "
    "prompt_ids chosen_ids rejected_ids completion_ids ref_chosen_logps ref_rejected_logps tools chat_template_kwargs "
    "reference_score_chosen reference_score_rejected"
)
SIDE = "side"  # of an export of both responses: which one a row has
TAKEN = frozenset((*TEXTS, "row_id", *OF_TRAINERS.split()))


@dataclass(frozen=True, slots=True)
class ExportRow:
    """A row to export. columns: the user's. asked: scores and measurements that stand beside them. reason: why it was dropped.

    `row` may be None among the dropped (a bad row, a foreign id): it has no text. The rows of an export have a weight all, or none of them.
    """

    row: Row | None
    row_id: str
    columns: dict[str, Any] = field(default_factory=dict)
    weight: float | None = None
    reason: str | None = None
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Which text columns a format has, whether rows have weights, and how a row fills them.

    as_json: rows have more than roles and texts (calls of tools, reasoning, tools), so that each message is a JSON object in the table: as a struct
    every message would get all keys of the others.
    """

    format: str
    kind: type[Row]
    style: str
    names: tuple[str, ...]
    weighted: bool = False
    as_json: bool = False

    @classmethod
    def of(cls, first: ExportRow, format: str, *, as_json: bool = False) -> Plan:
        """The columns and style of an export, as its first row has them; every other kept row has to be alike. as_json: see above."""
        row = first.row
        if row is None:
            raise no_text(first)
        names: tuple[str, ...]
        if format == "messages":
            names = ("messages",)
        elif format == "prompts":
            names = ("prompt",)
        elif isinstance(row, Pair) and format == "trl":
            names = ("prompt", "chosen", "rejected")
        elif isinstance(row, Example) and row.completion is None and format == "trl":
            names = ("prompt",)
        else:
            names = ("prompt", "completion")
        if isinstance(row, Example) and row.label is not None and format != "prompts":
            names += ("label",)
        style = "conversational" if format == "messages" else row.style
        return cls(format, type(row), style, names, first.weight is not None, as_json and style == "conversational")

    @property
    def layout(self) -> str:
        sort = {
            ("prompt", "chosen", "rejected"): "trl preference",
            ("prompt",): "trl prompts",
            ("prompt", "completion"): "prompt/completion",
            ("prompt", "completion", "label"): "trl unpaired preference",
        }
        return f"{sort.get(self.names, 'messages')}, {self.style}"

    def schema(self, is_dropped: bool) -> dict[str, pa.DataType]:
        import pyarrow as pa

        if self.style == "standard":
            text = pa.string()
        elif self.as_json:
            text = pa.list_(pa.json_())
        else:
            text = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        types: dict[str, pa.DataType] = {name: pa.bool_() if name == "label" else text for name in self.names}
        if self.as_json:
            types |= dict.fromkeys(TEMPLATE_ARGS, pa.json_())
        types |= {"row_id": pa.string()} | ({"weight": pa.float64()} if self.weighted else {})
        return types | ({"reason": pa.string()} if is_dropped else {})

    def kept(self, record: ExportRow) -> dict[str, Any]:
        """Text columns, row_id and the weight. ValidationError where the row has not the columns or the style of the first."""
        texts = self.texts(record)
        if record.row is not None and not self.as_json and not is_plain_row(record.row):
            raise ValidationError(
                f"row {record.row_id} holds more than roles and texts (calls of tools, reasoning, tools), which the rows before it do not: say "
                "`as_json=True`, so that its messages are kept whole."
            )
        for name in self.names:
            if texts.get(name) is None:
                raise ValidationError(f"row {record.row_id} has no {name}, which the rows before it have. {ONE_SORT}")
            if name != "label" and isinstance(texts[name], str) != (self.style == "standard"):
                style = "standard" if isinstance(texts[name], str) else "conversational"
                raise ValidationError(
                    f"row {record.row_id} is {style}, the rows before it are {self.style}. {ONE_SORT}"
                )
        return texts

    def dropped(self, record: ExportRow) -> dict[str, Any]:
        """As `kept`, of a dropped row; what does not fit is left empty."""
        if record.row is None:
            return {"row_id": record.row_id}
        texts = self.texts(record)
        unfit = [n for n in self.names if n != "label" and isinstance(texts.get(n), str) != (self.style == "standard")]
        return texts | dict.fromkeys(unfit)

    def texts(self, record: ExportRow) -> dict[str, Any]:
        row = record.row
        if isinstance(row, Pair):
            reply: Text | None = row.chosen
            values: dict[str, Text | bool | None] = {"chosen": row.chosen, "rejected": row.rejected}
        elif isinstance(row, Example):
            reply = row.completion
            values = {"label": row.label}
        else:
            raise no_text(record)
        values |= {"prompt": row.prompt, "completion": reply}
        if "messages" in self.names and reply is not None:
            values["messages"] = (*turns(row.prompt, "user"), *turns(reply, "assistant"))
        texts: dict[str, Any] = {"row_id": record.row_id} | ({"weight": record.weight} if self.weighted else {})
        for name in self.names:
            value = values.get(name)
            texts[name] = list(value) if isinstance(value, tuple) else value
            if self.as_json and isinstance(value, tuple):
                texts[name] = [_json(message) for message in value]
        if self.as_json:
            given = json.loads(row.template_args or "{}")
            texts["tools"] = _json(given["tools"]) if given.get("tools") else None
            texts["chat_template_kwargs"] = _json(given.get("chat_template_kwargs", {}))
        if isinstance(row, Example) and row.answer is not None and row.label is None:
            texts["answer"] = row.answer
        return texts


def _json(value: Any) -> str:
    """As DuckDB writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def is_plain_row(row: Row) -> bool:
    """Whether a row is texts, or messages of roles and texts, and nothing else."""
    texts = (row.prompt, row.chosen, row.rejected) if isinstance(row, Pair) else (row.prompt, row.completion)
    return not row.template_args and all(
        text is None or isinstance(text, str) or all(map(is_plain, text)) for text in texts
    )


def no_text(record: ExportRow) -> ValidationError:
    return ValidationError(f"row {record.row_id}: no text is known of it (an imported id), it cannot be exported.")


ONE_SORT = "An export holds one sort of rows: choose them with `select.where`, or take `--set export.format=messages`."


def turns(text: Text, role: str) -> tuple[Any, ...]:
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def own_columns(record: ExportRow) -> dict[str, Any]:
    """The user's columns of a row, under their own names; what the export calls them is settled when all rows are known (`renamed`)."""
    return {name: jsonable(value) for name, value in record.columns.items()}


def asked_columns(record: ExportRow) -> dict[str, Any]:
    return {name: jsonable(value) for name, value in record.asked.items()}


def renamed(own: Collection[str], ours: Collection[str]) -> dict[str, str]:
    """The user's columns whose names are taken in the export, and a name for each that no row of it has. ours: the export's own columns."""
    taken = TAKEN.union(ours)
    names: dict[str, str] = {}
    for name in own:
        if name in taken:
            names[name] = free_name(name, {*taken, *own, *names.values()})
    return names


def both_responses(records: Iterator[ExportRow]) -> Iterator[ExportRow]:
    """Every pair as two examples, its chosen and its rejected response, told apart by the column `side`: SFT on both before DPO
    ("extend", Ren & Sutherland 2024, arXiv:2407.10490). Other rows as they are.
    """
    for record in records:
        if not isinstance(record.row, Pair):
            yield record
            continue
        for side in ("chosen", "rejected"):
            row = Example(record.row.prompt, getattr(record.row, side), template_args=record.row.template_args)
            yield replace(record, row=row, asked={**record.asked, SIDE: side})


class Weights:
    """The weights of an export's rows as they pass: their sum, and which of them cannot be one."""

    def __init__(self) -> None:
        self.given, self.total, self._rows = False, 0.0, 0
        self._wrong: dict[str, list[str]] = {}

    def add(self, record: ExportRow) -> None:
        self._rows += 1
        value = record.weight
        self.given = self.given or value is not None
        if value is None:
            self._wrong.setdefault("unknown", []).append(record.row_id)
        elif not math.isfinite(value):
            self._wrong.setdefault("not finite", []).append(record.row_id)
        elif value < 0:
            self._wrong.setdefault("below 0", []).append(record.row_id)
        else:
            self.total += value

    def check(self, needed: bool = False) -> None:
        """ValidationError where there are weights (or needed ones) and one is unknown, infinite or negative, or all are 0."""
        if not (self.given or needed):
            return
        if self._wrong:
            faults = "; ".join(
                f"{why} in {len(ids):,} (row {', row '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
                for why, ids in self._wrong.items()
            )
            raise ValidationError(
                f"weights are numbers of at least 0, one for each of the {self._rows:,} rows; found: {faults}. Leave such rows out, or take "
                "another column."
            )
        if self.total <= 0:
            raise ValidationError(
                f"every weight of the {self._rows:,} rows is 0: nothing would be trained on. Take another column for the weight."
            )
