"""The wiring of the steps: source → rows → plan → measure → store → score → select → export.

result = curate.run("recipe.yaml", set={"select.keep.share": 0.5})
result.selection, result.dataset, result.values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.console import Progress, counted
from curate.errors import CurateError, ModelError, UsageError, disk_trouble
from curate.plan.imported import check_imported_names
from curate.plan.kept import Kept, open_kept
from curate.plan.make import make_plan as _make_plan
from curate.plan.notes import beyond_positions, unmeasurable_rows
from curate.plan.plan import Plan
from curate.plan.recorded import recorded_runs
from curate.plan.references import check_references
from curate.plan.requests import requested_scores
from curate.plan.step import RequestedScore
from curate.recipe.load import Loaded, load_recipe
from curate.recipe.schema import Worst
from curate.rows import content_id
from curate.store import DatasetValue, Store
from curate.store.database import kept_open
from curate.store.sharing import check_name, placed
from curate.workflow.checks import Ahead, check_ahead, columns_exist
from curate.workflow.read import read_sources

if TYPE_CHECKING:
    from datasets import Dataset

    from curate.data import ExportResult
    from curate.plan.servers import Ask
    from curate.store import Selection
    from curate.workflow.select import Decisions, SelectSpec

STEPS = ("measure", "score", "select", "export")


@dataclass(repr=False)
class Result:
    """What a run did. selection is None where the recipe selects nothing; values are the dataset-level ones, with intervals.

    said: whether the lines of progress told the plan's notes already, so that the text does not repeat them.
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
    said: bool = False

    @property
    def dataset(self) -> Dataset:
        """The kept rows: the exported dataset, with its extra columns, if there is one; else the selection's."""
        if self.exported is not None:
            from curate.data.selected import exported_dataset

            return exported_dataset(self.exported.path)
        if self.selection is None:
            raise UsageError("This recipe selects nothing: give it a `select:` section.")
        return self.selection.to_dataset()

    def __repr__(self) -> str:
        return f"<Result of {self.recipe!r} in {self.store.folder}>\n{self.text()}"

    def text(self) -> str:
        lines = self.plan.left_out() if self.plan and not self.said else []
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
        beside = self.selection.control if self.selection is not None else None
        return {
            "store": str(self.store.folder),
            "recipe": self.recipe,
            "measured": self.measured,
            "notes": self.plan.notes() if self.plan else [],
            "scores": self.scores,
            "values": self.values,
            "selection": None if self.selection is None else {"name": self.selection.name, **self.selection.counts},
            **({"control": {"name": beside.name, **beside.counts}} if beside else {}),
            "export": self.exported,
        }


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
    with kept_open():
        return _run_noted(loaded, steps, progress, command)


def _run_noted(loaded: Loaded, steps: Sequence[str], progress: Progress, command: str) -> Result:
    import curate

    store = _open_store(loaded, progress)
    check_name(loaded, store)
    check_imported_names(store, requested_scores(loaded))
    number = store.begin_run(loaded.name, command, curate.__version__)
    result = Result(store, loaded.name)
    try:
        with store.measuring():
            sources = _run(loaded, steps, result, progress)
        if "export" in steps and loaded.recipe.export is not None:
            _export(loaded, result, sources, progress)
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


def _likely_not_meant(selection: Selection | None) -> list[str]:
    """The notes of a selection and of its control."""
    made = [one for one in (selection, selection.control if selection else None) if one is not None]
    return [f"Selection {one.name!r}: {note}" for one in made for note in one.counts.get("notes", [])]


