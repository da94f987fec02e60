"""What has to run: from the wanted scores back to measurements, passes, checkpoints, and the rows that are not measured yet.

    scores -> columns they need -> measurements that give these columns -> passes -> subjects (models, checkpoints) -> missing rows

Nothing measured once is measured again: what a value depends on is its fingerprint (weights, tokenizer and template, engine and version,
measurement and version, its parameters), and a row that has a line under that fingerprint is done.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from curate.answers import KeptAnswers
from curate.console import span, table
from curate.cost import AnswerTokens, step_line, weights_size, with_cost
from curate.directions import Directions
from curate.dpo import beta_of, deviation_text
from curate.errors import UsageError
from curate.identity import Identity, Task
from curate.imported import imported_uses
from curate.kept import Kept
from curate.lengths import RowLengths
from curate.missing import Block, Rows
from curate.model_checks import check_models
from curate.models.checkpoints import Subject
from curate.models.fingerprints import FingerprintCache
from curate.recordings import PREFIX, recorded_runs, recorded_uses, run_meant
from curate.rendering import styles_of
from curate.servers import Ask, Servers, first_rows, of_addresses
from curate.store.database import let_go
from curate.subjects import Subjects, find_subjects
from curate.unused import unused_settings
from curate.wanted import Wanted, check_checkpoints, wanted_scores

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store import Place, Store

ORDER = ("tokens", "sample", "forward", "neighbours", "backward", "direction")


@dataclass(frozen=True)
class Step:
    """One pass over one subject: everything that is read off it, and the rows that still miss something.

    tokens, seconds: an estimate for what is missing; seconds is None where nothing is known, `rough` where no run here has been timed.
    ahead: what comes before the rows, in rows run forward: gradients of directions, a warm-up. unmeasurable: missing rows that are known to get
    NULL, being too long for instance; perhaps_unmeasurable: those that seem so by their characters. kept: sampled answers that are taken again;
    graded: missing rows that need no others; draws: answers to draw, at most.
    """

    reads: str
    subject: Subject
    tasks: tuple[Task, ...]
    rows: int
    blocks: tuple[Block, ...]
    key: str
    tokens: int = 0
    seconds: float | None = None
    rough: bool = False
    ahead: int = 0
    unmeasurable: int = 0
    perhaps_unmeasurable: int = 0
    kept: int = 0
    graded: int = 0
    draws: int = 0

    at_most: bool = False

    @property
    def is_served(self) -> bool:
        """Whether a server does it."""
        return self.tasks[0].measured.engine.startswith("openai ")

    @property
    def missing(self) -> int:
        """Rows without a line, those among them that will get one of NULLs."""
        return sum(len(rows) for _, rows, _ in self.blocks)

    @property
    def to_measure(self) -> int:
        return self.missing - self.unmeasurable - self.graded


@dataclass(repr=False)
class Plan:
    """The steps in the order they run, and for every (role, column, over) the fingerprints that scores read.

    places: of every fingerprint the (run, checkpoint, step) of the models that it is of: several where their weights are the same, in the order of
    `uses`. recorded: the recorded training run that they are read from, if any. pool: the rows that neighbours are taken from. of_lengths:
    what is said of rows that are too long, of_references: of those that cannot be graded, of_models: of the models, their chat templates above all.
    doubts: whether a server's model is the recipe's, which --quiet does not hide.
    lengths: of the recipe's rows, None where no model is run. beta: DPO's, of pairs; of_beta: what is said where scores take another one.
    """

    wanted: list[Wanted]
    subjects: Subjects
    steps: list[Step] = field(default_factory=list)
    uses: dict[tuple[str, str, str | None], list[str]] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    recorded: str | None = None
    directions: Directions | None = None
    pool: list[str] = field(default_factory=list)
    of_models: list[str] = field(default_factory=list)
    of_lengths: list[str] = field(default_factory=list)
    lengths: RowLengths | None = None
    of_server: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    of_references: list[str] = field(default_factory=list)
    beta: float | None = None
    of_beta: list[str] = field(default_factory=list)
    chat_only: bool = False
    unused: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return sum(step.missing for step in self.steps)

    def __repr__(self) -> str:
        return self.text()

    def text(self) -> str:
        if not self.steps:
            why = (
                f"the scores are read from the recorded run {self.recorded}"
                if self.recorded
                else "no score of this recipe needs a model"
            )
            lines = [f"Nothing to measure: {why}."]
        else:
            head = ("pass", "model", "measurements", "rows", "missing", "tokens", "time")
            lines = [table([step_line(step) for step in self.steps], head=head)]
            known = [s.seconds for s in self.steps if s.to_measure and s.seconds is not None]
            if not any(s.to_measure or s.graded for s in self.steps):
                lines.append("Everything is measured already.")
            elif not known and not any(s.to_measure for s in self.steps):
                lines.append("Everything is sampled and measured already.")
            elif known:
                partly = (
                    ""
                    if len(known) == sum(1 for s in self.steps if s.to_measure)
                    else " for the passes that could be estimated"
                )
                rough = (
                    ", a rough guess before anything ran here"
                    if any(s.rough for s in self.steps if s.to_measure)
                    else ""
                )
                lines.append(f"About {span(sum(known))} in all{partly}{rough}.")
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """What a user may not expect: which checkpoints were left out, which no score asks for, which rows a model has no positions for."""
        found = self.left_out()
        run = [s for s in self.subjects.series if s.step != 0]
        measured = {task.measured.model_fingerprint for step in self.steps for task in step.tasks}
        idle = [s for s in run if s.fingerprint not in measured]
        if idle and self.steps:
            names = ", ".join(s.checkpoint for s in idle[:3]) + (", …" if len(idle) > 3 else "")
            plain = self.subjects.plain
            of = f"what it measures is of {plain.label} alone" if plain else "what it measures is of one model"
            found.append(
                f"{len(idle)} of {len(run)} checkpoints are not measured ({names}): no score of this recipe is over checkpoints; "
                f"{of}. `curate scores` says which are (needs … over checkpoints)."
            )
        return [
            *self.doubts,
            *self.of_server,
            *found,
            *self.of_models,
            *self.of_answers(),
            *self.of_references,
            *self.of_lengths,
            *self.of_beta,
            *self.unused,
        ]

    def of_answers(self) -> list[str]:
        """A line where answers that were sampled before are taken again."""
        kept, draws = sum(s.kept for s in self.steps), sum(s.draws for s in self.steps if s.kept)
        rest = f"at most {draws:,} more are sampled" if draws else "none has to be sampled"
        return [f"{kept:,} sampled answers are kept and graded anew; {rest}."] if kept else []

    def left_out(self) -> list[str]:
        """A line for every checkpoint that models.on_broken_checkpoint: skip left out."""
        return [f"Left out: {message}" for message in self.subjects.skipped]

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": [
                {
                    "pass": s.reads,
                    "model": s.subject.label,
                    "measurements": [t.measurement.name for t in s.tasks],
                    "fingerprints": [t.fingerprint for t in s.tasks],
                    "rows": s.rows,
                    "missing": s.to_measure,
                    "unmeasurable": s.unmeasurable,
                    "answers_kept": s.kept,
                    "graded_anew": s.graded,
                    "tokens": s.tokens,
                    "seconds": s.seconds,
                }
                for s in self.steps
            ],
            "missing": sum(s.to_measure for s in self.steps),
            "notes": self.notes(),
        }


def make_plan(
    loaded: Loaded, store: Store, sources: dict[str, list[str]], *, ask: Ask = "no", kept: Kept | None = None
) -> Plan:
    """What the recipe needs and does not have yet. sources: the names of its sources by role, already read into the store. ask: whether a server
    is asked which model it has, and whether that is remembered (servers.py). kept: what is known of models that are not there; None: they have to
    be.
    """
    from curate.measurements import MEASUREMENTS, providers

    recipe = loaded.recipe
    wanted = wanted_scores(loaded)
    cache = FingerprintCache(store.folder / "weights.json", slow=let_go)
    train = sources.get("train", [])
    kept = kept or Kept()
    servers = Servers(loaded, store.folder, ask=ask, rows=first_rows(store, loaded, train))
    subjects = find_subjects(loaded, cache, servers, kept)
    plan = Plan(wanted, subjects)
    if recipe.kind == "preference":
        plan.beta = beta_of(recipe)
        plan.of_beta = deviation_text(wanted, plan.beta)
    if not subjects.reference and not subjects.series:
        plan.recorded = run_meant(loaded, store)
        plan.uses = (
            recorded_uses(store, plan.recorded, wanted, recipe.kind)
            if plan.recorded
            else imported_uses(store, wanted, recipe.kind, sources.get("train", []))
        )
        return plan

    check_checkpoints(wanted, sum(s.step != 0 for s in subjects.series))
    plan.pool = store.row_ids_of(train or None, kind=recipe.kind, role="train" if train else None)
    names = [name for group in sources.values() for name in group]
    styles = styles_of(store, names, recipe.kind)
    identity = Identity(loaded, cache, servers=servers, styles=styles, store=store, kept=kept)
    identity.pool = plan.pool
    directions = identity.directions = Directions(loaded, store, subjects, identity, train)
    wanted = plan.wanted = [directions.targets.over_groups(want) for want in wanted]
    if any(want.need(text).role == "warmup" for want in wanted for text in want.score.needs):
        subjects = plan.subjects = replace(subjects, warmup=directions.warmup())
    tasks: dict[tuple[str, str], dict[str, Task]] = {}  # (pass, subject's path or its tokenizer) -> fingerprint -> task
    lone: dict[tuple[str, str], Subject] = {}
    planned: set[str] = set()

    def need(column: str, role: str, over: str | None, *, optional: bool = False) -> None:
        key = (role, column, over)
        if role == "row" or key in plan.uses:
            return
        measurement = providers(column, recipe.kind)
        if measurement is None:
            if optional:
                return
            near = difflib.get_close_matches(
                column, [c for m in MEASUREMENTS.values() for c in m.columns if m.kind in (recipe.kind, "any")], 1
            )
            raise UsageError(
                f"A score needs the column {column}, which nothing measures on {recipe.kind} rows{f'; did you mean {near[0]}?' if near else '.'}"
            )
        measurement = directions.targets.in_groups(measurement)
        if measurement.perturbed:
            if recipe.sampling.perturb is None and optional:
                return
            if recipe.sampling.perturb is None:
                raise UsageError(
                    f"A score needs {column}, which is measured on perturbations of the rows: name the function that makes them, "
                    "`--set sampling.perturb=package.module:function`."
                )
            optional = False  # who names the function wants its perturbations measured
        if optional and all(t.measurement.name != measurement.name for found in tasks.values() for t in found.values()):
            return  # used where it is measured anyway, never a reason to measure, nor to ask a server
        who = subjects.of(role, over) if not (optional and role == "policy" and subjects.policy is None) else ()
        if measurement.direction is not None and not who and subjects.plain:
            who = (subjects.plain,)  # a series of one
        if not who:
            if optional:
                return
            where = (
                "of a training run: set models.checkpoints"
                if over == "checkpoints"
                else "of a model: set models.reference"
            )
            taken = next(reversed(recorded_runs(store)), None) if over == "checkpoints" else None
            recording = f"--set models.checkpoints={PREFIX}{taken} --set models.reference=null"
            raise UsageError(
                f"A score needs {column} {where} in the recipe."
                + (f" Or take what was recorded: `{recording}`." if taken else "")
            )
        if measurement.reads in ("backward", "direction") and recipe.gradients.parameters == "lora":
            whole = next((s for s in who if s.base is None), None)
            if whole is not None and optional:
                return
            if whole is not None:
                raise UsageError(
                    f"gradients.parameters is lora, but {whole.label} is a whole model, not a LoRA adapter. Name an adapter's folder "
                    "(one saved before the first step will do), or take the gradients over all parameters: `--set gradients.parameters=all`."
                )
        if (
            measurement.direction is not None
            and not measurement.direction.cosine
            and recipe.kind == "preference"
            and any(directions.has_margins(s) for s in who)
        ):
            need("chosen_logp", "", None)  # the reference's: margins are against it
        found = [(subject, identity.task(measurement, subject)) for subject in who]
        if optional and not all(task.fingerprint in planned for _, task in found):
            return
        for subject, task in found:
            of_tokens = measurement.reads == "tokens"  # whoever has the same tokenizer has the same tokens
            places = plan.places.setdefault(task.fingerprint, [])
            if not of_tokens and (place := (subject.run, subject.checkpoint, subject.step)) not in places:
                places.append(place)
            if task.fingerprint in planned:  # for another column, or of a checkpoint with the same weights
                continue
            at = (measurement.reads, identity.tokenizer(subject) if of_tokens else subject.path)
            tasks.setdefault(at, {})[task.fingerprint] = task
            lone.setdefault(at, subject)
            planned.add(task.fingerprint)
        plan.uses[key] = [task.fingerprint for _, task in found]

    server_alone = recipe.engine.sampler == "openai" and not (recipe.models.reference or recipe.models.checkpoints)
    if not server_alone:  # token counts are wanted by every selection, and cost no model run
        need("prompt_tokens", "", None)
        for text in ("chosen_tokens",) if recipe.kind == "preference" else ("completion_tokens",):
            need(text, "", None)
    for want in wanted:
        for text in want.score.needs:
            role, column = want.need(text)
            need(column, role, want.score.over)
    for want in wanted:
        for text in want.score.optional:
            role, column = want.need(text)
            need(column, role, want.score.over, optional=True)
    from curate.scores import DATASET_VALUES

    for value in DATASET_VALUES.values():  # what happens to be measured anyway is summarised too
        if value.kind in ("any", recipe.kind):
            for text in value.needs:
                role, _, column = text.rpartition(".")
                need(column, role, value.over, optional=True)

    order: dict[str, int] = {}
    for subject in (*subjects.series, *(s for s in (subjects.reference, subjects.policy, subjects.warmup) if s)):
        order.setdefault(subject.path, len(order))
    rows = Rows(store, names, recipe.kind, [task for found in tasks.values() for task in found.values()])
    for path in [path for reads, path in tasks if reads == "backward"]:  # which gives the forward's values too
        of_forward = tasks.pop(("forward", path), {})
        apart = {key: t for key, t in of_forward.items() if t.measurement.without_prompt or t.measurement.prompt_only}
        tasks["backward", path] |= {key: task for key, task in of_forward.items() if key not in apart}
        if apart:
            tasks["forward", path] = apart
    counts = {
        place: next((print for print, task in found.items() if "prompt_tokens" in task.measurement.columns), "")
        for (reads, place), found in tasks.items()
        if reads == "tokens"
    }
    plan.lengths = RowLengths(loaded, store, names, counts)
    answers, answer_tokens, speeds = KeptAnswers(store), AnswerTokens(store), store.speeds()
    for reads, path in sorted(tasks, key=lambda place: (ORDER.index(place[0]), order.get(place[1], -1))):
        step = _step(reads, lone[reads, path], tuple(tasks[reads, path].values()), rows)
        if reads == "direction" and step.missing and kept.anew:
            directions.check_optimizers(step)
            step, plan.directions = replace(step, ahead=directions.ahead(step)), directions
        if step.missing and reads == "sample":
            step = _with_answers(step, loaded, answers)
        if step.missing:
            lengths = plan.lengths.of(identity.tokenizer(step.subject), step.subject)
            each = answer_tokens.mean(step) if reads == "sample" else None
            alike = step.key if reads == "sample" else step.key.rpartition("/")[0]  # the same model, other measurements
            at = rows.places(step.tasks, lengths)
            step = with_cost(step, loaded, speeds.of(step.key, alike=alike), lengths, at, each)
        plan.steps.append(step)
    plan.unused = unused_settings(loaded, plan)
    plan.chat_only = servers.chat_only
    plan.of_server, plan.doubts = [*servers.notes, *of_addresses(store, loaded)], servers.doubts
    plan.of_models = check_models(plan, identity.renderings, store, names) if kept.anew else []
    return plan


def _step(reads: str, subject: Subject, tasks: tuple[Task, ...], rows: Rows) -> Step:
    engine = tasks[0].measured.engine
    if engine.startswith("openai "):  # a server is as fast with its next policy
        engine = engine.rpartition(" ")[0]
    key = f"{reads}/{engine}/{weights_size(subject)}"
    if reads != "sample":  # a backward pass over all parameters, or hidden states, take longer
        key += "/" + ",".join(
            sorted(f"{t.measurement.name} {t.measured.params.get('parameters', '')}".strip() for t in tasks)
        )
    return Step(reads, subject, tasks, rows.n, rows.blocks(tasks, reads), key)


def _with_answers(step: Step, loaded: Loaded, answers: KeptAnswers) -> Step:
    """The step with what it takes of the answers that are kept."""
    sampling = loaded.recipe.sampling
    need = answers.need(step.blocks, samples=sampling.samples, greedy=sampling.temperature == 0)
    return replace(step, kept=need.answers, graded=need.graded, draws=need.draws)
