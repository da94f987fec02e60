"""The steps of a run over the plan that they share: measure → score → select → publish → export."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from curate.console import Progress
from curate.errors import ModelError, UsageError
from curate.plan.kept import Kept, open_kept
from curate.plan.make import make_plan
from curate.plan.notes import beyond_positions
from curate.plan.plan import Plan
from curate.plan.references import check_references
from curate.plan.requests import requested_scores
from curate.plan.step import RequestedScore
from curate.recipe.load import Loaded
from curate.store import DatasetValue, Store
from curate.store.openings import kept_open
from curate.workflow.checks import check_all, check_samples
from curate.workflow.current import is_selected, note_scores, scores_noted
from curate.workflow.inputs import Sources, check_current, scores_hash, selection_hash
from curate.workflow.publish import Decided, Scored, register, stage
from curate.workflow.read import read_sources
from curate.workflow.result import Result, selection_notes
from curate.workflow.spec import spec_of, worst_ends

if TYPE_CHECKING:
    from curate.plan.servers import Ask
    from curate.workflow.columns import Columns


def read_and_plan(loaded: Loaded, store: Store, kept: Kept, progress: Progress, *, ask: Ask) -> tuple[Sources, Plan]:
    """The names of the sources, read in, and the plan. A model that cannot be read is an error for what measures alone, which says so."""
    sources = read_sources(loaded, store, progress, kept)
    try:
        return sources, make_plan(loaded, store, sources, ask=ask, kept=kept)
    except ModelError as error:
        if kept.anew and store.kept(loaded.name) is not None:
            raise type(error)(
                f"{error}\n  What was measured is kept: `curate score {loaded.path}`, `select` and `export` need no model."
            ) from None
        raise


class Steps:
    """The steps of one run. What the recipe points to in the store changes when all of them are taken, in one transaction: a run that fails or is
    killed leaves every view as the last whole one left it; what it measured is kept.
    """

    def __init__(self, loaded: Loaded, steps: Sequence[str], result: Result, progress: Progress):
        self.loaded, self.steps, self.result, self.progress = loaded, steps, result, progress
        self.store = result.store
        self.measures = "measure" in steps
        self.kept = open_kept(loaded, self.store, anew=self.measures)
        ask: Ask = "keep" if self.measures else "no"
        self.sources, self.plan = read_and_plan(loaded, self.store, self.kept, progress, ask=ask)
        result.plan = self.plan

    def take(self) -> None:
        """Everything up to the export."""
        self._say(self.kept.notes())
        if self.measures:
            self.measure()
        elif "score" in self.steps:
            self.grade_kept()
        scored = self.score() if "score" in self.steps and not self.is_scored() else None
        selects = "select" in self.steps and self.loaded.recipe.select is not None
        decided = self.select(scored) if selects and not (scored is None and self.is_selected()) else None
        self.publish(scored, decided)

    def is_scored(self) -> bool:
        """Whether the scores are those that would be made now: then what was said of them is said again."""
        if self.result.measured:
            return False
        noted = self._scores_noted()
        if noted is None:
            return False
        self.result.scores = noted["scores"]
        self.result.values = self.store.dataset_values(self.loaded.name)
        self.progress.say("Scores: up to date.")
        for note in noted["warnings"]:
            self.progress.warn(note)
        return True

    def is_selected(self) -> bool:
        """Whether the selection is the one that would be made now."""
        if not self._selection_is_current():
            return False
        name = self.loaded.name
        self.result.selection = self.store.selection(name)
        self.progress.say(f"Selection {name!r}: up to date.")
        return True

    def _selection_is_current(self) -> bool:
        of_scores, name = self._scores_hash(), self.loaded.name
        if self.loaded.recipe.select is None or self.store.inputs_hash("scores", name) != of_scores:
            return False
        return is_selected(self.loaded, self.store, of_scores)

    def _scores_noted(self) -> dict[str, Any] | None:
        return scores_noted(self.loaded, self.store, self.plan, self._scores_hash())

    def measure(self) -> None:
        """Say and check what is known before the costly part, then run what is missing."""
        loaded, store, plan = self.loaded, self.store, self.plan
        plan.of_references = check_references(loaded, store, plan)
        for note in plan.notes():
            (self.progress.warn if note in plan.doubts else self.progress.say)(note)
        self.result.notes_shown = not self.progress.quiet
        noted = self._scores_noted()
        check_all(loaded, store, plan, self.sources, is_selected=noted is not None and self._selection_is_current())
        if not store.recipes():  # nobody's views to keep: whoever reads meanwhile sees what is done so far
            with store.transaction():
                register(loaded, store, plan, self.sources)
        if plan.missing:
            with kept_open(False):
                self._measure(plan)
            if plan.lengths is not None:
                plan.lengths.forget()
        too_long = None if noted is None else noted.get("too_long")
        plan.of_lengths = (
            beyond_positions(loaded, store, plan) if too_long is None else too_long
        )  # tokens are counted now
        if noted is not None and too_long is None:
            note_scores(loaded, store, plan, self._scores_hash(), noted["scores"], noted["warnings"], plan.of_lengths)
        self._say(plan.of_lengths)
        if self.result.measured or "score" not in self.steps:
            store.keep(loaded.name, self.kept.record())

    def grade_kept(self) -> None:
        """Another grader, or fewer samples, over answers that are kept: no model is asked for them, so scoring alone does it."""
        graded = [
            step for step in self.plan.steps if step.reads == "sample" and step.missing and step.graded == step.missing
        ]
        if not graded:
            return
        plan = replace(self.plan, steps=graded)
        self._say(check_references(self.loaded, self.store, plan))
        rows = sum(step.missing for step in graded)
        self.progress.say(f"The kept answers of {rows:,} rows are graded as the recipe says now; no model is asked.")
        with kept_open(False):  # graders may be slow
            self._measure(plan)

    def _measure(self, plan: Plan) -> None:
        from curate.workflow.measure import measure

        self.result.measured = measure(self.loaded, self.store, plan, self.progress)

    def score(self) -> Scored:
        """The recipe's scores and dataset values. UsageError where something that they read was never measured."""
        from curate.workflow.columns import Columns
        from curate.workflow.score import compute_scores, named, nothing_known
        from curate.workflow.thresholds import with_thresholds

        store, plan, kind = self.store, self.plan, self.loaded.recipe.kind
        check_samples(self.loaded, plan)
        _check_measured(self.loaded, store, plan)
        whole = not plan.missing or bool(self.result.measured)
        if not whole:
            self.progress.say(
                f"Some rows are not measured yet and their scores are NULL: `curate measure {self.loaded.path}` measures them."
            )
        train, heldout = self.sources.get("train", []), self.sources.get("heldout", [])
        row_ids = store.row_ids_of(train or None, kind=kind, role="train" if train else None)
        heldout_ids = store.row_ids_of(heldout, kind=kind, role="heldout") if heldout else []
        inputs_hash = self._scores_hash()
        columns = Columns(store, plan, row_ids, train)
        of_heldout = Columns(store, plan, heldout_ids, heldout) if heldout_ids else None
        calibrated = with_thresholds(store, plan, columns, of_heldout)
        self._say(calibrated.notes)
        plan = calibrated.plan
        scores, trajectories = compute_scores(columns, plan.wanted)
        warnings = nothing_known(columns, plan.wanted, scores) if whole else []
        for note in warnings:
            self.progress.warn(note)
        trajectories = [replace(one, values=named(plan, one.values)) for one in trajectories]
        self.result.scores = list(scores)
        self.result.values = calibrated.values + _dataset_values(columns, of_heldout, plan.wanted)
        return Scored(row_ids, named(plan, scores), trajectories, self.result.values, inputs_hash, warnings)

    def select(self, scored: Scored | None) -> Decided:
        """The selection. scored: the scores of this run, which the views do not show yet; None: those that they show."""
        from curate.workflow.select import select_with_control

        loaded, store, name = self.loaded, self.store, self.loaded.name
        wanted = requested_scores(loaded)
        if scored is not None:
            with store.transaction():
                name = stage(loaded, store, self.plan, self.sources)
                scored.write(store, name, staged=True)
        _check_scored(loaded, store, name, wanted, is_staged=scored is not None)
        of_scores = self._scores_hash()
        if scored is None:
            check_current(loaded, store, "scores", of_scores, "score")
        spec = spec_of(loaded)
        decisions, control = select_with_control(
            store,
            spec,
            worst=worst_ends(store, wanted),
            recipe=name,
            sources=self.sources.get("train"),
            null_is_known=_null_is_known(wanted),
        )
        return Decided(decisions, control, spec.as_dict(), selection_hash(loaded, of_scores))

    def publish(self, scored: Scored | None, decided: Decided | None) -> None:
        """Give the store what was made, as a whole, and say what is not of the recipe as it is now."""
        loaded, store = self.loaded, self.store
        follows = self._views_follow()
        with store.transaction():
            if follows:
                register(loaded, store, self.plan, self.sources)
            if scored is not None:
                scored.write(store, loaded.name)
                store.keep(loaded.name, self.kept.record())
                too_long = self.plan.of_lengths if self.measures else None
                note_scores(loaded, store, self.plan, scored.inputs_hash, self.result.scores, scored.warnings, too_long)
            if decided is not None:
                self.result.selection = decided.write(store, loaded.name)
            store.unstage_recipe(loaded.name)
        self._say(selection_notes(self.result.selection))
        if scored is not None and loaded.recipe.select is not None and decided is None:
            of_store = store.inputs_hash("selection", loaded.name)
            if of_store not in (None, selection_hash(loaded, self._scores_hash())):
                self.progress.say(
                    f"The selection {loaded.name!r} is of earlier scores: `curate select {loaded.path}` makes it anew."
                )

    def export(self) -> None:
        """Write the dataset: of the selection that this run made, or of the one that is there."""
        from curate.workflow.export import export_selection

        loaded, result = self.loaded, self.result
        inputs_hash = selection_hash(loaded, self._scores_hash())
        if result.selection is None:
            result.selection = self.store.selection(loaded.name)
            check_current(loaded, self.store, "selection", inputs_hash, "select")
        train = self.sources.get("train", [])
        result.exported = export_selection(
            loaded,
            self.store,
            result.selection,
            train,
            self.plan.roles,
            inputs_hash=inputs_hash,
            progress=self.progress,
        )
        for note in result.exported.notes:
            (self.progress.warn if note in result.exported.warnings else self.progress.say)(note)

    def _views_follow(self) -> bool:
        """Whether the views are to show what this run means: not what was measured alone, beside scores of something else; nor an export."""
        if "score" in self.steps or "select" in self.steps:
            return True
        if not self.measures:
            return False
        name = self.loaded.name
        current = self.store.inputs_hash("scores", name) in (None, self._scores_hash())
        if not current:
            self.progress.say(
                f"The views show what the last scores of {name!r} are made of: `curate score {self.loaded.path}` takes in what is measured now."
            )
        return current

    def _scores_hash(self) -> str:
        missing = 0 if self.result.measured else self.plan.missing
        return scores_hash(self.store, self.plan, self.sources, missing=missing)

    def _say(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.progress.say(note)


def _dataset_values(
    columns: Columns, of_heldout: Columns | None, wanted: Sequence[RequestedScore]
) -> list[DatasetValue]:
    """Of the rows that are scored, and of the held-out ones under names of their own."""
    from curate.workflow.score import compute_dataset_values

    values = compute_dataset_values(columns, wanted)
    return values if of_heldout is None else values + compute_dataset_values(of_heldout, wanted, prefix="heldout_")


def _null_is_known(wanted: Sequence[RequestedScore]) -> dict[str, str]:
    """For a score whose NULL is a value (such as first_learned_step of a row never learned) the SQL that is true there."""
    names = {want.score.name: want.name for want in wanted}
    known = {want.name: names.get(want.score.null_where or "") for want in wanted}
    return {name: f"{excuse} = 1" for name, excuse in known.items() if excuse}


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


def _check_scored(
    loaded: Loaded, store: Store, name: str, wanted: Sequence[RequestedScore], *, is_staged: bool
) -> None:
    """UsageError where the view `scored` of the recipe lacks a score. name: the recipe's in the store, or that of what is staged."""
    is_known = is_staged or any(recipe["name"] == name for recipe in store.recipes())
    columns = store.sql("SELECT * FROM scored LIMIT 0", recipe=name).columns if is_known else []
    if not is_known or not {want.name for want in wanted} <= set(columns):
        raise UsageError(
            f"Not every score of {loaded.name!r} is computed yet: `curate score {loaded.path}` does that, `curate run {loaded.path}` does all steps."
        )
