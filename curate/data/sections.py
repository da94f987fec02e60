"""The rows of a recipe's sections (source, heldout, targets.NAME, a pool), opened, and what is read otherwise than the source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from curate.errors import CurateError
from curate.recipe.sources import Source, differences

if TYPE_CHECKING:
    from curate.data import Reading
    from curate.data.sources import Digest
    from curate.recipe.load import Loaded


def open_rows(
    loaded: Loaded,
    source: Source,
    setting: str,
    *,
    kind: Literal["preference", "sft"] | None = None,
    base: Path | None = None,
    digest_of: Digest | None = None,
) -> Reading:
    """A section's rows, opened. setting: its name, for messages; an error in a key that was taken from `source` says so. base: the folder that
    paths start from, if it is not the recipe's. digest_of: as `read` takes it.
    """
    from curate.data import read

    section = "source" if setting == "pool" else setting  # a pool has no section of its own
    try:
        return read(
            source.path,
            kind=kind or loaded.recipe.kind,
            split=source.split,
            revision=source.revision,
            format=source.format,
            columns=source.columns,
            base=base or loaded.folder,
            setting=section,
            digest_of=digest_of,
        )
    except CurateError as error:
        key = next((key for key in sorted(source.inherited) if f"{section}.{key}" in str(error)), None)
        if setting == "pool":
            raise type(error)(
                f"pool: {error}\n  A pool is read as `source` is: give it the source's columns and format."
            ) from None
        if key is None:
            raise
        own = "{}" if key == "columns" else type(source).model_fields[key].default
        raise type(error)(
            f"{error}\n  {setting}.{key} is taken from `source`, since {setting} does not say it. If these rows are otherwise: "
            f"`--set {setting}.{key}={own}`."
        ) from None


def said_otherwise(loaded: Loaded, formats: dict[str, dict[str, str]]) -> list[str]:
    """Which rows are read otherwise than the source's, by what the recipe says and by what was found. formats: role -> source -> format."""
    recipe = loaded.recipe
    sections = {"heldout": recipe.heldout, **{f"targets.{name}": target for name, target in recipe.targets.items()}}
    lines = [
        f"{name}: read otherwise than the source: {'; '.join(said)}."
        for name, rows in sections.items()
        if rows is not None and (said := differences(rows, recipe.source))
    ]
    train, held = (sorted(set(formats.get(role, {}).values())) for role in ("train", "heldout"))
    if train and held and train != held:
        lines.append(
            f"heldout: its rows are {' and '.join(held)}, the source's are {' and '.join(train)}: their texts may be put together otherwise."
        )
    return lines


def in_both_roles(both: int, held: int) -> str:
    return f"{both:,} of {held:,} held-out rows are training rows too: what is said about held-out rows is partly about those."
