"""The card of an export: README.md with a YAML head, merged with the card that is already there.

What a person wrote stays byte for byte: their keys of the head (`card_head`: ours are added, tags are united), and their text outside our
section, which stands between two HTML comments. The head's `configs` makes `load_dataset` take data/ alone (Hugging Face's dataset card
specification).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.data.card_head import HEAD, NotYaml, merged_head, split_head

BEGIN, END = "<!-- curate: begin (rewritten by every export) -->", "<!-- curate: end -->"
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


@dataclass(frozen=True)
class Card:
    """What a card says beside what the export knows itself (format, style, rows, columns).

    sources: name -> revision or fingerprint. models: role -> path and fingerprint. recipe: its YAML text. counts: what became of
    how many rows (in the order given). scores: name -> distribution as `distribution` gives it. head: more keys for the YAML head.
    """

    title: str = "Curated dataset"
    sources: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float | int | None]] = field(default_factory=dict)
    license: str | None = None
    notes: Sequence[str] = ()
    head: Mapping[str, Any] = field(default_factory=dict)


def distribution(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """rows, unknown, and min, 5%, 25%, median, 75%, 95%, max (linear between neighbours) of the known values; None where none is.

    values: an array (NaN where unknown) is taken as it is.
    """
    import numpy as np

    if not isinstance(values, np.ndarray):
        values = np.array([math.nan if value is None else float(value) for value in values])
    known = np.sort(values[~np.isnan(values)])
    shares = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
    counts: dict[str, float | int | None] = {"rows": len(values), "unknown": len(values) - len(known)}
    return counts | {name: quantile(known, share) for name, share in shares.items()}


def quantile(ordered: Any, share: float) -> float | None:
    if not len(ordered):
        return None
    place = share * (len(ordered) - 1)
    low, high = float(ordered[math.floor(place)]), float(ordered[math.ceil(place)])
    return low if low == high else low + (high - low) * (place - math.floor(place))


def write_card(
    path: Path,
    card: Card,
    *,
    existing: str | None,
    split: str,
    n_rows: int,
    n_dropped: int,
    kind: str,
    layout: str,
    notes: Sequence[str],
    trainer: str = "trl",
    end: str = "parquet",
) -> None:
    """Writes README.md. `existing` is the text of the card that was there, `layout` e.g. "trl preference, standard". trainer: its
    tag. end: of the data's files.
    """
    text = card_text(
        card,
        existing=existing,
        split=split,
        n_rows=n_rows,
        n_dropped=n_dropped,
        kind=kind,
        layout=layout,
        notes=notes,
        trainer=trainer,
        end=end,
    )
    path.write_bytes(text.encode("utf-8"))


def card_text(
    card: Card,
    *,
    existing: str | None,
    split: str,
    n_rows: int,
    n_dropped: int,
    kind: str,
    layout: str,
    notes: Sequence[str] = (),
    trainer: str = "trl",
    end: str = "parquet",
) -> str:
    """The merged card: what a person wrote stays byte for byte, beside our keys of the head and our section of the text.

    Of a head that is not YAML the text is kept below a new head, and the section says so.
    """
    existing = existing or ""
    head, body = split_head(existing)
    opening, closing = ("---\n", "---\n\n")
    if opened := HEAD.match(existing):
        opening, closing = opened[1], opened[3] if opened[3].endswith("\n") else opened[3] + "\n"
    tags = ["curate", trainer, *(["preference", "dpo"] if kind == "preference" else ["sft"])]
    size = next((name for limit, name in SIZES if n_rows < limit), "n>10M")
    more = dict(card.head) | ({"license": card.license} if card.license else {})
    try:
        merged = merged_head(head, tags=tags, size=size, split=split, more=more, end=end)
    except NotYaml as error:
        notes = [
            *notes,
            f"The head that README.md had is no YAML ({error}): it stands below, as text; mend it there and move it up.",
        ]
        merged, opening, closing, body = (
            merged_head("", tags=tags, size=size, split=split, more=more, end=end),
            "---\n",
            "---\n\n",
            existing,
        )
    section = section_text(card, split=split, n_rows=n_rows, n_dropped=n_dropped, layout=layout, notes=notes)
    before, begin, rest = body.partition(BEGIN)
    if begin:
        _, end, after = rest.partition(END)
        body = (
            before + section + (after if end else "\n\n" + rest.lstrip())
        )  # without its end: nothing of the text is lost
    elif body.strip():
        body = f"{body.rstrip()}\n\n{section}\n"
    else:
        body = f"\n# {card.title}\n\n{section}\n" if existing else f"# {card.title}\n\n{section}\n"
    text = opening + merged + closing + body
    return re.sub(r"(?<!\r)\n", "\r\n", text) if "\r\n" in existing else text


def section_text(card: Card, *, split: str, n_rows: int, n_dropped: int, layout: str, notes: Sequence[str]) -> str:
    """Our section, in Markdown."""
    parts = [
        BEGIN,
        f"{n_rows:,} rows ({layout}) in split `{split}`, selected with curate; {n_dropped:,} dropped rows, each with its reason, are in "
        "`dropped/`.",
    ]
    if card.sources:
        parts.append(table(("source", "revision or fingerprint"), card.sources.items()))
    if card.models:
        parts.append(table(("model", "weights"), card.models.items()))
    if card.counts:
        parts.append(table(("rows", "count"), ((name, f"{count:,}") for name, count in card.counts.items())))
    if card.scores:
        columns = list(dict.fromkeys(name for values in card.scores.values() for name in values))
        rows = ((name, *(shown(values.get(column)) for column in columns)) for name, values in card.scores.items())
        parts.append("### Scores\n\n" + table(("score", *columns), rows))
    parts += [f"- {note}" for note in (*card.notes, *notes)]
    if card.recipe:
        fence = "````" if "```" in card.recipe else "```"
        parts.append(f"### Recipe\n\n{fence}yaml\n{card.recipe.strip()}\n{fence}")
    return "\n\n".join([*parts, END])


def shown(value: float | int | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
