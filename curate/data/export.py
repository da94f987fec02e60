"""Rows out: a dataset that TRL's trainers, `datasets.load_from_disk`, `load_dataset` and parquet readers take as it is.

    <to>/dataset_dict.json, <to>/<split>/      save_to_disk, as a DatasetDict
    <to>/data/<split>-00000.parquet            the same rows
    <to>/dropped/dropped-00000.parquet         every dropped row with its `reason`
    <to>/trainer_args.json                     arguments for TRL's DPOConfig or SFTConfig
    <to>/README.md                             the card

For other trainers (`Files.layout`, curate/data/trainers/) data/ holds their files, and there is no save_to_disk folder.

Written beside `to` and exchanged with it in one step, so that a kill leaves the old export or the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from curate.data import trl_trainers
from curate.data.arrow_types import read_types
from curate.data.card import Card, write_card
from curate.data.export_notes import bytes_warnings, column_notes, read_beside
from curate.data.exported import ExportRow
from curate.data.hub import first_line
from curate.data.parts import Parts, resampled
from curate.data.reference_logps import with_reference
from curate.data.replace import MARK, carry_over, check_split, check_target, replace_folder
from curate.data.spooled import spooled
from curate.data.trainer import FILE, MIXINS, TrainedAs, write_trainer_args
from curate.data.trainers import FILES, TRAINERS
from curate.data.trainers.base import About
from curate.data.trainers.written import write_layout
from curate.data.written import write_dataset, write_parquet
from curate.errors import CurateError, UsageError, ValidationError, disk_trouble
from curate.recipe.bounds import read_text

if TYPE_CHECKING:
    import pyarrow as pa

ExportFormat = Literal["trl", "prompt_completion", "messages", "extend", "prompts"]
OF_CURATE = "An export of curate: the next export to this folder replaces it."


@dataclass(frozen=True)
class Files:
    """Which files the rows go into. layout: trl, or one of `curate.data.trainers.TRAINERS`. rows_per_file: at most so many
    a data file; None: all in one.

    source: what a layout calls the rows' source, "" where there are several. in_order: the rows' order is meant, no trainer should shuffle them.
    reference: pairs get the reference model's log-probabilities (reference_logps.py); which of the measured columns do not stand there besides.
    """

    layout: str = "trl"
    rows_per_file: int | None = None
    source: str = ""
    in_order: bool = False
    reference: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ExportResult:
    """What was written. `layout`: e.g. "trl preference, standard". `renamed`: columns whose names a trainer would take for its own.

    warnings: those of the notes without which the result would be taken for another.
    """

    path: Path
    n_rows: int
    n_dropped: int
    layout: str
    columns: tuple[str, ...]
    renamed: dict[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def export(
    to: str | Path,
    records: Iterable[ExportRow],
    dropped: Iterable[ExportRow] = (),
    *,
    format: ExportFormat = "trl",
    split: str = "train",
    card: Card | None = None,
    sources: Iterable[str | Path | None] = (),
    resample: int | None = None,
    seed: int = 0,
    push_to_hub: str | None = None,
    trainer: TrainedAs | None = None,
    types: Mapping[str, str] | None = None,
    mark: Callable[[ExportResult, Path], str] = lambda result, folder: "",
    as_json: bool = False,
    files: Files = Files(),
) -> ExportResult:
    """Writes an export and puts it in the place of the one before.

    format: trl (pairs: prompt, chosen, rejected; examples: prompt, completion, and label where rows are unpaired; prompts alone
    where there is no completion), prompt_completion (of a pair: its chosen reply), messages (text becomes a user and an assistant
    turn), extend (both responses of a pair, one prompt/completion row each, with the column `side`), prompts (prompts with their answers, without
    completions).
    sources: paths that were read, which an export never overwrites. card: what README.md says of sources, models, scores.
    resample: that many rows, each in proportion to its `weight` (systematic resampling, fixed by `seed`; copies stand together).
    push_to_hub: also to this hub dataset, which is made private if it is new.
    trainer: what trainer_args.json is made from. types: the Arrow types of the rows' own columns, as far as they are known (`arrow_types`).
    as_json: some rows hold more than roles and texts (known by itself where the first one does), so messages are JSON objects in the tables, with
    the columns `tools` and `chat_template_kwargs` beside them: `datasets` and TRL read them as they were.
    Memory is bounded. Errors: ValidationError (no rows, text beside messages, missing completions, weights that cannot be used),
    UsageError (`to` is a source, or a folder that is no export).
    """
    known = get_args(ExportFormat)
    if format not in known:
        check_target(Path(to), sources)
        raise UsageError(f"export.format: '{format}' is none of {', '.join(known)}.")

    fits = {"needs_weights": resample is not None, "as_json": as_json}
    return export_parts(
        to,
        lambda work: spooled(work, iter(records), iter(dropped), format, read_types(types or {}), **fits),
        split=split,
        card=card,
        sources=sources,
        resample=resample,
        seed=seed,
        push_to_hub=push_to_hub,
        trainer=trainer,
        mark=mark,
        files=files,
    )


def export_parts(
    to: str | Path,
    fill: Callable[[Path], AbstractContextManager[Parts]],
    *,
    split: str = "train",
    card: Card | None = None,
    sources: Iterable[str | Path | None] = (),
    resample: int | None = None,
    seed: int = 0,
    push_to_hub: str | None = None,
    trainer: TrainedAs | None = None,
    mark: Callable[[ExportResult, Path], str] = lambda result, folder: "",
    files: Files = Files(),
) -> ExportResult:
    """As `export`, of rows that are tables already. fill: what is written, from a folder for what it needs meanwhile.
    mark: from the result and the folder where it lies until it is whole, what the file that marks it as an export says of it.
    """
    target = check_target(Path(to), sources)
    check_split(split)
    staging = target.with_name(f".{target.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        (staging / "work").mkdir(parents=True)
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, staging, True)
            existing = old_card(target / "README.md")
            with fill(staging / "work") as parts:
                result = write_export(
                    staging, target, parts, split, card or Card(), existing, resample, seed, trainer, mark, files
                )
            replace_folder(staging, target)
    except Exception as error:  # `datasets` has errors of its own for a full disk
        if not isinstance(error, OSError) and (isinstance(error, CurateError) or disk_trouble(error) is None):
            raise
        what = getattr(error, "strerror", None) or disk_trouble(error) or error
        raise ValidationError(
            f"export to {to} failed: {what}. What was there before is untouched; make room, or choose another folder with `--set export.to=...`."
        ) from error
    if push_to_hub:
        push(result, push_to_hub)
    return result


def write_export(
    staging: Path,
    target: Path,
    parts: Parts,
    split: str,
    card: Card,
    existing: str | None,
    resample: int | None,
    seed: int,
    trainer: TrainedAs | None,
    mark: Callable[[ExportResult, Path], str],
    files: Files,
) -> ExportResult:
    """Writes the export into `staging`: rows, dropped rows, trainer's settings, card, and what else was in `target`."""
    kept, left, layout = parts.kept, parts.dropped, parts.layout
    rows, schema = _rows_of(parts, files.reference, resample, seed)
    notes: list[str] = []
    if files.layout == "trl":
        n_rows = write_dataset(rows, schema, staging, split, files.rows_per_file)
    else:
        about = _about(layout, split, trainer, files)
        n_rows, notes = write_layout(files.layout, rows, schema, staging, about, files.rows_per_file)
    write_parquet(left.tables(), left.schema(), staging / "dropped" / "dropped-00000.parquet")
    other = {
        name: new for name, new in {**left.called, **kept.called}.items() if name in kept.called or name in left.own
    }
    warnings = bytes_warnings(kept)
    notes += [*column_notes(kept, other), *warnings]
    if resample is not None:
        notes.append(
            f"{n_rows:,} rows were drawn from {kept.n_rows:,} in proportion to `weight` (seed {seed}); do not weight them again."
        )
    if trainer is not None and files.layout == "trl":
        notes += write_trainer_args(staging, trainer, layout)
    mixins, unread = read_beside(
        files.layout, layout, reference=files.reference is not None, weights=bool(parts.total) and resample is None
    )
    if mixins:
        shutil.copyfile(trl_trainers.__file__, staging / MIXINS)
        notes.append(
            f"{MIXINS} has {' and '.join(mixins)}, with which TRL's trainers use these columns: its first lines say how."
        )
    if trainer is not None and layout.startswith("trl prompts"):
        unread += trainer.asked_behind
    notes += unread
    warnings += unread
    shutil.rmtree(staging / "work")
    end = "parquet" if files.layout == "trl" or TRAINERS[files.layout].schema is not None else "jsonl"
    layout = layout if files.layout == "trl" else f"{layout}, for {TRAINERS[files.layout].title}"
    write_card(
        staging / "README.md", card, existing=existing, split=split, n_rows=n_rows, n_dropped=left.n_rows, kind=parts.kind, layout=layout,
        notes=notes, trainer=files.layout, end=end,
    )  # fmt: skip
    result = ExportResult(
        target, n_rows, left.n_rows, layout, tuple(schema.names), other, tuple(notes), tuple(warnings)
    )
    (staging / MARK).write_text(f"{OF_CURATE}\n{mark(result, staging)}", encoding="utf-8")
    carry_over(target, staging)
    return result


