"""What goes into a store and comes out of it, as plain dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from curate.rows import Row

Role = Literal["train", "heldout"]
Place = tuple[str, str, int | None]  # a model's run, checkpoint and step
RECENT = 50  # entries of a speed that count: those before are of another version or machine, perhaps


class SourceRecord(Protocol):
    """What `Store.add_source` reads of a record; `curate.data.Record` is one. `row` is None iff the record has defects."""

    @property
    def index(self) -> int: ...
    @property
    def row(self) -> Row | None: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...


@runtime_checkable
class SourceBlock(Protocol):
    """Many records at once, of rows that are text in a user's columns of plain values; `curate.data.blocks.Block` is one."""

    @property
    def kind(self) -> str: ...
    @property
    def index(self) -> Sequence[int]: ...
    @property
    def texts(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def own(self) -> Mapping[str, Sequence[Any]]: ...


@dataclass(frozen=True)
class Ingested:
    """What `add_source` found: good records, rows the store did not know, records whose row occurred before in this source, bad records."""

    records: int
    new_rows: int
    duplicates: int
    bad: int


@dataclass(frozen=True)
class Speeds:
    """How fast things ran. entries: (key, tokens, seconds, when), the latest first, RECENT of a key or fewer."""

    entries: Sequence[tuple[str, int, float, Any]]

    def of(self, key: str, *, alike: str | None = None) -> float | None:
        """Tokens per second over the last RECENT entries of a key; where there are none, of the key `alike` and of those that go on from it with
        a /; None if there are none either.
        """
        own = [entry for entry in self.entries if entry[0] == key]
        others = [entry for entry in self.entries if alike is not None and f"{entry[0]}/".startswith(f"{alike}/")]
        for found in (own, others):
            tokens = sum(tokens for _, tokens, _, _ in found[:RECENT])
            seconds = sum(seconds for _, _, seconds, _ in found[:RECENT])
            if tokens and seconds:
                return tokens / seconds
        return None


@dataclass(frozen=True)
class Measured:
    """One measurement of one set of weights under one setting: everything that the values' fingerprint covers, and names for people.

    reads: "tokens" | "forward" | "sample" | "backward" | "import". run "" is a lone model. step is None where unknown.
    """

    fingerprint: str
    measurement: str
    reads: str
    model: str = ""
    model_fingerprint: str = ""
    run: str = ""
    checkpoint: str = ""
    step: int | None = None
    engine: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> Measured:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class DatasetValue:
    """A number about a whole dataset, with its 95% interval where there is one; n: how many rows it is over."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    run: str = ""
    checkpoint: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Trajectories:
    """Scores that have a value at every checkpoint of a run. places: (checkpoint, step) of each, as measured. values: name -> (rows, K)."""

    run: str
    places: list[tuple[str, int | None]]
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class SelectedRow:
    """A row with what was decided about it. row is None for a row known only by somebody else's id."""

    row_id: str
    row: Row | None
    source: str | None
    index: int | None
    columns: dict[str, Any]  # the user's own, then the ones asked for
    rank: int | None
    reason: str
