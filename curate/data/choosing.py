"""Which format a source's rows are read in: of those that its columns allow, the one of the kind and the name that was asked for."""

from __future__ import annotations

from typing import Any

from curate.data.columns import Columns
from curate.data.formats import FORMATS, layouts
from curate.data.layout import PREFERENCE, Layout
from curate.errors import UsageError, ValidationError, listed


def choose_layout(
    source: str, head: list[dict[str, Any]], *, kind: str | None, format: str, columns: Columns
) -> Layout:
    """The layout of a source's rows, of the kind and format that were asked for. ValidationError says what is missing, UsageError which of the
    named columns it does not read.
    """
    layout = find_layout(source, head, kind=kind, format=format, columns=columns)
    idle = next(iter(sorted(columns.ours - layout.reads)), None)
    if idle is not None:
        ours = layout.prompt or "prompt"
        template = f"{{{columns.named(idle)}}}\\n{{{columns.named(ours)}}}"
        raise UsageError(
            f"source.columns.{idle}: {source} is read as {layout.format} ({FORMATS[layout.format]}), which does not read {idle}. Leave it out, name "
            f'another format, or put that column into a text: `columns: {{{ours}: "{template}"}}`.'
        )
    return layout


def find_layout(source: str, head: list[dict[str, Any]], *, kind: str | None, format: str, columns: Columns) -> Layout:
    names = list(dict.fromkeys(name for row in head for name in row))
    possible = layouts(names, head, columns.ours, columns.spent)
    fitting = [layout for layout in possible if kind in (None, layout.kind)]
    if format != "auto":
        same = (format, f"{format}_preference")
        if same_format := [layout for layout in fitting if layout.format in same]:
            return same_format[0]
        raise ValidationError(
            f"{source}: not in format '{format}' ({FORMATS[format]}){f' as kind {kind}' if kind else ''}; its columns are "
            f"{listed(names)}.{f' It looks like {possible[0].format}.' if possible else ''} Leave `format: auto`, or map columns "
            "with `--set source.columns.<ours>=<theirs>`."
        )
    if fitting:
        return fitting[0]
    if any(layout.format == "kto" for layout in possible):
        raise ValidationError(
            f"{source}: unpaired preferences (KTO: one reply and a label a row), which make no pairs; kind: preference needs chosen "
            "and rejected replies to the same prompt. What can be measured on them is each reply's likelihood: `--set kind=sft` "
            "(target_logp, target_nll)."
        )
    if possible and possible[0].format in PREFERENCE:
        raise ValidationError(
            f"{source}: preference pairs ({possible[0].format}), but kind: sft was asked for. Use kind: preference, or train on the chosen "
            "replies alone with `--set source.columns.completion=chosen`."
        )
    if possible:
        raise ValidationError(
            f"{source}: SFT examples ({possible[0].format}; columns {listed(names)}), but kind: preference needs 'chosen' and "
            "'rejected'. Use kind: sft, or name the columns with `--set source.columns.chosen=...` and `--set source.columns.rejected=...`."
        )
    hint = ""
    if {"prompt", "chosen"} <= set(names) and kind != "preference":
        hint = " To train on the chosen replies: `--set kind=sft --set source.columns.completion=chosen`."
    elif {"chosen", "rejected"} <= set(names):
        hint = " 'chosen' and 'rejected' are texts without turns, so the prompt has to be a column of its own."
    elif {"prompt", "question", "instruction"} & set(names) and kind != "preference":
        hint = " A prompt alone is neither measured nor graded: it needs a completion (for likelihoods) or an answer (to grade samples by)."
    listing = "\n".join(f"    {name:20} {what}" for name, what in FORMATS.items())
    raise ValidationError(
        f"{source}: no known format has the columns {listed(names)}.{hint} Name them with `--set source.columns.<ours>=<theirs>`. "
        f"Formats:\n{listing}"
    )
