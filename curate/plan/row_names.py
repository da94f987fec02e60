"""How messages name a row of the store: its file, its number from 1, its line where rows are lines, and its id."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from curate.errors import CurateError
from curate.rows import Row

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store import Store


def named_rows(store: Store, loaded: Loaded) -> Callable[[Row], str]:
    """What names a row of a recipe by where it was read first; by its id alone where the store has no such row (a perturbed one)."""
    return lambda row: row_name(store, row.row_id, loaded)


def row_name(store: Store, row_id: str, loaded: Loaded) -> str:
    """`rows.jsonl, row 3, line 4 (row 1f…)`."""
    from curate.data.records import row_in_file

    occurrences = store.sql(
        "SELECT split_part(source, chr(30), -1) AS source, index FROM data.occurrences WHERE row_id = ? AND index >= 0 ORDER BY seq LIMIT 1",
        [row_id],
    )
    if not len(occurrences):
        return f"row {row_id}"
    source, index = occurrences["source"][0], int(occurrences["index"][0])
    return f"{source}, {row_in_file(index, _line(loaded.resolve(source), index))} (row {row_id})"


def _line(path: Path | str, index: int) -> int | None:
    """The line of a file's row; None where rows are no lines, or the file is not here any more."""
    from curate.data.files import file_type, rows_of_file

    file = Path(path)
    if file_type(file) and file.is_file():
        with suppress(CurateError, OSError):
            for _, line, _ in islice(rows_of_file(file, file.name), index, index + 1):
                return line
    return None
