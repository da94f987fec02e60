"""What a reader of an export should know of its columns: names that they have here instead, bytes that are not here, and what no trainer reads."""

from __future__ import annotations

from collections.abc import Mapping

from curate.data.exported import SIDE, TAKEN
from curate.data.parts import Part
from curate.data.trainers import TRAINERS


def read_beside(trainer: str, layout: str, *, reference: bool, weights: bool) -> tuple[list[str], list[str]]:
    """The mixins with which TRL's trainers read what stands beside these rows; and a sentence for each of it that no trainer reads.

    trainer: export.layout. layout: of the rows. reference, weights: whether the rows have them.
    """
    mixins, unread = [], []
    if trainer == "trl":
        title = "TRL's trainer of these rows"
        weighed = layout.startswith(("trl preference", "prompt/completion", "messages"))
    else:
        title, weighed = TRAINERS[trainer].title, False
    if reference and trainer == "trl":
        mixins.append("GivenReference")
    elif reference:
        unread.append(
            f"{title} does not read the reference's log-probabilities from these files: it needs its reference model all the same."
        )
    if weights and weighed:
        mixins.append("WeightedRows")
    elif weights:
        unread.append(
            f"{title} takes no weights: the column `weight` changes nothing in its training. `--set export.resample=N` draws N rows in proportion "
            "to it instead."
        )
    return mixins, unread


def column_notes(kept: Part, other: Mapping[str, str]) -> list[str]:
    """What became of the user's columns: the names that they have here instead (`other`), and those that are kept as text."""
    as_text = kept.texts_of_several()
    return [
        *(_renamed(old, new) for old, new in sorted(other.items())),
        *(f"Column `{name}` holds values of several types and is kept as text." for name in as_text),
    ]


def bytes_warnings(kept: Part) -> list[str]:
    """A sentence for each column whose bytes are not here."""
    return [
        f"Column `{name}` held bytes (images, audio), which the store does not keep: here it says only how many they were. Join them again by "
        "a column of yours before you train."
        for name in sorted(kept.without_bytes())
    ]


def _renamed(old: str, new: str) -> str:
    """Why a column of the user's has another name in the export."""
    why = {
        "row_id": "`row_id` is the row's id in the store",
        "weight": "`weight` is what the row counts in training",
        "reason": "`reason` says in dropped/ why a row was dropped",
        SIDE: f"`{SIDE}` says which response the row has",
    }.get(old, f"a trainer would take `{old}` for its own" if old in TAKEN else f"`{old}` is what curate has measured")
    return f"Column `{old}` is called `{new}` here: {why}."
