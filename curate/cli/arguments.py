"""Arguments and options that several commands share, and what they open: a recipe, a store, a progress line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from curate.errors import UsageError

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store import Store

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML)")]
StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="a store's folder")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="put a value over the recipe's, e.g. select.keep.share=0.5"),
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="the store's folder, over the recipe's")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes: only the result and warnings")]
Kind = Literal["preference", "sft"]
OfRecipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", help="as this recipe measured it (default: the one scored last)"),
]
OfSource = Annotated[str | None, typer.Option("--source", metavar="NAME", help="only rows of this source")]


def load(path: Path, overrides: list[str] | None, store: Path | None) -> Loaded:
    from curate.recipe.load import load_recipe

    return load_recipe(path, set=overrides, store=store)


def open_store(path: Path) -> Store:
    from curate.store import Store

    return Store(path)


def progress_of(quiet: bool) -> Any:
    from curate.console import Progress

    return Progress(quiet=quiet)


def split_pairs(given: list[str], option: str) -> dict[str, str]:
    """OURS=THEIRS pairs, several in one text where each has its sign (so a column's name may have spaces). UsageError for a name twice."""
    pairs: dict[str, str] = {}
    for text in given:
        pieces = text.split()
        for entry in pieces if all("=" in piece for piece in pieces) else [text]:
            ours, theirs = split_pair(entry, option)
            if ours in pairs:
                raise UsageError(f"{option}: {ours}= is given twice, {pairs[ours]} and {theirs}. Give it once.")
            pairs[ours] = theirs
    return pairs


def split_pair(entry: str, option: str) -> tuple[str, str]:
    """OURS=THEIRS as its two names. UsageError where one of them or the sign is missing."""
    ours, sign, theirs = entry.partition("=")
    if not sign or not ours or not theirs:
        raise UsageError(f"{option} {entry}: expected ours=theirs, such as {option} prompt=question.")
    return ours, theirs
