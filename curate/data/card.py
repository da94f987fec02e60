"""The card of an export: README.md with a YAML head, merged with the card that is already there.

What a person wrote stays: their keys of the head (ours are added, lists like tags are united), and their text outside our section, which
stands between two HTML comments. The head's `configs` makes `load_dataset` take data/ alone (Hugging Face's dataset card specification).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """rows, unknown, and min, 5%, 25%, median, 75%, 95%, max (linear between neighbours) of the known values; None where none is."""
    values = list(values)
    known = sorted(float(value) for value in values if value is not None and not math.isnan(value))
    shares = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
    return {"rows": len(values), "unknown": len(values) - len(known)} | {
        name: quantile(known, share) for name, share in shares.items()
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
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
) -> None:
    """Writes README.md. `existing` is the text of the card that was there, `layout` e.g. "trl preference, standard"."""
    text = card_text(
        card, existing=existing, split=split, n_rows=n_rows, n_dropped=n_dropped, kind=kind, layout=layout, notes=notes
    )
    path.write_text(text, encoding="utf-8")


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
) -> str:
    """The merged card. Of a head that is not YAML the text is kept and a new head is written."""
    from huggingface_hub import DatasetCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    head: dict[str, Any] = {}
    body = existing or ""
    if existing and REGEX_YAML_BLOCK.search(existing):  # without a head DatasetCard warns on stderr
        try:
            old = DatasetCard(existing, ignore_metadata_errors=True)
            head, body = old.data.to_dict(), old.text
        except Exception:  # a head that is not YAML: it stays, as text
            body = existing.removeprefix("---\n")
    head |= {key: value for key, value in card.head.items() if key not in head}
    if card.license and "license" not in head:
        head["license"] = card.license
    tags = ["curate", "trl", *(["preference", "dpo"] if kind == "preference" else ["sft"])]
    head["tags"] = [*head.get("tags", []), *(tag for tag in tags if tag not in head.get("tags", []))]
    head["size_categories"] = [next((name for limit, name in SIZES if n_rows < limit), "n>10M")]
    head["configs"] = [
        *(config for config in head.get("configs") or [] if config.get("config_name") != "default"),
        {"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*.parquet"}]},
    ]
    head.pop("dataset_info", None)  # sizes and features of what was there before
    section = section_text(card, split=split, n_rows=n_rows, n_dropped=n_dropped, layout=layout, notes=notes)
    before, begin, rest = body.partition(BEGIN)
    if begin:
        body = before + section + rest.partition(END)[2]
    else:
        body = f"{body.strip()}\n\n{section}\n" if body.strip() else f"# {card.title}\n\n{section}\n"
    import yaml

    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{body.lstrip()}"


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
