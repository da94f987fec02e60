"""Validating a source: every bad row, duplicates, and what is worth knowing about the good ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from curate.data.reading import Kind, Paths, Reading, read
from curate.data.records import Defect, SourceInfo
from curate.rows import Example, Pair, Row, Text


@dataclass(frozen=True)
class Validation:
    """What a source holds. `duplicates` counts rows that repeat an earlier row of the same content; they are counted once when measured."""

    n_rows: int
    n_bad: int
    defects: tuple[Defect, ...]
    duplicates: int
    kind: Kind
    format: str
    sources: tuple[SourceInfo, ...]
    notes: tuple[str, ...]

    @property
    def n_distinct(self) -> int:
        """Good rows of different content."""
        return self.n_rows - self.n_bad - self.duplicates


def validate(
    path: Paths,
    *,
    kind: Kind | None = None,
    split: str = "train",
    revision: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> Validation:
    """Reads a whole source and lists every defect. Arguments and errors as in `read`: what is wrong with a file as a whole is raised.

    Memory: about 150 bytes a row (content ids and prompts, for duplicates), and the defects.
    """
    return validate_reading(
        read(path, kind=kind, split=split, revision=revision, format=format, columns=columns, base=base)
    )


def validate_reading(reading: Reading) -> Validation:
    """`validate` of a reading that is open already."""
    ids: set[bytes] = set()
    prompts: Counter[int] = Counter()
    seen: Counter[str] = Counter()
    defects: list[Defect] = []
    n_rows = n_bad = duplicates = 0
    for record in reading:
        n_rows += 1
        if record.row is None:
            n_bad += 1
            defects.extend(record.defects)
            continue
        row_id = bytes.fromhex(record.row.row_id)
        if row_id in ids:
            duplicates += 1
            continue
        ids.add(row_id)
        prompts[prompt_key(record.row.prompt)] += 1
        seen.update(traits(record.row))
    return Validation(
        n_rows=n_rows,
        n_bad=n_bad,
        defects=tuple(defects),
        duplicates=duplicates,
        kind=reading.kind,
        format=reading.format,
        sources=tuple(reading.sources),
        notes=tuple(notes(seen, prompts, len(ids), reading.prompt_column)),
    )


def prompt_key(prompt: Text) -> int:
    """64 bits: enough to count prompts with, within one process."""
    return hash(prompt if isinstance(prompt, str) else tuple((turn["role"], turn["content"]) for turn in prompt))


def traits(row: Row) -> list[str]:
    """What the notes count."""
    found: list[str] = [row.style]
    replies = [reply for reply in ((row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)) if reply]
    headers = ("\n\nHuman:", "\n\nAssistant:")
    if any(
        any(header in reply for header in headers) if isinstance(reply, str) else len(reply) > 1 for reply in replies
    ):
        found.append("several turns")
    texts = [reply for reply in replies if isinstance(reply, str)]
    if isinstance(row.prompt, str) and not row.prompt[-1].isspace() and any(not text[0].isspace() for text in texts):
        found.append("glued")
    if isinstance(row, Example) and row.label is not None:
        found.append("desirable" if row.label else "undesirable")
    elif isinstance(row, Example) and row.answer is None:
        found.append("no answer")
    return found


def notes(seen: Counter[str], prompts: Counter[int], n_distinct: int, prompt_column: str) -> list[str]:
    """What is worth knowing, a sentence each."""
    found = []
    if unpaired := seen["desirable"] + seen["undesirable"]:
        found.append(
            f"{unpaired} rows are unpaired preferences (KTO): {seen['desirable']} desirable, {seen['undesirable']} undesirable. "
            "Target likelihoods (target_logp, target_nll) can be measured on them; scores of pairs cannot."
        )
    repeated = [count for count in prompts.values() if count > 1]
    if repeated:
        found.append(
            f"{len(repeated)} prompts occur in more than one row: {sum(repeated)} of {n_distinct} distinct rows, the commonest in "
            f"{max(repeated)} of them."
        )
    if seen["several turns"]:
        found.append(f"{seen['several turns']} rows have a reply of several turns; all of it counts as the reply.")
    if seen["glued"]:
        found.append(
            f"In {seen['glued']} rows prompt and reply follow each other without white space, as they are. If that is not meant, end the "
            f'prompt with a template: `columns: {{prompt: "{{{prompt_column}}}\\n"}}`.'
        )
    if seen["standard"] and seen["conversational"]:
        found.append(
            f"{seen['standard']} rows are text, {seen['conversational']} are messages; an export takes one style."
        )
    if 0 < seen["no answer"] < n_distinct - unpaired:
        found.append(f"{seen['no answer']} rows have no answer to grade against.")
    return found
