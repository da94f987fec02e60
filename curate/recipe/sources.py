"""The recipe's sections that describe rows: `source`, and `heldout` and `targets`, which are read as the source is where they do not say otherwise.

columns, format, on_bad_row   as the source says; a target of the other kind of rows takes only the columns that both kinds have
split                         as the source says, of a path that has splits (a folder, a hub dataset)
revision                      as the source says, of the same hub dataset
limit                         never: how many rows, not how they are read
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from curate.recipe.doors import PathText, file_name

DATA_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")
OF_PAIRS = frozenset(("chosen", "rejected"))
OF_EXAMPLES = frozenset(("completion", "answer", "final_answer", "label", "output", "response"))


class Source(BaseModel):
    """Where rows come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: PathText | list[PathText] = Field(
        description="a file, a folder written by save_to_disk, a glob, a hub id, or a list of them"
    )
    split: str = Field("train", description="of a hub dataset or a folder; a file has none")
    revision: str | None = Field(None, description="a hub dataset's revision")
    format: str = Field("auto", description="auto, or a format that `curate validate` names")
    columns: dict[str, str] = Field({}, description="ours: theirs")
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="error: bad rows are named and nothing runs; drop: they are left out, and counted"
    )
    limit: int | None = Field(None, ge=1, description="only the first so many rows, for trying out")
    _inherited: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="before")
    @classmethod
    def path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | list) else value

    @field_validator("split")
    @classmethod
    def split_names_a_file(cls, value: str) -> str:
        return file_name(value)

    @property
    def inherited(self) -> frozenset[str]:
        """The keys that this section took from `source`."""
        return self._inherited

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class Target(Source):
    """Rows that a score's influence is taken on: what must survive, or what must get better."""

    of: Literal["chosen", "rejected", "margin", "completion"] = Field(
        description="whose log-probability: of a pair's chosen or rejected response, of chosen minus rejected, or an SFT row's completion"
    )
    per: str | None = Field(
        None,
        description="a column of theirs, such as task: a gradient for each of its values, and the best of them counts",
    )

    @property
    def kind(self) -> Literal["preference", "sft"]:
        return "sft" if self.of == "completion" else "preference"


Rows = TypeVar("Rows", bound=Source)


def inherit(rows: Rows, source: Source | None, *, same_kind: bool = True) -> Rows:
    """These rows, with what their section does not say as `source` says it."""
    if source is None:
        return rows
    given = rows.model_fields_set
    taken: dict[str, Any] = {"on_bad_row": source.on_bad_row}
    taken["columns"] = source.columns if same_kind else _of_both_kinds(source.columns)
    if same_kind:
        taken["format"] = source.format
    if not any(path.lower().endswith(DATA_FILES) for path in rows.paths):
        taken["split"] = source.split
    if {_repository(path) for path in rows.paths} <= {_repository(path) for path in source.paths}:
        taken["revision"] = source.revision
    taken = {key: value for key, value in taken.items() if key not in given and value != getattr(rows, key)}
    copy = rows.model_copy(update=taken)
    copy._inherited = frozenset(taken)
    return copy


def differences(rows: Source, source: Source | None) -> list[str]:
    """What these rows' section says otherwise than `source`: `columns {prompt: q} (source: {prompt: question})`."""
    if source is None:
        return []
    keys = ["columns", "format", "on_bad_row"]
    if not any(path.lower().endswith(DATA_FILES) for path in (*rows.paths, *source.paths)):
        keys += ["split", "revision"]
    return [
        f"{key} {_shown(getattr(rows, key))} (source: {_shown(getattr(source, key))})"
        for key in keys
        if getattr(rows, key) != getattr(source, key)
    ]


def _of_both_kinds(columns: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours not in OF_PAIRS | OF_EXAMPLES}


def _repository(path: str) -> str:
    return "/".join(path.partition(":")[0].split("/")[:2]) if not path.startswith((".", "/", "~")) else path


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    return str(value)
