"""A run of a recipe, all of it or some of its steps, noted in the store with how it ended. steps.py has the steps.

result = curate.run("recipe.yaml", set={"select.keep.share": 0.5})
result.selection, result.dataset, result.values
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curate.console import Progress
from curate.errors import CurateError, UsageError, disk_trouble
from curate.passes.loading.own_code import allowing_own_code
from curate.plan.imported import check_imported_names
from curate.plan.kept import open_kept
from curate.plan.notes import beyond_positions, unmeasurable_rows
from curate.plan.plan import Plan
from curate.plan.references import check_references
from curate.plan.requests import requested_scores
from curate.recipe.load import Loaded, load_recipe
from curate.store import Store
from curate.store.openings import kept_open
from curate.store.sharing import check_name
from curate.workflow.checks import check_all
from curate.workflow.result import Result, selection_text
from curate.workflow.steps import Steps, read_and_plan

__all__ = ["STEPS", "Result", "make_plan", "run", "run_steps", "selection_text"]

STEPS = ("measure", "score", "select", "export")


def run(
    recipe: str | Path | dict[str, Any],
    *,
    set: dict[str, Any] | list[str] | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """All of a recipe: measure what is missing, score, select, export. Safe to stop and start again.

    set: overrides, {"select.keep.share": 0.5}. store: another store's folder. progress: where lines go (default: none).
    Raises CurateError with what to do next; nothing that was measured is lost.
    """
    return run_steps(load_recipe(recipe, set=set, store=store), STEPS, progress=progress or Progress(quiet=True))


def run_steps(loaded: Loaded, steps: Sequence[str], *, progress: Progress, command: str = "run") -> Result:
    """Some steps of a recipe, in their order; the run's version and outcome are kept in the store."""
    _check_steps(loaded, steps, command)
    requested_scores(loaded)  # a misspelt score is said before anything is read
    with loaded.placed(), kept_open(), allowing_own_code(loaded.recipe.models.trust_remote_code):
        return _run_noted(loaded, steps, progress, command)


def _run_noted(loaded: Loaded, steps: Sequence[str], progress: Progress, command: str) -> Result:
    import curate

    store = _open_store(loaded, progress)
    check_name(loaded, store)
    check_imported_names(store, requested_scores(loaded))
    number = store.begin_run(loaded.name, command, curate.__version__)
    result = Result(store, loaded.name)
    try:
        with loaded.placed(), store.measuring():
            taken = Steps(loaded, steps, result, progress)
            taken.take()
        if "export" in steps and loaded.recipe.export is not None:
            with loaded.placed():
                taken.export()
    except CurateError as error:
        wrong_use = isinstance(error, UsageError) and not result.measured
        _finish(store, number, "refused" if wrong_use else "failed", str(error), result)
        raise
    except KeyboardInterrupt:
        _finish(store, number, "stopped", "interrupted", result)
        raise
    except Exception as error:
        full = disk_trouble(error)
        _finish(store, number, "failed", str(full) if full else f"{type(error).__name__}: {error}", result)
        if full is not None:
            raise full from error
        raise
    store.finish_run(number, "done", "", _counts(result))
    return result


def make_plan(loaded: Loaded, *, progress: Progress) -> Plan:
    """What a run would measure. Rows are read into the store (that is cheap, and done once); no model is run."""
    requested_scores(loaded)
    with loaded.placed(), kept_open(), allowing_own_code(loaded.recipe.models.trust_remote_code):
        return _plan_checked(loaded, progress)


def _plan_checked(loaded: Loaded, progress: Progress) -> Plan:
    store = _open_store(loaded, progress)
    check_name(loaded, store)
    check_imported_names(store, requested_scores(loaded))
    if store.measured_by() is None:  # what a killed run had finished is measured
        store.ingest()
    sources, plan = read_and_plan(loaded, store, open_kept(loaded, store, anew=True), progress, ask="look")
    plan.of_references = check_references(loaded, store, plan)
    check_all(loaded, store, plan, sources)
    plan.of_lengths = [*unmeasurable_rows(loaded, plan), *beyond_positions(loaded, store, plan)]
    return plan


def _check_steps(loaded: Loaded, steps: Sequence[str], command: str) -> None:
    recipe = loaded.recipe
    for name in ("select", "export"):
        if command == name and getattr(recipe, name) is None:
            raise UsageError(
                f"{loaded.path or 'recipe'}: there is no `{name}:` section. `curate init {recipe.kind}` writes a recipe that has one."
            )
    if recipe.export is not None and recipe.select is None and "export" in steps:
        raise UsageError(
            f"{loaded.path or 'recipe'}: `export:` needs a `select:` section that says which rows are kept (`select: {{}}` keeps all)."
        )


def _open_store(loaded: Loaded, progress: Progress) -> Store:
    return Store(loaded.store, create=True, on_wait=progress.say, on_damage=progress.warn)


def _counts(result: Result) -> dict[str, Any]:
    kept = {} if result.selection is None else {"kept": result.selection.counts}
    return {"measured": result.measured, **kept}


def _finish(store: Store, number: int, outcome: str, message: str, result: Result) -> None:
    """Note a failure without hiding it: a store that cannot be written now is not worth a second error."""
    try:
        store.finish_run(number, outcome, message, _counts(result))
    except CurateError:
        return
