"""What is found out before the costly pass: `curate plan` and `curate run` refuse the same recipes, before any model is run.

    def check(ahead: Ahead) -> None: raise UsageError(…)      # what the run would raise hours later, with the same words

A check of its own is a function in CHECKS. It may read rows, config files and tokenizers, and ask a server; it loads no weights. It is run whether
rows are missing or not; what is slow, such as reading a tokenizer, only for `Ahead.to_do`: a plan of what is measured already stays quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from curate.errors import EngineError, StoreError, UsageError, ValidationError
from curate.rows import Row
from curate.store.openings import let_go
from curate.workflow.publish import stage
from curate.workflow.spec import spec_of, worst_ends

if TYPE_CHECKING:
    from curate.plan.plan import Plan
    from curate.plan.step import Step
    from curate.recipe.load import Loaded
    from curate.store import Store

ROWS = 256  # rows that are looked at for a trial
OF_WEIGHTS = ("forward", "neighbours", "backward", "direction")


@dataclass
class Ahead:
    """What a check looks at. sources: the names of the recipe's sources by role."""

    loaded: Loaded
    store: Store
    plan: Plan
    sources: dict[str, list[str]]

    @property
    def to_do(self) -> list[Step]:
        """The steps that miss rows."""
        return [step for step in self.plan.steps if step.to_measure]


def check_all(
    loaded: Loaded, store: Store, plan: Plan, sources: dict[str, list[str]], *, is_selected: bool = False
) -> None:
    """What a run would refuse: what is wrong with the recipe first, then with the machine. UsageError and others, as each check says.

    Columns of `select` are looked up in the views as they will be. is_selected: the selection is there as it would be made now, so its rules hold.
    """
    ahead = Ahead(loaded, store, plan, sources)
    if is_selected:
        _export_columns_exist(loaded, store)
    elif loaded.recipe.select is not None:
        with store.transaction(undo=True):  # nor does it matter whether a question of ours has ended it
            columns_exist(ahead, stage(loaded, store, plan, sources))
    for check in CHECKS:
        check(ahead)


def weights_are_there(ahead: Ahead) -> None:
    """A server samples; everything else needs the weights themselves."""
    for step in ahead.plan.steps:
        if step.reads in OF_WEIGHTS and step.checkpoint.path.startswith("served:"):
            names = ", ".join(task.measurement.name for task in step.tasks)
            raise UsageError(
                f"The scores of this recipe need {names}, measured on the model's own weights, and the recipe names only a server. A server "
                "samples answers: name the same model's folder or hub id as well, `--set models.reference=…`."
            )


def completions_are_there(ahead: Ahead) -> None:
    """Prompts can be sampled and graded; what is measured on completions needs one. Where only some rows have it, the others are NULL."""
    tasks = [
        task
        for step in ahead.plan.steps
        if step.reads in OF_WEIGHTS
        for task in step.tasks
        if not task.measurement.prompt_only
    ]
    if ahead.loaded.recipe.kind != "sft" or not tasks:
        return
    sources = ahead.sources.get("train") or None
    query = "SELECT count(*) AS rows, count(completion) AS whole FROM rows WHERE kind = 'sft' AND prompt IS NOT NULL"
    rows, whole = ahead.store.sql(query, source=sources).row(0)
    if rows and not whole:
        columns = {column for task in tasks for column in task.measurement.columns}
        needing = [
            want.name
            for want in ahead.plan.wanted
            if any(want.need(text).column in columns for text in want.score.needs)
        ]
        raise ValidationError(
            f"The {rows:,} rows are prompts with answers and have no completion, and {', '.join(needing or sorted(columns))} would be measured on "
            "completions. Take scores of sampled answers alone (pass_rate, pass_at, accuracy), or name the column of completions with "
            "`--set source.columns.completion=…`."
        )


def samples_are_enough(ahead: Ahead) -> None:
    check_samples(ahead.loaded, ahead.plan)


def check_samples(loaded: Loaded, plan: Plan) -> None:
    """UsageError for pass@k of fewer than k samples, which is NULL in every row, or in those that were sampled no longer: a choice of rows by
    their answers.
    """
    sampling = loaded.recipe.sampling
    short = [want for want in plan.wanted if want.score.name == "pass_at" and want.params["k"] > sampling.least]
    if short and any(step.reads == "sample" for step in plan.steps):
        k, key = short[0].params["k"], "samples" if isinstance(sampling.samples, int) else "samples.from"
        raise UsageError(
            f"scores: {short[0].name} needs k answers of every row; k is {k} and sampling.{key} {sampling.least}. Sample more with "
            f"`--set sampling.{key}={k}`, or ask for a smaller k."
        )


def columns_exist(ahead: Ahead, staged: str) -> None:
    """A misspelt column in `select` or `export` is said before anything is measured, not in the morning. staged: the name of the recipe's views as
    they will be.
    """
    from curate.workflow.export import check_columns
    from curate.workflow.select import check_select

    recipe, plan, store = ahead.loaded.recipe, ahead.plan, ahead.store
    measurements = {task.measurement.name: task.measurement for step in plan.steps for task in step.tasks}
    numbers = [column for measurement in measurements.values() for column in measurement.columns]
    names = [f"{want.name}_name" for want in plan.wanted if want.score.names]
    planned = dict.fromkeys([*numbers, *(want.name for want in plan.wanted)], "DOUBLE")
    planned |= dict.fromkeys(["token_problem", *names], "VARCHAR")
    worst = worst_ends(store, plan.wanted)
    frame = check_select(store, spec_of(ahead.loaded), worst=worst, planned=planned, recipe=staged)
    if recipe.export is not None:
        check_columns(recipe.export, frame)


