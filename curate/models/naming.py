"""Names of checkpoints: the training step that one tells, and the order of those that tell none."""

from __future__ import annotations

import re

Key = tuple[tuple[int, float, str], ...]


def natural(name: str) -> Key:
    """A sort key that counts as people do: checkpoint-9 before checkpoint-10, and a name that is a number by its size."""
    if re.fullmatch(r"-?\d+(\.\d+)?", name):
        return ((0, float(name), ""),)
    return tuple((1, float(p), "") if p.isdecimal() else (2, 0.0, p) for p in re.findall(r"\d+|\D+", name))


def step_in_name(name: str) -> int | None:
    """The step in a checkpoint's name (checkpoint-400, step1000, stage1-step1000-tokens4B, 400), None where it tells none."""
    match = re.search(r"(?:^|[-_/])(?:checkpoint|(?:global[-_]?)?step)[-_]?(\d{1,18})(?=$|[-_/])", name)
    match = match or re.fullmatch(r"(\d{1,9})", name)
    return int(match[1]) if match else None
