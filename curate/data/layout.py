"""A format as one source has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curate.data.records import Problem
from curate.rows import Row

PREFERENCE = ("preference", "implicit", "hh", "alpaca_preference", "sharegpt_preference")


@dataclass(frozen=True)
class Layout:
    """A format as one source has it: which column the prompt and the reply come from, and which columns the row uses up."""

    format: str
    convert: Callable[[dict[str, Any], Layout, list[Problem]], Row | None]
    prompt: str = ""
    reply: str = ""
    uses: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        return "preference" if self.format in PREFERENCE else "sft"

    @property
    def reads(self) -> frozenset[str]:
        """Columns that make a difference to its rows: what they use up, and what is looked at and stays a column."""
        return self.uses | ({"final_answer"} if self.kind == "sft" and self.format != "kto" else set())
