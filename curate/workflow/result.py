"""What a run did, as Python and as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.console import counted
from curate.errors import UsageError
from curate.plan.plan import Plan
from curate.store import DatasetValue, Store

if TYPE_CHECKING:
    from datasets import Dataset

    from curate.data import ExportResult
    from curate.store import Selection


@dataclass(repr=False)
class Result:
    """What a run did. selection is None where the recipe selects nothing; values are the dataset-level ones, with intervals.

    notes_shown: whether the lines of progress told the plan's notes already, so that the text does not repeat them.
    """

    store: Store
    recipe: str
    plan: Plan | None = None
    measured: dict[str, int] = field(default_factory=dict)
    scores: list[str] = field(default_factory=list)
    values: list[DatasetValue] = field(default_factory=list)
    selection: Selection | None = None
    exported: ExportResult | None = None
    report: Path | None = None  # until there is a report
    notes_shown: bool = False

    @property
    def dataset(self) -> Dataset:
        """The kept rows: the exported dataset, with its extra columns, if there is one in TRL's layout; else the selection's."""
        if self.exported is not None and (self.exported.path / "dataset_dict.json").is_file():
            from curate.data.selected import exported_dataset

            return exported_dataset(self.exported.path)
        if self.selection is None:
            raise UsageError("This recipe selects nothing: give it a `select:` section.")
        return self.selection.to_dataset()

    def __repr__(self) -> str:
        return f"<Result of {self.recipe!r} in {self.store.folder}>\n{self.text()}"

    def text(self) -> str:
        lines = self.plan.left_out() if self.plan and not self.notes_shown else []
        if self.measured:
            lines.append("Measured " + ", ".join(f"{n:,} rows ({name})" for name, n in self.measured.items()) + ".")
        elif self.plan is not None and self.plan.steps and not self.plan.missing:
            lines.append("Nothing to measure: everything was measured before.")
        if self.scores:
            lines.append(f"Scored: {', '.join(self.scores)}.")
        if self.selection is not None:
            lines.append(selection_text(self.selection))
        if self.exported is not None:
            beside = ", the dropped ones beside them" if self.exported.n_dropped else ""
            lines.append(
                f"Exported {self.exported.n_rows:,} rows ({self.exported.layout}) to {self.exported.path}{beside}."
            )
        lines.append(
            f"Ask it: curate sql {self.store.folder} 'SELECT * FROM scored LIMIT 10' · curate summary {self.store.folder}"
        )
        return counted("\n".join(lines))

    def to_json(self) -> dict[str, Any]:
        control = self.selection.control if self.selection is not None else None
        return {
            "store": str(self.store.folder),
            "recipe": self.recipe,
            "measured": self.measured,
            "notes": self.plan.notes() if self.plan else [],
            "scores": self.scores,
            "values": self.values,
            "selection": None if self.selection is None else {"name": self.selection.name, **self.selection.counts},
            **({"control": {"name": control.name, **control.counts}} if control else {}),
            "export": self.exported,
        }


def selection_text(selection: Selection) -> str:
    """One line: how many rows are kept, and which step dropped the others."""
    counts = selection.counts
    why = ", ".join(f"{n:,} {step}" for step, n in counts["dropped_by"].items())
    tokens = f" ({counts['tokens_kept']:,} tokens)" if "tokens_kept" in counts else ""
    line = f"Selection {selection.name!r}: {counts['kept']:,} of {counts['rows']:,} rows kept{tokens}" + (
        f"; dropped: {why}." if why else "."
    )
    per_group = counts.get("tokens_per_group", {})
    if per_group:
        shown = ", ".join(f"{group} {n:,}" for group, n in list(per_group.items())[:8])
        more = f" and {len(per_group) - 8} more groups" if len(per_group) > 8 else ""
        line += f" A budget of tokens is for each group of `per`; tokens kept: {shown}{more}."
    control = selection.control
    return line + (f" Its control {control.name!r}: {control.counts['kept']:,} rows." if control else "")


def selection_notes(selection: Selection | None) -> list[str]:
    """What is likely not meant: the notes of a selection and of its control."""
    if selection is None:
        return []
    both = [selection, selection.control] if selection.control is not None else [selection]
    return [f"Selection {one.name!r}: {note}" for one in both for note in one.counts.get("notes", [])]