def _run(loaded: Loaded, steps: Sequence[str], result: Result, progress: Progress) -> dict[str, list[str]]:
    """Everything up to the export. What the recipe points to in the store changes at the end, in one transaction: a run that fails or is killed
    leaves every view as the last whole one left it; what it measured is kept.
    """
    store, measures = result.store, "measure" in steps
    kept = open_kept(loaded, store, anew=measures)
    sources, plan = _planned(loaded, store, kept, progress, ask="keep" if measures else "no")
    result.plan = plan
    for note in kept.notes():
        progress.say(note)
    if measures:
        plan.of_references = check_references(loaded, store, plan)
        for note in plan.notes():
            (progress.warn if note in plan.doubts else progress.say)(note)
        result.said = not progress.quiet
        _check_ahead(loaded, store, plan, sources)
        if not store.recipes():  # nobody's views to keep: whoever reads meanwhile sees what is done so far
            with store.transaction():
                _register(loaded, store, plan, sources)
        _measure(loaded, result, progress)
        plan.of_lengths = beyond_positions(loaded, store, plan)  # now that tokens are counted
        for note in plan.of_lengths:
            progress.say(note)
        if result.measured or "score" not in steps:
            store.keep(loaded.name, kept.record())
    elif "score" in steps:
        _grade_kept(loaded, result, progress)
    scored = _compute(loaded, result, sources, progress) if "score" in steps else None
    decided = _decide(loaded, result, sources, scored) if "select" in steps and loaded.recipe.select else None
    follows = _views_follow(loaded, steps, result, sources, progress)
    with store.transaction():
        if follows:
            _register(loaded, store, plan, sources)
        if scored is not None:
            scored.write(store, loaded.name)
            store.keep(loaded.name, kept.record())
        if decided is not None:
            result.selection = decided.write(store, loaded.name)
        store.unstage_recipe(loaded.name)
    for note in _likely_not_meant(result.selection):
        progress.say(note)
    if scored is not None and loaded.recipe.select is not None and result.selection is None:
        if store.inputs_hash("selection", loaded.name) not in (None, _selection_of(loaded, result, sources)):
            progress.say(
                f"The selection {loaded.name!r} is of earlier scores: `curate select {loaded.path}` makes it anew."
            )
    return sources


def _planned(
    loaded: Loaded, store: Store, kept: Kept, progress: Progress, *, ask: Ask
) -> tuple[dict[str, list[str]], Plan]:
    """The names of the sources, read in, and the plan. A model that cannot be read is an error for what measures alone, which says so."""
    sources = read_sources(loaded, store, progress, kept)
    try:
        return sources, _make_plan(loaded, store, sources, ask=ask, kept=kept)
    except ModelError as error:
        if kept.anew and store.kept(loaded.name) is not None:
            raise type(error)(
                f"{error}\n  What was measured is kept: `curate score {loaded.path}`, `select` and `export` need no model."
            ) from None
        raise


def _views_follow(
    loaded: Loaded, steps: Sequence[str], result: Result, sources: dict[str, list[str]], progress: Progress
) -> bool:
    """Whether the views are to show what this run means: not what was measured alone, beside scores of something else; nor an export."""
    if "score" in steps or "select" in steps:
        return True
    if "measure" not in steps:
        return False
    current = result.store.inputs_hash("scores", loaded.name) in (None, _scores_of(result.store, result, sources))
    if not current:
        progress.say(
            f"The views show what the last scores of {loaded.name!r} are made of: `curate score {loaded.path}` takes in what is measured now."
        )
    return current


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


def make_plan(loaded: Loaded, *, progress: Progress) -> Plan:
    """What a run would measure. Rows are read into the store (that is cheap, and done once); no model is run."""
    requested_scores(loaded)
    with kept_open():
        return _plan_checked(loaded, progress)


def _plan_checked(loaded: Loaded, progress: Progress) -> Plan:
    store = _open_store(loaded, progress)
    check_name(loaded, store)
    check_imported_names(store, requested_scores(loaded))
    if store.measured_by() is None:  # what a killed run had finished is measured
        store.ingest()
    sources, plan = _planned(loaded, store, open_kept(loaded, store, anew=True), progress, ask="look")
    plan.of_references = check_references(loaded, store, plan)
    _check_ahead(loaded, store, plan, sources)
    plan.of_lengths = [*unmeasurable_rows(loaded, plan), *beyond_positions(loaded, store, plan)]
    return plan


