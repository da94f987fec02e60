"""What a plan is made of: a task is one measurement of one model, a step one pass over one model, a block some of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.passes.contract import Measurement
    from curate.scores import Need, Score
    from curate.store import Measured

ORDER = ("tokens", "sample", "forward", "neighbours", "backward", "direction")
FORWARD = ("forward", "neighbours", "backward", "direction")  # passes over whole rows; samplers keep to the context
# Rows of a shard, fixed for ever: a row's shard is its position in the store // SHARD_ROWS, whatever is missing of it.
SHARD_ROWS = {"tokens": 8192, "forward": 512, "backward": 128, "sample": 256, "direction": 512, "neighbours": 512}
Block = tuple[int, list[str], "tuple[Task, ...]"]  # shard's number, row ids by position, the tasks that these rows miss


@dataclass(frozen=True)
class Task:
    """One measurement of one checkpoint, with the record that identifies its values."""

    measurement: Measurement
    measured: Measured

    @property
    def fingerprint(self) -> str:
        return self.measured.fingerprint


@dataclass(frozen=True)
class Step:
    """One pass over one checkpoint: everything that is read off it, and the rows that still miss something.

    tokens, seconds: an estimate for what is missing; seconds is None where nothing is known, `rough` where no run here has been timed.
    ahead: what comes before the rows, in rows run forward: gradients of directions, a warm-up. unmeasurable: missing rows that are known to get
    NULL, being too long for instance; perhaps_unmeasurable: those that seem so by their characters. kept: sampled answers that are taken again;
    graded: missing rows that need no others; draws: answers to draw, at most.
    """

    reads: str
    checkpoint: Checkpoint
    tasks: tuple[Task, ...]
    rows: int
    blocks: tuple[Block, ...]
    key: str
    tokens: int = 0
    seconds: float | None = None
    rough: bool = False
    ahead: int = 0
    unmeasurable: int = 0
    perhaps_unmeasurable: int = 0
    kept: int = 0
    graded: int = 0
    draws: int = 0

    at_most: bool = False

    @property
    def is_served(self) -> bool:
        """Whether a server does it."""
        return self.tasks[0].measured.engine.startswith("openai ")

    @property
    def missing(self) -> int:
        """Rows without a line, those among them that will get one of NULLs."""
        return sum(len(rows) for _, rows, _ in self.blocks)

    @property
    def to_measure(self) -> int:
        return self.missing - self.unmeasurable - self.graded


@dataclass(frozen=True)
class RequestedScore:
    """A score that the recipe asks for, under the name its column gets, with its checked parameters."""

    name: str
    score: Score
    params: dict[str, Any]

    def need(self, text: str) -> Need:
        """One of the score's needs, its parameters filled in."""
        return self.score.need(text, self.params)