def _rows_of(
    parts: Parts, reference: Collection[str] | None, resample: int | None, seed: int
) -> tuple[Iterator[pa.Table], pa.Schema]:
    """The rows to write: the kept ones, with the reference's log-probabilities where these are asked for, drawn by weight where that is."""
    rows, schema = parts.kept.tables(), parts.kept.schema()
    if reference is not None:
        rows, schema = with_reference(rows, schema, reference)
    if resample is not None:
        rows = resampled(rows, parts.kept.n_rows, resample, parts.total, seed)
    return rows, schema


def _about(layout: str, split: str, trainer: TrainedAs | None, files: Files) -> About:
    sort, _, style = layout.rpartition(", ")
    all_turns = trainer is not None and trainer.turns == "all"
    return About(sort, style == "standard", split, all_turns, files.source, files.in_order)


def old_card(file: Path) -> str | None:
    """The card that is there, with its line ends as they are. ValidationError where it is no UTF-8 text."""
    try:
        return read_text(file) if file.is_file() else None
    except ValueError as error:
        raise ValidationError(
            f"{file}: {error}, so the new card cannot be merged with it. Save it as UTF-8 text, or move it away."
        ) from None


def push(result: ExportResult, repository: str) -> None:
    """The export's data, dropped rows, trainer's settings and card to a hub dataset (private if it is new), the card merged with the one there."""
    import huggingface_hub

    beside = sorted({FILE, MIXINS, *FILES})
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=str(result.path),
            allow_patterns=["README.md", *beside, "data/*", "dropped/*"],
            delete_patterns=[*beside, "data/*", "dropped/*"],
            commit_message=f"curate export: {result.n_rows} rows",
        )
    except Exception as error:  # network, login, rights: the hub's own message says which
        raise ValidationError(
            f"the export is in {result.path}, but pushing it to {repository} failed ({type(error).__name__}: {first_line(error)}). "
            "Log in with `hf auth login`, check the name, then export again."
        ) from error
