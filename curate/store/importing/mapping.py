"""What --map, --on and --worst may say: the words with a meaning, the pairs that need each other, the columns that they give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from curate.errors import UsageError, did_you_mean, listed, nearest
from curate.store.importing.table import read_table

PLACES = ("run", "checkpoint", "step")


ROWS = ("row", "index", "row_id")


VALUES = ("correct", "samples", "perplexity", "nll", "logp", "trained")


MEANING = {  # ours -> the columns that it gives, where they are called otherwise
    "samples": ("n_samples",),
    "correct": ("n_correct", "accuracy"),
    "perplexity": ("target_nll",),
    "nll": ("target_nll",),
    "logp": ("target_logp",),
}


def check_names(mapping: Mapping[str, str], on: str | None = None) -> None:
    """UsageError for a name that is nearly one of the words with a meaning, a word without its partner, or two that give one column."""
    words = (*ROWS, *PLACES, *VALUES)
    taken: dict[str, str] = {}
    for ours in mapping:
        near = nearest(ours, words, cutoff=0.8)
        if near and ours not in words:
            raise UsageError(
                f"--map: {ours}= is not a word with a meaning here; did you mean {near}=? (Else choose a less similar column name.)"
            )
        if ours.lower() == "fingerprint" or not re.fullmatch(r"\w+", ours):
            raise UsageError(f"--map: {ours!r} cannot name a column; use letters, digits and underscores.")
        for name in MEANING.get(ours, (ours,)):
            if name.lower() in taken:
                raise UsageError(
                    f"--map: {taken[name.lower()]}= and {ours}= both give the column {name}. Leave one of them out."
                )
            taken[name.lower()] = ours
    if ("correct" in mapping) != ("samples" in mapping):
        raise UsageError(
            "--map: correct= and samples= go together: accuracy is correct / samples. For a finished accuracy map accuracy=."
        )
    named = [*(k for k in ROWS if k in mapping), *(["on"] if on else [])]
    if len(named) > 1:
        raise UsageError(f"--map: the row is named twice, by {named[0]} and {named[1]}. Give one of them.")


def check_worst(worst: Mapping[str, str], columns: Mapping[str, np.ndarray]) -> dict[str, Literal["high", "low"]]:
    """`--worst` as column -> end. UsageError for a column that is not imported or is text, or an end that is neither low nor high."""
    for name, end in worst.items():
        if name not in columns:
            hint = did_you_mean(name, columns, f"there are {listed(columns)}.", show=str)
            raise UsageError(f"--worst {name}={end}: the import has no column {name!r}; {hint}")
        if end not in ("high", "low"):
            raise UsageError(f"--worst {name}={end}: expected {name}=low (low values are bad) or {name}=high.")
        if columns[name].dtype.kind == "O":
            raise UsageError(f"--worst {name}={end}: {name} is text, which has no low and no high end.")
    return dict(worst)  # type: ignore[arg-type]


def sides(path: Path, on: str, mapping: Mapping[str, str]) -> tuple[str, str]:
    """`--on` as (the rows' column, the file's)."""
    ours, sign, theirs = on.partition("=")
    if not ours or (sign and not theirs):
        raise UsageError(f"--on {on}: expected a column that both have, such as --on prompt_id, or --on OURS=THEIRS.")
    if not sign:
        return on, on
    names = read_table(path, {}).names
    return (theirs, ours) if theirs not in names and ours in names else (ours, theirs)
