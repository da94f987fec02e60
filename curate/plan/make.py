"""What has to run: from the wanted scores back to measurements, passes, checkpoints, and the rows that are not measured yet.

    scores -> columns they need -> measurements that give these columns -> passes -> checkpoints -> missing rows

Nothing measured once is measured again: what a value depends on is its fingerprint (weights, tokenizer and template, engine and version,
measurement and version, its parameters), and a row that has a line under that fingerprint is done.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from curate.models.fingerprints import FingerprintCache
from curate.models.layouts import own_code_notes
from curate.plan.answers import KeptAnswers
from curate.plan.beta import beta_of, deviation_text
from curate.plan.bind import Binder, Place
from curate.plan.cost import AnswerTokens, weights_size, with_cost
from curate.plan.directions import Directions
from curate.plan.identity import Identity
from curate.plan.imported import imported_bindings
from curate.plan.kept import Kept
from curate.plan.lengths import RowLengths
from curate.plan.missing import Rows
from curate.plan.model_checks import check_models
from curate.plan.plan import Plan
from curate.plan.recorded import recorded_bindings, run_meant
from curate.plan.rendering import styles_of
from curate.plan.requests import check_checkpoints, requested_scores
from curate.plan.roles import find_roles
from curate.plan.servers import Ask, Servers, first_rows, of_addresses
from curate.plan.step import ORDER, Step, Task
from curate.plan.unused import unused_settings
from curate.store.openings import let_go

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.recipe.load import Loaded
    from curate.store import Store


def make_plan(
    loaded: Loaded, store: Store, sources: dict[str, list[str]], *, ask: Ask = "no", kept: Kept | None = None
) -> Plan:
    """What the recipe needs and does not have yet. sources: the names of its sources by role, already read into the store. ask: whether a server
    is asked which model it has, and whether that is remembered (servers.py). kept: what is known of models that are not there; None: they have to
    be.
    """
    recipe, train, kept = loaded.recipe, sources.get("train", []), kept or Kept()
    requested = requested_scores(loaded)
    cache = FingerprintCache(store.folder / "weights.json", slow=let_go)
    servers = Servers(loaded, store.folder, ask=ask, rows=first_rows(store, loaded, train))
    plan = Plan(requested, find_roles(loaded, cache, servers, kept))
    if recipe.kind == "preference":
        plan.beta = beta_of(recipe)
        plan.of_beta = deviation_text(requested, plan.beta)
    if not plan.roles.reference and not plan.roles.series:
        _bind_stored(loaded, store, plan, train)
        return plan
    check_checkpoints(requested, sum(checkpoint.step != 0 for checkpoint in plan.roles.series))
    names = [name for group in sources.values() for name in group]
    styles = styles_of(store, names, recipe.kind)
    identity = Identity(loaded, cache, servers=servers, styles=styles, store=store, kept=kept)
    plan.pool = functools.cache(
        lambda: store.row_ids_of(train or None, kind=recipe.kind, role="train" if train else None)
    )
    identity.pool = plan.pool
    planner = _Planner(loaded, store, plan, identity, sources)
    planner.bind()
    planner.group()
    planner.add_steps()
    plan.unused = unused_settings(loaded, plan)
    plan.chat_only = servers.chat_only
    plan.of_server, plan.doubts = [*servers.notes, *of_addresses(store, loaded)], servers.doubts
    plan.of_models = check_models(plan, identity.renderings, store, names) if kept.anew else []
    plan.of_models += own_code_notes(plan.roles.folders)
    return plan


def _bind_stored(loaded: Loaded, store: Store, plan: Plan, train: list[str]) -> None:
    """Without a model, scores read what a Recorder or an import has put into the store."""
    kind = loaded.recipe.kind
    plan.recorded = run_meant(loaded, store)
    if plan.recorded:
        plan.bindings = recorded_bindings(store, plan.recorded, plan.wanted, kind)
    else:
        plan.bindings = imported_bindings(store, plan.wanted, kind, train)


class _Planner:
    """The steps of a plan over models: columns are bound to tasks, tasks are grouped into passes, and a pass over a checkpoint is a step."""

    def __init__(self, loaded: Loaded, store: Store, plan: Plan, identity: Identity, sources: dict[str, list[str]]):
        self.loaded, self.recipe, self.store, self.plan, self.identity = loaded, loaded.recipe, store, plan, identity
        self.sources = [name for group in sources.values() for name in group]
        self.directions = Directions(loaded, store, plan.roles, identity, sources.get("train", []))
        plan.wanted = [self.directions.targets.over_groups(want) for want in plan.wanted]
        if any(want.need(text).role == "warmup" for want in plan.wanted for text in want.score.needs):
            plan.roles = replace(plan.roles, warmup=self.directions.warmup())
        self.binder = Binder(loaded, store, plan, identity, self.directions)
        self.tasks: dict[Place, dict[str, Task]] = {}

    def bind(self) -> None:
        """Bind what selections need (token counts, which cost no model run), then what scores need, then what is used where it is there anyway."""
        for column in self._token_counts():
            self.binder.bind(column, "", None)
        for want in self.plan.wanted:
            for text in want.score.needs:
                role, column = want.need(text)
                self.binder.bind(column, role, want.score.over)
        for want in self.plan.wanted:
            for text in want.score.optional:
                role, column = want.need(text)
                self.binder.bind(column, role, want.score.over, optional=True)
        self._bind_dataset_values()

    def _token_counts(self) -> tuple[str, ...]:
        """The columns of token counts; none where the tokenizer is a server's alone."""
        models = self.recipe.models
        if self.recipe.engine.sampler == "openai" and not (models.reference or models.checkpoints):
            return ()
        return ("prompt_tokens", "chosen_tokens" if self.recipe.kind == "preference" else "completion_tokens")

    def _bind_dataset_values(self) -> None:
        """What happens to be measured anyway is summarised too."""
        from curate.scores import DATASET_VALUES

        for value in DATASET_VALUES.values():
            if value.kind in ("any", self.recipe.kind):
                for text in value.needs:
                    role, _, column = text.rpartition(".")
                    self.binder.bind(column, role, value.over, optional=True)

    def group(self) -> None:
        """Group the tasks into passes: a backward pass over a checkpoint gives what a forward pass over it gives, apart from what is read off other
        texts than the rows themselves.
        """
        self.tasks = tasks = dict(self.binder.tasks)
        for path in [path for reads, path in tasks if reads == "backward"]:
            of_forward = tasks.pop(("forward", path), {})
            apart = {
                fingerprint: task
                for fingerprint, task in of_forward.items()
                if task.measurement.without_prompt or task.measurement.prompt_only
            }
            joined = {fingerprint: task for fingerprint, task in of_forward.items() if fingerprint not in apart}
            tasks["backward", path] = tasks["backward", path] | joined
            if apart:
                tasks["forward", path] = apart

    def add_steps(self) -> None:
        """Make every pass over a checkpoint a step, with the rows that it misses and what they cost."""
        self.plan.lengths = RowLengths(self.loaded, self.store, self.sources, self._tokens_tasks())
        self.rows = Rows(self.store, self.sources, self.recipe.kind, list(self._all_tasks()))
        self.answers, self.answer_tokens = KeptAnswers(self.store), AnswerTokens(self.store)
        self.speeds = self.store.speeds()
        for place in self._in_order():
            self.plan.steps.append(self._step(place))

    def _all_tasks(self) -> Iterator[Task]:
        for by_fingerprint in self.tasks.values():
            yield from by_fingerprint.values()

    def _tokens_tasks(self) -> dict[str, str]:
        """The fingerprint of the token counts of each tokenizer; "" where none are planned."""
        counts = {}
        for (reads, tokenizer), tasks in self.tasks.items():
            if reads == "tokens":
                of_prompts = (print for print, task in tasks.items() if "prompt_tokens" in task.measurement.columns)
                counts[tokenizer] = next(of_prompts, "")
        return counts

    def _in_order(self) -> list[Place]:
        """The passes in the order of ORDER, each over the series, the reference, the policy and the warmed-up model, in that order."""
        roles = self.plan.roles
        alone = [checkpoint for checkpoint in (roles.reference, roles.policy, roles.warmup) if checkpoint]
        paths = list(dict.fromkeys(checkpoint.path for checkpoint in (*roles.series, *alone)))
        order = {path: number for number, path in enumerate(paths)}
        return sorted(self.tasks, key=lambda place: (ORDER.index(place[0]), order.get(place[1], -1)))

    def _step(self, place: Place) -> Step:
        reads, tasks = place[0], tuple(self.tasks[place].values())
        checkpoint = self.binder.checkpoints[place]
        key = _speed_key(reads, checkpoint, tasks)
        step = Step(reads, checkpoint, tasks, self.rows.n, self.rows.blocks(tasks, reads), key)
        if not step.missing:
            return step
        if reads == "direction" and self.identity.kept.anew:
            self.directions.check_optimizers(step)
            step = replace(step, ahead=self.directions.ahead(step))
            self.plan.directions = self.directions
        if reads == "sample":
            step = self._with_answers(step)
        return self._with_cost(step)

    def _with_answers(self, step: Step) -> Step:
        """The step with what it takes of the answers that are kept."""
        sampling = self.recipe.sampling
        need = self.answers.need(step.blocks, samples=sampling.most, greedy=sampling.temperature == 0)
        return replace(step, kept=need.answers, graded=need.graded, draws=need.draws)

    def _with_cost(self, step: Step) -> Step:
        assert self.plan.lengths is not None
        lengths = self.plan.lengths.of(self.identity.tokenizer(step.checkpoint), step.checkpoint)
        sampled = step.reads == "sample"
        answer_tokens = self.answer_tokens.mean(step) if sampled else None
        alike = step.key if sampled else step.key.rpartition("/")[0]  # the same model, other measurements
        places = self.rows.indices(step.tasks, lengths)
        speed = self.speeds.of(step.key, alike=alike)
        return with_cost(step, self.loaded, speed, lengths, places, answer_tokens)


def _speed_key(reads: str, checkpoint: Checkpoint, tasks: tuple[Task, ...]) -> str:
    """What a pass's speed is remembered under: the pass, the engine, the model's size, and what is read off it."""
    engine = tasks[0].measured.engine
    if engine.startswith("openai "):  # a server is as fast with its next policy
        engine = engine.rpartition(" ")[0]
    key = f"{reads}/{engine}/{weights_size(checkpoint)}"
    if reads == "sample":
        return key
    names = [f"{task.measurement.name} {task.measured.params.get('parameters', '')}".strip() for task in tasks]
    return f"{key}/{','.join(sorted(names))}"  # a backward pass over all parameters, or hidden states, take longer