def _register(loaded: Loaded, store: Store, plan: Plan, sources: dict[str, list[str]]) -> None:
    """Say which values are the recipe's, inside a transaction: from its end on the views show them."""
    names = [name for group in sources.values() for name in group]
    kept = {m.fingerprint: (m.run, m.checkpoint, m.step) for m in store.measured()}
    of_run = [task.measured for step in plan.steps for task in step.tasks if task.measured.run]
    renamed = [m for m in of_run if kept.get(m.fingerprint) not in (None, (m.run, m.checkpoint, m.step))]
    store.take_sources(names)
    if renamed:  # measured as a model of its own before, or in another run: now a checkpoint of this one
        store.remember(renamed)
    store.register_recipe(loaded.name, placed(loaded, store), sources=names, **_meant(store, plan), roles=sources)


def _meant(store: Store, plan: Plan) -> dict[str, Any]:
    """What a recipe's views may show: as `Store.register_recipe` takes it."""
    also = [m.fingerprint for m in recorded_runs(store)[plan.recorded]] if plan.recorded else []
    uses = list(dict.fromkeys([*(f for found in plan.bindings.values() for f in found), *also]))
    plain = list(
        dict.fromkeys(found[-1] for (role, _, over), found in plan.bindings.items() if over is None and not role)
    )
    return {"uses": uses, "plain": plain if plan.steps or plan.recorded else [], "places": plan.labels}


def _check_ahead(loaded: Loaded, store: Store, plan: Plan, sources: dict[str, list[str]]) -> None:
    """What a run would refuse. Columns of `select` are looked up in the views as they will be."""
    worst = _worst(store, plan.wanted)
    if loaded.recipe.select is not None:
        meant = _meant(store, plan)
        with store.transaction():
            staged = store.stage_recipe(loaded.name, **meant, roles=sources)
            columns_exist(Ahead(loaded, store, plan, sources, _spec(loaded), worst, staged))
            store.unstage_recipe(loaded.name)
    check_ahead(loaded, store, plan, sources, None, worst)


def _spec(loaded: Loaded) -> SelectSpec:
    from curate.workflow.select import SelectSpec

    asked = loaded.recipe.select
    assert asked is not None
    return SelectSpec(
        where=asked.where,
        drop_worst={name: one.share if isinstance(one, Worst) else one for name, one in asked.drop_worst.items()},
        order_by=asked.order_by,
        keep=asked.keep.given if asked.keep else None,
        per=asked.budgets,
        duplicates=asked.duplicates,
        unknown=asked.unknown,
        exclude=asked.exclude,
        control=asked.control,
        seed=_seed(loaded),
        worst={name: one.worst for name, one in asked.drop_worst.items() if isinstance(one, Worst)},
    )


def _seed(loaded: Loaded) -> int:
    """The seed of what is random in the selection."""
    asked = loaded.recipe.select
    return asked.seed if asked is not None and asked.seed is not None else loaded.recipe.engine.seed


def _worst(store: Store, wanted: Sequence[RequestedScore]) -> dict[str, str]:
    """Which end is bad: as imports said it of their columns, and as the scores declare it."""
    return {**store.worst_ends(), **{want.name: want.score.worst for want in wanted}}


def _measure(loaded: Loaded, result: Result, progress: Progress) -> None:
    from curate.workflow.measure import measure

    assert result.plan is not None
    if result.plan.missing:
        with kept_open(False):
            result.measured = measure(loaded, result.store, result.plan, progress)
        if result.plan.lengths is not None:
            result.plan.lengths.forget()


def _grade_kept(loaded: Loaded, result: Result, progress: Progress) -> None:
    """Another grader, or fewer samples, over answers that are kept: no model is asked for them, so scoring alone does it."""
    from curate.workflow.measure import measure

    plan = result.plan
    assert plan is not None
    free = [step for step in plan.steps if step.reads == "sample" and step.missing and step.graded == step.missing]
    if not free:
        return
    graded = replace(plan, steps=free)
    for note in check_references(loaded, result.store, graded):
        progress.say(note)
    rows = sum(step.missing for step in free)
    progress.say(f"The kept answers of {rows:,} rows are graded as the recipe says now; no model is asked.")
    result.measured = measure(loaded, result.store, graded, progress)


