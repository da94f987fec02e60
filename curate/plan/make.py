"""What has to run: from the wanted scores back to measurements, passes, checkpoints, and the rows that are not measured yet.

    scores -> columns they need -> measurements that give these columns -> passes -> checkpoints -> missing rows

Nothing measured once is measured again: what a value depends on is its fingerprint (weights, tokenizer and template, engine and version,
measurement and version, its parameters), and a row that has a line under that fingerprint is done.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING

from curate.errors import UsageError
from curate.models.checkpoints import Checkpoint
from curate.models.fingerprints import FingerprintCache
from curate.plan.answers import KeptAnswers
from curate.plan.beta import beta_of, deviation_text
from curate.plan.cost import AnswerTokens, weights_size, with_cost
from curate.plan.directions import Directions
from curate.plan.identity import Identity
from curate.plan.imported import imported_uses
from curate.plan.kept import Kept
from curate.plan.lengths import RowLengths
from curate.plan.missing import Rows
from curate.plan.model_checks import check_models
from curate.plan.plan import Plan
from curate.plan.recorded import PREFIX, recorded_runs, recorded_uses, run_meant
from curate.plan.rendering import styles_of
from curate.plan.requests import check_checkpoints, requested_scores
from curate.plan.roles import find_roles
from curate.plan.servers import Ask, Servers, first_rows, of_addresses
from curate.plan.step import ORDER, Step, Task
from curate.plan.unused import unused_settings
from curate.store.database import let_go

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store import Store


def make_plan(
    loaded: Loaded, store: Store, sources: dict[str, list[str]], *, ask: Ask = "no", kept: Kept | None = None
) -> Plan:
    """What the recipe needs and does not have yet. sources: the names of its sources by role, already read into the store. ask: whether a server
    is asked which model it has, and whether that is remembered (servers.py). kept: what is known of models that are not there; None: they have to
    be.
    """
    from curate.measurements import MEASUREMENTS, providers

    recipe = loaded.recipe
    wanted = requested_scores(loaded)
    cache = FingerprintCache(store.folder / "weights.json", slow=let_go)
    train = sources.get("train", [])
    kept = kept or Kept()
    servers = Servers(loaded, store.folder, ask=ask, rows=first_rows(store, loaded, train))
    roles = find_roles(loaded, cache, servers, kept)
    plan = Plan(wanted, roles)
    if recipe.kind == "preference":
        plan.beta = beta_of(recipe)
        plan.of_beta = deviation_text(wanted, plan.beta)
    if not roles.reference and not roles.series:
        plan.recorded = run_meant(loaded, store)
        plan.bindings = (
            recorded_uses(store, plan.recorded, wanted, recipe.kind)
            if plan.recorded
            else imported_uses(store, wanted, recipe.kind, sources.get("train", []))
        )
        return plan

    check_checkpoints(wanted, sum(s.step != 0 for s in roles.series))
    plan.pool = store.row_ids_of(train or None, kind=recipe.kind, role="train" if train else None)
    names = [name for group in sources.values() for name in group]
    styles = styles_of(store, names, recipe.kind)
    identity = Identity(loaded, cache, servers=servers, styles=styles, store=store, kept=kept)
    identity.pool = plan.pool
    directions = Directions(loaded, store, roles, identity, train)
    wanted = plan.wanted = [directions.targets.over_groups(want) for want in wanted]
    if any(want.need(text).role == "warmup" for want in wanted for text in want.score.needs):
        roles = plan.roles = replace(roles, warmup=directions.warmup())
    tasks: dict[
        tuple[str, str], dict[str, Task]
    ] = {}  # (pass, checkpoint's path or its tokenizer) -> fingerprint -> task
    lone: dict[tuple[str, str], Checkpoint] = {}
    planned: set[str] = set()

    def need(column: str, role: str, over: str | None, *, optional: bool = False) -> None:
        key = (role, column, over)
        if role == "row" or key in plan.bindings:
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
        who = roles.of(role, over) if not (optional and role == "policy" and roles.policy is None) else ()
        if measurement.direction is not None and not who and roles.primary:
            who = (roles.primary,)  # a series of one
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
        along = measurement.direction
        found = [(s, identity.task(measurement, s, directions.identity(along, s) if along else None)) for s in who]
        if optional and not all(task.fingerprint in planned for _, task in found):
            return
        for checkpoint, task in found:
            of_tokens = measurement.reads == "tokens"  # whoever has the same tokenizer has the same tokens
            places = plan.labels.setdefault(task.fingerprint, [])
            if not of_tokens and (place := (checkpoint.run, checkpoint.checkpoint, checkpoint.step)) not in places:
                places.append(place)
            if task.fingerprint in planned:  # for another column, or of a checkpoint with the same weights
                continue
            at = (measurement.reads, identity.tokenizer(checkpoint) if of_tokens else checkpoint.path)
            tasks.setdefault(at, {})[task.fingerprint] = task
            lone.setdefault(at, checkpoint)
            planned.add(task.fingerprint)
        plan.bindings[key] = [task.fingerprint for _, task in found]

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
    for checkpoint in (*roles.series, *(s for s in (roles.reference, roles.policy, roles.warmup) if s)):
        order.setdefault(checkpoint.path, len(order))
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
            lengths = plan.lengths.of(identity.tokenizer(step.checkpoint), step.checkpoint)
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


def _step(reads: str, checkpoint: Checkpoint, tasks: tuple[Task, ...], rows: Rows) -> Step:
    engine = tasks[0].measured.engine
    if engine.startswith("openai "):  # a server is as fast with its next policy
        engine = engine.rpartition(" ")[0]
    key = f"{reads}/{engine}/{weights_size(checkpoint)}"
    if reads != "sample":  # a backward pass over all parameters, or hidden states, take longer
        key += "/" + ",".join(
            sorted(f"{t.measurement.name} {t.measured.params.get('parameters', '')}".strip() for t in tasks)
        )
    return Step(reads, checkpoint, tasks, rows.n, rows.blocks(tasks, reads), key)


def _with_answers(step: Step, loaded: Loaded, answers: KeptAnswers) -> Step:
    """The step with what it takes of the answers that are kept."""
    sampling = loaded.recipe.sampling
    need = answers.need(step.blocks, samples=sampling.samples, greedy=sampling.temperature == 0)
    return replace(step, kept=need.answers, graded=need.graded, draws=need.draws)
