"""The recipe's sections about the rows that are kept: `select`, and `export`, where they go."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from curate.recipe.doors import PathText
from curate.recipe.sections import Strict


class Keep(Strict):
    """How many of the rows that are left: exactly one of the three."""

    share: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="of the rows that are left")
    rows: Annotated[int, Field(ge=0)] | None = Field(None, description="at most so many")
    tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="as many rows as fit into so many tokens")

    @model_validator(mode="after")
    def one(self) -> Keep:
        given = [key for key in ("share", "rows", "tokens") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"keep takes exactly one of share, rows, tokens; found {', '.join(given) or 'none'}")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The one that is given, by its name."""
        return {key: value for key in ("share", "rows", "tokens") if (value := getattr(self, key)) is not None}


class Worst(Strict):
    """A share from the end of a column that the recipe calls bad."""

    share: float = Field(ge=0, lt=1, description="of the rows that `where` left")
    worst: Literal["high", "low"] = Field(description="which end of the column is bad")


class Select(Strict):
    """Which rows are kept: exclude, then where, then drop_worst, then order_by, then keep (in every group of `per`)."""

    exclude: Literal["heldout"] | None = Field(
        None, description="heldout: no row whose prompt is in the recipe's held-out set"
    )
    where: str | None = Field(
        None, description="SQL over the view `scored` of this recipe; a row stays where it is true"
    )
    drop_worst: dict[str, Annotated[float, Field(ge=0, lt=1)] | Worst] = Field(
        {},
        description="score: share; or, for a column whose worst end nobody has said, column: {share: 0.1, worst: low}",
    )
    order_by: str | None = Field(None, description="SQL, such as `flip_loss desc`; or: random")
    keep: Keep | None = None
    per: str | dict[str, dict[str, Annotated[float, Field(ge=0, le=1)] | Keep]] | None = Field(
        None, description="a column; or {column: {group: share, other: {rows: 100}, third: {tokens: 5000}}}"
    )
    duplicates: Literal["once", "as_found"] = Field(
        "once", description="once: a row that occurs several times counts once; as_found: as often as it occurs"
    )
    unknown: Literal["error", "keep", "drop"] = Field(
        "error", description="rows where a value that a rule uses is NULL: error, keep them, or drop them"
    )
    control: Literal["random", "length_matched", "random_of_all"] | None = Field(
        None,
        description="a second selection, <name>_control: as many rows, drawn from those that `where` leaves; random_of_all: from all but excluded",
    )
    seed: int | None = Field(None, description="of `order_by: random` and `control`; default: engine.seed")

    @property
    def is_random(self) -> bool:
        words = re.split(r"[\s,]+", (self.order_by or "").lower())
        return self.control is not None or "random" in words

    @property
    def budgets(self) -> str | dict[str, dict[str, float | dict[str, float]]] | None:
        """`per`, with each group's budget by its name."""
        if not isinstance(self.per, dict):
            return self.per
        return {
            column: {group: b.given if isinstance(b, Keep) else b for group, b in named.items()}
            for column, named in self.per.items()
        }

    def settings(self) -> dict[str, Any]:
        """What tells this selection from another of the same rows and scores. A key that is newer than a store is not in it where it is unset."""
        new = ("exclude", "control", "seed")
        given = {key: value for key, value in self.model_dump().items() if key not in new or value is not None}
        asks = any("select" in (text or "").lower() for text in (self.where, self.order_by))
        return {**given, "sees": "the recipe's rows"} if asks else given

    @model_validator(mode="after")
    def seed_of_something(self) -> Select:
        if self.seed is not None and not self.is_random:
            raise ValueError("select.seed is of `order_by: random` and `control`; nothing here is random")
        return self

    @field_validator("per", mode="after")
    @classmethod
    def one_group(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) != 1:
            raise ValueError(f"per takes one column; found {', '.join(value)}")
        return value

    @field_validator("per", mode="before")
    @classmethod
    def text_keys(cls, value: Any) -> Any:
        """YAML reads `1: 0.5` with a number for a key, `true:` with a truth value; a group's name is text, as SQL writes it."""
        if isinstance(value, dict):
            return {
                k: {_group_name(g): s for g, s in v.items()} if isinstance(v, dict) else v for k, v in value.items()
            }
        return value


def _group_name(group: Any) -> str:
    if group is None:
        return "NULL"  # rows without a group
    return str(group).lower() if isinstance(group, bool) else str(group)


class Export(Strict):
    """Where the kept rows go, as a dataset to train on."""

    to: PathText = Field(description="the dataset's folder")
    format: Literal["trl", "prompt_completion", "messages", "extend", "prompts"] = Field(
        "trl",
        description="extend: both responses of every pair as prompt/completion rows, for SFT before DPO; prompts: prompts and answers alone, for RL",
    )
    layout: Literal["trl", "llama_factory", "axolotl", "openrlhf", "verl"] = Field(
        "trl", description="the trainer whose files are written (docs/export.md)"
    )
    order: Literal["source", "order_by"] = Field(
        "source",
        description="order_by: in the order of select.order_by, which trainers are told to keep; source: as rows were read, for trainers to shuffle",
    )
    reference_logps: bool = Field(
        False,
        description="pairs: the reference model's log-probabilities as columns, for TRL's DPOTrainer and fairseq2 to take instead of a pass",
    )
    rows_per_file: int | None = Field(
        None, ge=1, description="at most so many rows in a file of data/; null: all in one"
    )
    columns: Literal["scores", "none"] | list[str] = Field(
        "none", description="extra columns: every score, none, or a list"
    )
    weight: str | None = Field(None, description="a column of `scored` that becomes the column `weight`")
    resample: int | None = Field(
        None, ge=1, description="so many rows, drawn in proportion to their weight, for trainers that take no weights"
    )
    push_to_hub: str | None = Field(None, description="also to this hub dataset")
    control: bool | Literal["random"] = Field(
        False,
        description="true: also the control of `select.control`, to <to>_control; random: as many, drawn at random from all rows",
    )

    @model_validator(mode="after")
    def resampling_needs_weights(self) -> Export:
        if self.resample and not self.weight:
            raise ValueError(
                "export.resample draws rows in proportion to their weight: say which column that is with export.weight"
            )
        return self