def _export_columns_exist(loaded: Loaded, store: Store) -> None:
    from curate.workflow.export import check_columns

    if loaded.recipe.export is not None:
        check_columns(loaded.recipe.export, store.frame(recipe=loaded.name))


def export_can_be_written(ahead: Ahead) -> None:
    """The folder, the rows' style in the format that is asked for, and the hub's key."""
    from curate.data.replace import check_split, check_target

    asked = ahead.loaded.recipe.export
    if asked is None:
        return
    names = [name for group in ahead.sources.values() for name in group]
    target = check_target(ahead.loaded.resolve(asked.to), [ahead.loaded.resolve(name) for name in names])
    if ahead.loaded.recipe.source is not None:
        check_split(ahead.loaded.recipe.source.split)
    _check_folder(target, "export.to", "`--set export.to=…`")
    _check_format(ahead, asked.format, asked.layout)
    if asked.push_to_hub:
        import huggingface_hub

        if huggingface_hub.get_token() is None:
            raise UsageError(
                f"export.push_to_hub: {asked.push_to_hub} needs a key of the hub that may write, and there is none here. `hf auth login` keeps "
                "one, or set HF_TOKEN."
            )


def _check_format(ahead: Ahead, format: str, layout: str) -> None:
    """ValidationError where no row that was looked at can be written in the format, or none of its sort by the layout; which are kept is not
    known yet.
    """
    from curate.data.exported import ExportRow, Plan, both_responses, is_plain_row
    from curate.data.trainers import check_sort

    trouble: ValidationError | None = None
    for row in _rows(ahead, ahead.sources.get("train", [])):
        try:
            record = ExportRow(row, row.row_id)
            if format == "extend":
                record, format = next(both_responses(iter([record]))), "prompt_completion"
            plan = Plan.of(record, format, as_json=not is_plain_row(row))
            plan.kept(record)
        except ValidationError as error:
            trouble = trouble or error
            continue
        check_sort(layout, plan.layout.rpartition(", ")[0])
        return
    if trouble is not None:
        raise ValidationError(f"export.format {format}: {trouble}")


def store_can_be_written(ahead: Ahead) -> None:
    """Shards are written after each part of a pass."""
    if not ahead.to_do:
        return
    try:
        _check_folder(ahead.store.folder / "shards", "store", "`--store DIR`")
    except UsageError as error:
        raise StoreError(str(error)) from None


def engine_is_there(ahead: Ahead) -> None:
    """The device of a pass that samples; other passes ask torch for it when they are planned."""
    engine = ahead.loaded.recipe.engine
    if engine.device not in ("auto", "cpu") and any(
        step.reads == "sample" and not step.tasks[0].measured.engine.startswith("openai ") for step in ahead.to_do
    ):
        from curate.passes.loading.engine import engine_identity

        engine_identity(dtype=engine.dtype, device=engine.device)


def rows_become_prompts(ahead: Ahead) -> None:
    """A chat template for conversations, a server that takes the rows' style, and whatever else encoding a row raises: tried on the first rows, on
    one of each style, and on the longest.
    """
    from curate.workflow.measure import trial

    tried: set[tuple[str, bool, bool]] = set()
    for step in ahead.to_do:
        params = step.tasks[0].measured.params  # checkpoints have a tokenizer each, most often the same one
        key = str(params.get("tokenizer")), bool(params.get("chat")), step.reads == "sample"
        if key in tried:
            continue
        tried.add(key)
        rows = _trial_rows(ahead, step)
        let_go()  # a tokenizer takes seconds to load
        texts = [prompt for prompt in trial(ahead.loaded, step, rows) if prompt.messages is None]
        if texts and ahead.plan.chat_only and step.tasks[0].measured.engine.startswith("openai "):
            raise EngineError(
                f"{ahead.loaded.recipe.server.url} takes messages alone (it has /v1/chat/completions, and no /v1/completions), and there are rows "
                "of plain text. Ask them as a chat (`--set tokens.chat=always`), give them as messages, or "
                "serve the model with a server that completes text, such as vLLM's."
            )


CHECKS: list[Callable[[Ahead], None]] = [
    weights_are_there,
    completions_are_there,
    samples_are_enough,
    export_can_be_written,
    store_can_be_written,
    engine_is_there,
    rows_become_prompts,
]


def _rows(ahead: Ahead, sources: list[str]) -> Iterator[Row]:
    row_ids = ahead.store.row_ids_of(sources or None, kind=ahead.loaded.recipe.kind, limit=ROWS)
    return (row for row in ahead.store.iter_rows(row_ids) if row is not None)


def _trial_rows(ahead: Ahead, step: Step) -> list[Row]:
    row_ids = [row_id for _, ids, _ in step.blocks for row_id in ids]
    chosen = row_ids[:8]
    if ahead.plan.lengths is not None and Path(step.checkpoint.home).is_dir():
        lengths = ahead.plan.lengths.of(step.tasks[0].measured.params["tokenizer"], step.checkpoint)
        at = lengths.indices(row_ids)
        chosen.append(row_ids[int(lengths.whole[at].argmax())])
    styles: set[type] = set()
    found = []
    for row in ahead.store.iter_rows([*chosen, *row_ids[:: max(1, len(row_ids) // ROWS)]]):
        if row is not None and (row.row_id in chosen or type(row.prompt) not in styles):
            styles.add(type(row.prompt))
            found.append(row)
    return found


def _check_folder(folder: Path, key: str, way_out: str) -> None:
    """UsageError where nothing can be written into this folder, or made at this place."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"{key}: {folder} cannot be written: {there} is a file. Choose another folder with {way_out}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(
            f"{key}: {folder} cannot be written ({there} allows no writing). Choose another with {way_out}."
        )
