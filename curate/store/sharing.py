"""Several recipes in one store: kept apart by their names, and their sources by the folders that they are typed in.

The store keeps each recipe with a first line that says where it is from, relative to the store, so that both can be moved or copied together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from curate.errors import UsageError

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store.store import Store

PLACE = "# recipe: "


def placed(loaded: Loaded, store: Store) -> str:
    """The recipe as the store keeps it: where it is from, then its text."""
    if loaded.path is None:
        return loaded.text
    return f"{PLACE}{Path(os.path.relpath(loaded.path.resolve(), store.folder.resolve())).as_posix()}\n{loaded.text}"


def check_name(loaded: Loaded, store: Store) -> None:
    """Two recipes of one name would take each other's scores and selections. UsageError naming the other one."""
    if loaded.path is None:
        return
    other = next((recipe_file(store, r["text"]) for r in store.recipes() if r["name"] == loaded.name), None)
    if other is not None and other.is_file() and not other.samefile(loaded.path):
        raise UsageError(
            f"{store.folder} holds the scores of another recipe called {loaded.name!r} ({other.resolve()}). "
            "Rename one of the two files, or give this one a store of its own with --store."
        )


def check_sources(loaded: Loaded, store: Store, names: Iterable[str]) -> None:
    """A source's name is its path as typed: recipes of different folders would take each other's rows. UsageError naming the other one.

    names: the sources' that are about to be read in; hub ids and full paths mean the same from everywhere.
    """
    mine = {name for name in names if not os.path.isabs(os.path.expanduser(name)) and loaded.resolve(name).exists()}
    for other in store.recipes() if mine else ():
        place = recipe_file(store, other["text"])
        shared = sorted(mine.intersection(other["sources"]))
        if other["name"] == loaded.name or place is None or not shared:
            continue
        folder = place.parent.resolve()
        if folder != loaded.folder.resolve():
            raise UsageError(
                f"{store.folder} holds rows under the name {shared[0]!r} from another folder (recipe {other['name']!r}, {folder}). "
                f"Write this recipe's path in full (source.path: {loaded.resolve(shared[0])}), or give it a store of its own with --store."
            )


def recipe_file(store: Store, text: str) -> Path | None:
    """The file that a kept recipe is from, None where nobody said."""
    first = text.partition("\n")[0]
    return store.folder / first.removeprefix(PLACE) if first.startswith(PLACE) else None
