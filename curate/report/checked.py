"""What `curate check` found, as text."""

from __future__ import annotations

from curate.console import counted, wrapped
from curate.store.checking import Checked

LISTED = 20  # problems that the text shows


def checked_text(found: Checked) -> str:
    """What was read, what is not what was written, and the next command."""
    lines = [
        f"{found.folder}: {found.shards:,} shards{_of_shards(found)}, the database ({found.database})"
        f"{f', {found.derived:,} derived files' if found.derived else ''}."
    ]
    for problem in found.problems[:LISTED]:
        lines.append(f"{problem.file}: {problem.why}.{f' Now {problem.done}.' if problem.done else ''}")
    if len(found.problems) > LISTED:
        lines.append(f"… and {len(found.problems) - LISTED:,} more (--json lists all)")
    lines += found.notes
    if found.without_checksum:
        lines.append(
            f"{found.without_checksum:,} shards have no checksum, since an earlier curate wrote them: they can be read, but other numbers in them "
            "would show only beside the database. `curate check --repair` gives a checksum to those that agree with it."
        )
    if not found.problems:
        lines.append("Nothing is damaged.")
    elif found.unmended:
        lines.append(
            f"`curate check {found.folder} --repair` sets aside what is damaged and makes it again from what is whole."
        )
    else:
        lines.append("Run the recipe again: it measures what is missing now.")
    return wrapped(counted("\n".join(lines)))


def _of_shards(found: Checked) -> str:
    parts = [f"{found.pending:,} not taken in yet"] * bool(found.pending)
    return f" ({', '.join(parts)})" if parts else ""
