"""What a pass is told to read off: the declaration of a measurement, as data. `curate.measurements` registers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reads = Literal["tokens", "forward", "sample", "backward", "direction", "neighbours"]


Kind = Literal["preference", "sft", "any"]


@dataclass(frozen=True)
class Direction:
    """A direction in weight space. of: "step" (the training set's own), "chosen" (its mean chosen gradient), "head" (the LM head's part of the
    step), or "target.NAME" (the mean gradient of a target that the recipe names). step: the diagonal P, of sgd, sign or adam. cosine: whether cosines
    with it are taken, by gradients, and not derivatives along it.
    """

    of: str
    step: Literal["sgd", "sign", "adam"]
    cosine: bool = False


@dataclass(frozen=True)
class Measurement:
    """A registered measurement."""

    name: str
    reads: Reads
    kind: Kind
    columns: Mapping[str, str]
    version: int
    function: Callable[..., Any]
    head: tuple[str, ...] = ()
    without_prompt: bool = False
    prompt_only: bool = False
    perturbed: bool = False
    direction: Direction | None = None
