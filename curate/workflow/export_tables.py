"""A selection's rows as an export's parts, in Arrow tables as the store gives them: no row passes through Python.

What does not fit this way (kept rows of several styles, both responses of a pair, a weight of the user's own, columns of types that Arrow has
otherwise) is exported row by row (`ByRows` says so), which also says best what is wrong with a row. Both give the same files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.data.arrow_types import read_types
from curate.data.batches import Own, says_bytes
from curate.data.exported import TEMPLATE_ARGS, ExportRow, Plan, renamed
from curate.data.parts import Parts
from curate.passes.chat import as_chat
from curate.store.selected import BESIDE, Selected
from curate.store.sql import json_pointer

if TYPE_CHECKING:
    from curate.store import Selection

ANSWER = "CASE WHEN r.prompt IS NOT NULL AND r.label IS NULL THEN r.answer END"
TURNS = """from_json({column}, '[{{"role": "VARCHAR", "content": "VARCHAR"}}]')"""


class ByRows(Exception):
    """These rows have to be exported one by one."""


@contextmanager
def parts_of(
    selection: Selection,
    work: Path,
    *,
    format: str,
    chat: bool,
    asked: Sequence[str],
    weight: str | None,
    types: Mapping[str, str],
    by_rank: bool = False,
) -> Iterator[Parts]:
    """The parts of an export. asked: columns of `scored` beside the rows. weight: one that becomes `weight`. types: the sources' Arrow types.
    by_rank: rows in the order of `order_by`.
    """
    if format == "extend":
        raise ByRows
    beside = list(dict.fromkeys([*asked, *([weight] if weight else [])]))
    kept, dropped = Selected.both(selection, work, beside, by_rank=by_rank)
    row = kept.first()
    if row is None:
        raise ByRows
    first = ExportRow(as_chat(row) if chat else row, row.row_id, weight=1.0 if weight else None)
    beyond_text = selection.holds_more_than_text
    plan = Plan.of(first, format, as_json=beyond_text)
    if beyond_text and not plan.as_json:  # messages behind a first row of text
        raise ByRows
    typed = read_types(types)
    parts = [
        TablePart(one, plan, typed, asked, weight, chat=chat, is_dropped=one is dropped) for one in (kept, dropped)
    ]
    own = list(dict.fromkeys(name for part in parts for name in part.own))
    ours = {name for part in parts for name in part.ours} - {"reason"}
    for part, more in zip(parts, (set(), {"reason"}), strict=True):
        part.called = renamed(own, ours | more)
    yield Parts(parts[0], parts[1], plan.kind.kind, plan.layout, parts[0].weight_sum())


class TablePart:
    """The kept rows, or the dropped ones. See `curate.data.parts.Part`."""

    def __init__(
        self,
        selected: Selected,
        plan: Plan,
        typed: Mapping[str, pa.DataType],
        asked: Sequence[str],
        weight: str | None,
        *,
        chat: bool,
        is_dropped: bool,
    ):
        self.selected, self.plan, self.asked, self.weight = selected, plan, list(asked), weight
        self.chat, self.is_dropped = chat, is_dropped
        self.n_rows = len(selected)
        self.fixed = plan.schema(is_dropped)
        self.called: Mapping[str, str] = {}
        self._asked_types = {name: self._asked_type(name) for name in self.asked} if self.n_rows else {}
        structures = selected.structures(ANSWER)
        self._columns = Own([text for text, _ in structures], selected.column_types(), typed)
        if self._columns.mixed:
            self._columns.learn(table for _, table in selected.read({"columns": "o.columns"}))
        self.own: Collection[str] = self._columns.names
        self._held = list(dict.fromkeys(name for text, answers in structures for name in self._held_of(text, answers)))
        self.ours = {*self.fixed, *(name for is_own, name in self._held if not is_own)}
        self._bytes_beside: set[str] = set()

    def _held_of(self, structure: str | None, answers: bool) -> list[tuple[bool, str]]:
        """(whether it is the user's, name) of the columns that a row of this shape holds beside the settled ones, in their order."""
        own = [(True, name) for name in self._columns.names_of(structure)]
        return [*own, *([(False, "answer")] if answers else []), *((False, name) for name in self.asked)]

    def schema(self) -> pa.Schema:
        own = self._columns.types
        kinds = {(True, name): kind for name, kind in own.items()} | {
            (False, name): kind for name, kind in self._asked_types.items()
        }
        kinds[False, "answer"] = pa.string()
        return pa.schema([*self.fixed.items(), *((self._named(*held), kinds[held]) for held in self._held)])

    def tables(self) -> Iterator[pa.Table]:
        schema = self.schema()
        texts = self._texts()
        picked = {f"fixed {name}": sql for name, sql in texts.items()} | {"row_id": "r.row_id", "answer": ANSWER}
        own = self._columns.picked(json_pointer)
        numbered = {name: f"own {number}" for number, name in enumerate(own)}
        picked |= {numbered[name]: sql for name, sql in own.items()}
        if self._columns.mixed:
            picked["columns"] = "o.columns"
        for listed, table in self.selected.read(picked):
            found: dict[tuple[bool, str], Any] = {(False, name): table[f"fixed {name}"] for name in texts}
            found |= {(False, "row_id"): table["row_id"], (False, "answer"): table["answer"]}
            if self.is_dropped:
                found[False, "reason"] = listed["reason"]
            if self.weight:
                nothing = pa.nulls(len(table), pa.float64())
                found[False, "weight"] = nothing if self.is_dropped else listed[BESIDE + self.weight].cast(pa.float64())
            found |= {(True, name): column for name, column in self._columns.arrays(table, numbered).items()}
            for name, kind in self._asked_types.items():
                found[False, name] = _finite(listed[BESIDE + name]).cast(kind)
                if kind == pa.string() and says_bytes(found[False, name]):
                    self._bytes_beside.add(name)
            if not self.is_dropped and any(found[False, name].null_count for name in self.plan.names):
                raise ByRows
            order = [*((False, name) for name in self.fixed), *self._held]
            yield pa.Table.from_arrays(
                [_whole(found[held]).cast(kind) for held, kind in zip(order, schema.types, strict=True)], schema=schema
            )

    def _texts(self) -> dict[str, str]:
        """The text columns of the format, and the label: name -> SQL. NULL where a row does not fit."""
        prompt, reply = self._text("r.prompt", "user"), self._text("coalesce(r.chosen, r.completion)", "assistant")
        texts = {name: self._text(f"r.{name}", "assistant") for name in ("chosen", "rejected")}
        whole = f"CASE WHEN {prompt} IS NOT NULL AND {reply} IS NOT NULL THEN list_concat({prompt}, {reply}) END"
        texts |= {"prompt": prompt, "completion": reply, "messages": whole, "label": "r.label"}
        picked = {name: texts[name] for name in self.plan.names}
        if self.plan.as_json:
            picked |= {name: f"json_extract(r.template_args, '$.{name}')::VARCHAR" for name in TEMPLATE_ARGS}
            picked[TEMPLATE_ARGS[1]] = (
                f"CASE WHEN r.prompt IS NOT NULL THEN coalesce({picked[TEMPLATE_ARGS[1]]}, '{{}}') END"
            )
        return picked

    def _text(self, column: str, role: str) -> str:
        if self.plan.style == "standard":
            return f"CASE WHEN r.style = 'standard' THEN {column} END"
        turn, turns = f"{{'role': '{role}', 'content': {column}}}", TURNS.format(column=column)
        if self.plan.as_json:
            turn, turns = f"to_json({turn})::VARCHAR", f"""from_json({column}, '["JSON"]')::VARCHAR[]"""
        as_turn = (
            f"ELSE CASE WHEN {column} IS NOT NULL THEN [{turn}] END "
            if self.chat or "messages" in self.plan.names
            else ""
        )
        return f"CASE WHEN r.style = 'conversational' THEN {turns} {as_turn}END"

    def _asked_type(self, name: str) -> pa.DataType:
        """What the values of a column of `scored` are together in an export."""
        column = self.selected.list[BESIDE + name]
        if _finite(column).null_count == len(column):
            return pa.string()
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_boolean(kind):
            return kind
        if pa.types.is_floating(kind):
            return pa.float64()
        if pa.types.is_integer(kind) and kind != pa.uint64():
            return pa.int64()
        raise ByRows

    def weight_sum(self) -> float:
        """The sum of the weights, 0 where there are none. ByRows where one of them cannot be one."""
        if not self.weight:
            return 0.0
        column = self.selected.list[BESIDE + self.weight]
        if not (
            pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
        ):
            raise ByRows
        weights = column.cast(pa.float64()).to_numpy()
        total = float(np.cumsum(weights)[-1])  # one after another, as they are drawn from
        if not (np.isfinite(weights) & (weights >= 0)).all() or total <= 0:
            raise ByRows
        return total

    def texts_of_several(self) -> list[str]:
        return sorted(self._named(True, name) for name in self._columns.as_text)

    def without_bytes(self) -> set[str]:
        return self._columns.without_bytes | self._bytes_beside

    def _named(self, is_own: bool, name: str) -> str:
        return self.called.get(name, name) if is_own else name


def _finite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """NaN and infinities are unknown in an export."""
    return pc.if_else(pc.is_finite(column), column, None) if pa.types.is_floating(column.type) else column


def _whole(column: Any) -> Any:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