@dataclass(frozen=True)
class Scored:
    """What a recipe's scores are, before the store has them."""

    row_ids: list[str]
    scores: dict[str, Any]
    trajectories: list[Any]
    values: list[DatasetValue]
    inputs_hash: str

    def write(self, store: Store, recipe: str, *, staged: bool = False) -> None:
        inputs_hash = None if staged else self.inputs_hash
        store.write_scores(recipe, self.row_ids, self.scores, trajectories=self.trajectories, inputs_hash=inputs_hash)
        store.write_dataset_values(recipe, self.values)


def _compute(loaded: Loaded, result: Result, sources: dict[str, list[str]], progress: Progress) -> Scored:
    from curate.workflow.score import Columns, compute_dataset_values, compute_scores, named, nothing_known
    from curate.workflow.thresholds import with_thresholds

    store, plan = result.store, result.plan
    assert plan is not None
    _check_measured(loaded, store, plan)
    if plan.missing and not result.measured:
        progress.say(
            f"Some rows are not measured yet and their scores are NULL: `curate measure {loaded.path}` measures them."
        )
    train = sources.get("train", [])
    row_ids = store.row_ids_of(train or None, kind=loaded.recipe.kind, role="train" if train else None)
    heldout = sources.get("heldout", [])
    ids = store.row_ids_of(heldout, kind=loaded.recipe.kind, role="heldout") if heldout else []
    inputs_hash = _scores_of(store, result, sources)
    columns = Columns(store, plan, row_ids, train)
    of_heldout = Columns(store, plan, ids, heldout) if ids else None
    found = with_thresholds(store, plan, columns, of_heldout)
    for note in found.notes:
        progress.say(note)
    plan = found.plan
    scores, each = compute_scores(columns, plan.wanted)
    if not plan.missing or result.measured:
        for note in nothing_known(columns, plan.wanted, scores):
            progress.warn(note)
    each = [replace(one, values=named(plan, one.values)) for one in each]
    result.scores = list(scores)
    values = found.values + compute_dataset_values(columns, plan.wanted)
    if of_heldout is not None:
        values += compute_dataset_values(of_heldout, plan.wanted, prefix="heldout_")
    result.values = values
    return Scored(row_ids, named(plan, scores), each, values, inputs_hash)


def _check_measured(loaded: Loaded, store: Store, plan: Plan) -> None:
    """UsageError for what was never measured: its scores would be empty. Rows that are new since are another thing."""
    known = {m.fingerprint for m in store.measured()}
    never = [
        (step, task) for step in plan.steps for task in step.tasks if step.missing and task.fingerprint not in known
    ]
    if never:
        models = list(dict.fromkeys(step.checkpoint.label for step, _ in never if step.reads != "tokens"))
        of = f" of {models[0]}" + (f" and {len(models) - 1:,} more" if len(models) > 1 else "") if models else ""
        names = ", ".join(dict.fromkeys(task.measurement.name for _, task in never))
        raise UsageError(
            f"{loaded.path or 'recipe'}: {names}{of} was never measured as the recipe has it now. "
            f"`curate measure {loaded.path or 'RECIPE'}`, where the models are, does that."
        )


@dataclass(frozen=True)
class Decided:
    """What a selection is, before the store has it."""

    decisions: Decisions
    control: Any
    spec: dict[str, Any]
    inputs_hash: str

    def write(self, store: Store, recipe: str) -> Selection:
        made = {"recipe": recipe, "spec": self.spec, "inputs_hash": self.inputs_hash, "control": self.control}
        return store.write_selection(recipe, self.decisions, **made)


def _decide(loaded: Loaded, result: Result, sources: dict[str, list[str]], scored: Scored | None) -> Decided:
    """scored: the scores of this run, which the views do not show yet; None: those that they show."""
    from curate.workflow.select import select_with_control

    store, plan, name = result.store, result.plan, loaded.name
    assert plan is not None
    wanted = requested_scores(loaded)
    if scored is not None:
        meant = _meant(store, plan)
        with store.transaction():
            name = store.stage_recipe(loaded.name, **meant, roles=sources)
            scored.write(store, name, staged=True)
    there = scored is not None or any(r["name"] == name for r in store.recipes())
    columns = store.sql("SELECT * FROM scored LIMIT 0", recipe=name).columns if there else []
    if not there or not {w.name for w in wanted} <= set(columns):
        raise UsageError(
            f"Not every score of {loaded.name!r} is computed yet: `curate score {loaded.path}` does that, `curate run {loaded.path}` does all steps."
        )
    if scored is None:
        _check_current(loaded, store, "scores", _scores_of(store, result, sources), "score")
    spec = _spec(loaded)
    worst = _worst(store, wanted)
    known = {w.name: f"{other.name} = 1" for w in wanted for other in wanted if w.score.null_where == other.score.name}
    decisions, control = select_with_control(
        store, spec, worst=worst, recipe=name, sources=sources.get("train"), null_is_known=known
    )
    return Decided(decisions, control, spec.as_dict(), _selection_of(loaded, result, sources))


def _export(loaded: Loaded, result: Result, sources: dict[str, list[str]], progress: Progress) -> None:
    from curate.workflow.export import export_selection

    if result.selection is None:
        result.selection = result.store.selection(loaded.name)
        _check_current(loaded, result.store, "selection", _selection_of(loaded, result, sources), "select")
    assert result.plan is not None
    roles = result.plan.roles
    result.exported = export_selection(loaded, result.store, result.selection, sources.get("train", []), roles)
    for note in result.exported.notes:
        (progress.warn if note in result.exported.warnings else progress.say)(note)


def _scores_of(store: Store, result: Result, sources: dict[str, list[str]]) -> str:
    """What scores are computed from: the scores with their settings, the measurements that they read, the rows and what is missing of them, and
    imported held-out accuracies where they set a threshold.
    """
    from curate.workflow.thresholds import calibrates, imported_accuracies

    plan = result.plan
    assert plan is not None
    uses = sorted((*map(str, key), *prints) for key, prints in plan.bindings.items())
    wanted = [
        (want.name, want.score.name, want.params, *([want.score.version] if want.score.version > 1 else []))
        for want in plan.wanted
    ]
    names = {name for group in sources.values() for name in group}
    rows = sorted((s["role"], s["source"], s["fingerprint"]) for s in store.sources() if s["source"] in names)
    heldout = [sorted(imported_accuracies(store).items(), key=str)] if calibrates(plan.wanted) else []
    return content_id(wanted, uses, rows, 0 if result.measured else plan.missing, *heldout)


def _selection_of(loaded: Loaded, result: Result, sources: dict[str, list[str]]) -> str:
    asked = loaded.recipe.select
    assert asked is not None
    random = [_seed(loaded)] if asked.is_random else []
    return content_id(_scores_of(result.store, result, sources), asked.settings(), *random)


def _check_current(
    loaded: Loaded, store: Store, what: Literal["scores", "selection"], inputs_hash: str, step: str
) -> None:
    """Scores of another setting are no basis for a selection, nor an old selection for an export."""
    if store.inputs_hash(what, loaded.name) not in (None, inputs_hash):
        raise UsageError(
            f"{store.folder}: what is there as {what} of {loaded.name!r} comes from other settings, rows or measurements than the recipe has now. "
            f"`curate {step} {loaded.path}` makes that anew, `curate run {loaded.path}` does all steps."
        )


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
    return Store(loaded.store, create=True, on_wait=progress.say)


def _counts(result: Result) -> dict[str, Any]:
    kept = {} if result.selection is None else {"kept": result.selection.counts}
    return {"measured": result.measured, **kept}


def _finish(store: Store, number: int, outcome: str, message: str, result: Result) -> None:
    """Note a failure without hiding it: a store that cannot be written now is not worth a second error."""
    try:
        store.finish_run(number, outcome, message, _counts(result))
    except CurateError:
        return
