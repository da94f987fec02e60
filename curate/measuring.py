"""Running a plan's passes: rows in, shards out. One engine serves a whole series of checkpoints; each shard is kept as soon as it is done.

Killed at any moment, the same command goes on: at most the shard under way is measured again, with the same rows and the same seeds.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.console import Progress
from curate.encodings import Encodings
from curate.errors import ModelError
from curate.measurements.perturbations import perturbation
from curate.plan.answers import KeptAnswers, by_prompt, padded
from curate.plan.embeddings import check_ids, embedding_rows
from curate.plan.identity import few_shot_text
from curate.plan.plan import Plan
from curate.plan.rendering import LOOKED_AT, lost_text
from curate.plan.row_names import named_rows
from curate.plan.servers import expected
from curate.plan.step import Step
from curate.rows import Example, Row

if TYPE_CHECKING:
    from curate.measurements.accuracy import Graded
    from curate.models.checkpoints import Subject
    from curate.plan.step import Task
    from curate.recipe.load import Loaded
    from curate.store import Store

TEXT = np.dtypes.StringDType(na_object=None)  # text even where all of it is NULL
INGEST_EVERY = 5.0  # seconds: how long finished shards may wait until readers see them


def measure(loaded: Loaded, store: Store, plan: Plan, progress: Progress) -> dict[str, int]:
    """Run every step that misses rows, inside `store.measuring()`. Returns how many rows each pass measured, and what truncation touched."""
    counts: dict[str, int] = {}
    encodings = Encodings()
    with ExitStack() as engines:
        runner: Runner | None = None
        to_do = [step for step in plan.steps if step.missing]
        for step, following in zip(to_do, [*to_do[1:], None], strict=True):
            if runner is None or runner.reads != step.reads:
                engines.close()  # one engine at a time: its memory is free before the next one starts
                subjects = [s.subject for s in to_do if s.reads == step.reads]
                runner = engines.enter_context(_runner(step.reads, loaded, progress, subjects, store, plan))
                runner.encodings = encodings
            _run_step(step, runner, store, progress, following)
            for name, n in ((step.reads, step.missing - step.graded), ("kept answers graded anew", step.graded)):
                if n:
                    counts[name] = counts.get(name, 0) + n
    return counts


def trial(loaded: Loaded, step: Step, rows: Sequence[Row]) -> list[Any]:
    """Turn rows into tokens as the step will, and raise what it would raise. Returns the prompts that would be sampled, for a step that samples."""
    quiet = Progress(quiet=True)
    if step.reads != "sample":
        runner = Runner(loaded, quiet)
        runner.use(step)
        runner._encode(list(rows))
        return []
    sampler = SampleRunner(loaded, quiet)
    Runner.use(sampler, step)
    prompts = [sampler._prompt(row, row.row_id) for row in rows]
    return [prompt for prompt in prompts if prompt is not None]


def _run_step(step: Step, runner: Runner, store: Store, progress: Progress, following: Step | None) -> None:
    runner.use(step)
    if (
        following is not None
        and following.subject.path != step.subject.path
        and following.to_measure
        and following.reads != "tokens"
    ):
        _read_ahead(Path(following.subject.path))
    title = f"{step.reads} {step.subject.label}" if step.reads != "tokens" else "tokens"
    waiting = time.monotonic()
    with progress.bar(title, step.rows, done=step.rows - step.missing) as count:
        for number, row_ids, tasks in step.blocks:
            rows = [row for row in store.iter_rows(row_ids) if row is not None]
            started = time.perf_counter()
            runner.tasks, runner.starting = tasks, 0.0
            columns, samples, tokens = runner.run(rows, row_ids, [task.measurement for task in tasks])
            seconds = time.perf_counter() - started - runner.starting
            for task in tasks:
                names = [*task.measurement.columns, *runner.extra_columns]
                mine = {name: columns[name] for name in names if name in columns}
                store.write_shard(task.measured, number, row_ids, mine, (samples or {}).get(task.measurement.name))
            if tokens:
                store.log_throughput(step.key, tokens, seconds)
            count(len(row_ids))
            if time.monotonic() - waiting > INGEST_EVERY:
                store.ingest()
                waiting = time.monotonic()
    store.ingest()
    for note in runner.notes():
        progress.say(note)


def _read_ahead(folder: Path) -> None:
    """Bring the next checkpoint's weights from the disk into the system's file cache while this one computes."""

    def read() -> None:
        for file in sorted(folder.glob("*.safetensors")):
            with (
                suppress(OSError),
                file.open("rb", buffering=0) as opened,
            ):  # who loads them says what is wrong with them
                while opened.read(1 << 24):
                    pass

    threading.Thread(target=read, daemon=True, name="read-ahead").start()


class Runner:
    """One kind of pass with its engine. run() -> (columns, measurement -> samples a row or None, tokens it cost)."""

    reads = ""
    extra_columns: tuple[str, ...] = ()
    subjects: Sequence[Subject] = ()  # all that are to come
    tasks: Sequence[Task] = ()  # what the rows of the next run() miss
    chat = False  # whether rows of plain text are rendered as messages
    embeddings: int | None = None  # rows of the embedding table
    starting = 0.0  # seconds of it that went into starting an engine

    def __init__(self, loaded: Loaded, progress: Progress):
        self.loaded, self.recipe, self.progress = loaded, loaded.recipe, progress
        self.encodings = Encodings()
        self._tokenizers: dict[str, Any] = {}
        self._tokenizer_id = ""

    def use(self, step: Step) -> None:
        """Get ready for a step's subject."""
        self.tokenizer = self._tokenizer(step)
        self.chat = bool(step.tasks[0].measured.params.get("chat"))  # as its values are known
        counts_only = self.tokenizer is None or step.reads == "tokens"  # no model of ours is run on the ids
        self.embeddings = None if counts_only else embedding_rows(step.subject)

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, list[Any]] | None, int]:
        raise AssertionError(self.reads)

    def notes(self) -> list[str]:
        return []

    def close(self) -> None:
        pass

    def _tokenizer(self, step: Step) -> Any:
        from curate.passes.tokens import load_tokenizer

        if not Path(step.subject.home).is_dir():
            return None
        self._tokenizer_id = str(
            step.tasks[0].measured.params["tokenizer"]
        )  # checkpoints have the same one, most often
        if self._tokenizer_id not in self._tokenizers:
            self._tokenizers = {self._tokenizer_id: load_tokenizer(step.subject.tokenizer)}
        return self._tokenizers[self._tokenizer_id]

    def _limits(self) -> Any:
        from curate.passes.tokens import Limits

        return Limits(self.recipe.tokens.max_length, self.recipe.tokens.truncation, self.chat)

    def _encode(self, rows: list[Row]) -> list[Any]:
        from curate.passes.tokens import encode

        limits = self._limits()
        how = (self._tokenizer_id, limits)
        found = [self.encodings.of(how, row.row_id, partial(encode, row, self.tokenizer, limits)) for row in rows]
        if self.embeddings is not None:
            check_ids(found, self.embeddings, self.tokenizer)
        return found


class TokensRunner(Runner):
    """Token counts, edit distance, and what truncation does: no model is run."""

    reads = "tokens"
    extra_columns = ("token_problem",)

    def __init__(self, loaded: Loaded, progress: Progress):
        super().__init__(loaded, progress)
        self.left_out: Counter[str] = Counter()
        self.name = ""
        self.truncated = self.problems = self.seen = self.alike = 0

    def use(self, step: Step) -> None:
        super().use(step)
        self.name = step.subject.label

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.measurements import measure_tokens

        encoded = self._encode(rows)
        columns: dict[str, Any] = dict(measure_tokens(encoded, measurements))
        columns["token_problem"] = np.array([e.problem for e in encoded], TEXT)
        self.seen += len(encoded)
        self.truncated += sum(e.truncated for e in encoded)
        self.problems += sum(e.problem is not None for e in encoded)
        self.alike += sum(getattr(e, "cut_alike", False) for e in encoded)
        self.left_out.update(who for e in encoded for who in e.left_out)
        return columns, None, int(np.nansum([np.nansum(v) for k, v in columns.items() if k.endswith("_tokens")]))

    def notes(self) -> list[str]:
        limit, policy = self.recipe.tokens.max_length, self.recipe.tokens.truncation
        found = []
        if self.truncated:
            found.append(
                f"{self.truncated:,} of {self.seen:,} rows ({self.truncated / self.seen:.0%}) are longer than max_length {limit}; "
                f"truncation {policy} {'leaves them unmeasured' if policy == 'drop' else 'cuts them'}."
            )
        if self.problems:
            found.append(
                f"{self.problems:,} rows cannot be measured; the column token_problem of `scored` says why. A rule of `select` that uses their "
                "scores treats them by select.unknown; `where: token_problem IS NULL` leaves them out whatever the rules use."
            )
        if self.alike:
            found.append(
                f"{self.alike:,} pairs are cut where their responses are still the same: their gap of 0 says nothing. Raise tokens.max_length, or "
                "leave them out."
            )
        if self.seen > LOOKED_AT:  # else the plan has said it
            found += lost_text(self.left_out, self.seen, self.seen, self.name)
        self.truncated = self.problems = self.seen = self.alike = 0
        self.left_out.clear()
        return found


class ForwardRunner(Runner):
    """One torch model for all subjects, weights swapped in place; every measurement is read off the same forward pass."""

    reads = "forward"
    dtype: str | None = None  # None: the engine's

    def __init__(self, loaded: Loaded, progress: Progress):
        super().__init__(loaded, progress)
        self.model: Any = None

    def use(self, step: Step) -> None:
        from curate.passes.forward import load_model

        super().use(step)
        if self.model is not None:
            try:
                self.model.use(step.subject.path, base=step.subject.base)
                return
            except ModelError:  # another architecture: its own model
                self.close()
        engine, subject = self.recipe.engine, step.subject
        dtype = self.dtype or engine.dtype
        self.model = load_model(subject.path, base=subject.base, dtype=dtype, device=engine.device)

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.passes import forward

        encoded = self._encode(rows)
        columns = forward.measure(self.model, encoded, measurements, token_budget=self.recipe.engine.token_budget)
        return columns, None, forward.tokens_to_run(encoded, without_prompt=any(m.without_prompt for m in measurements))

    def close(self) -> None:
        if self.model is not None:
            self.model.close()
            self.model = None


class NeighboursRunner(ForwardRunner):
    """The forward pass over rows with their nearest other training examples before the prompt: as many as fit into max_length."""

    reads = "neighbours"

    def __init__(self, loaded: Loaded, progress: Progress, store: Store, plan: Plan):
        from curate.passes.nearest import Neighbours

        super().__init__(loaded, progress)
        self.neighbours = Neighbours(plan.pool, list(store.iter_rows(plan.pool)))
        self.lonely = self.seen = 0

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.passes import forward

        how = ("after its neighbours", self._tokenizer_id, self.chat)
        found = [
            self.encodings.of(how, row_id, partial(self._after, row, row_id))
            for row, row_id in zip(rows, row_ids, strict=True)
        ]
        at = [i for i, encoded in enumerate(found) if encoded is not None]
        encoded = [found[i] for i in at]
        measured = forward.measure(self.model, encoded, measurements, token_budget=self.recipe.engine.token_budget)
        columns = {name: np.full(len(rows), np.nan) for name in measured}
        for name, values in measured.items():
            columns[name][at] = values
        self.seen += len(rows)
        self.lonely += len(rows) - len(at)
        return columns, None, forward.tokens_to_run(encoded)

    def _after(self, row: Row, row_id: str) -> Any:
        """The row encoded after its neighbours, the nearest last; None where not even one fits, or there is none."""
        from curate.passes.tokens import Limits, after_examples, as_chat, encode

        near = self.neighbours.nearest(row_id, row) if isinstance(row, Example) and row.completion else []
        limits = Limits(self.recipe.tokens.max_length, "drop")
        if self.chat:
            row, near = as_chat(row), [as_chat(other) for other in near]  # type: ignore[misc]
        for count in range(len(near), 0, -1):
            encoded = encode(after_examples(row, near[:count][::-1]), self.tokenizer, limits)  # type: ignore[arg-type]
            if encoded.problem is None:
                return encoded
        return None

    def notes(self) -> list[str]:
        if not self.lonely:
            return []
        said = f"{self.lonely:,} of {self.seen:,} rows: no neighbour, or none that fits into max_length; neighbour_nll is NULL there."
        self.lonely = self.seen = 0
        return [said]


class BackwardRunner(ForwardRunner):
    """The same model; what reads the forward pass is read off the backward's own, and alone where nothing else is missing."""

    reads = "backward"

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], None, int]:
        from curate.passes import forward
        from curate.passes.gradients import backward

        if all(m.reads == "forward" for m in measurements):
            return super().run(rows, row_ids, measurements)
        encoded = self._encode(rows)
        columns = backward.measure(
            self.model,
            encoded,
            measurements,
            token_budget=self.recipe.engine.token_budget,
            parameters=self.recipe.gradients.parameters,
        )
        return columns, None, forward.tokens_to_run(encoded)


class SampleRunner(Runner):
    """One sampling engine for all subjects that it takes, started when an answer has to be drawn; answers are graded as they come.

    store: where answers of earlier runs are kept (curate/plan/answers.py); None: all are drawn.
    """

    reads = "sample"

    def __init__(self, loaded: Loaded, progress: Progress, store: Store | None = None):
        super().__init__(loaded, progress)
        from curate.measurements.grading import grader

        self.sampler: Any = None
        self.step: Step | None = None  # whose weights the sampler is to have; None: it has them
        self.grader = grader(
            self.recipe.sampling.grader, folder=loaded.folder, named=named_rows(store, loaded) if store else None
        )
        perturb = self.recipe.sampling.perturb
        self.perturb = perturbation(perturb, folder=loaded.folder) if perturb else None
        self.kept = KeptAnswers(store) if store is not None else None
        self.said = Counter[str]()
        self.label = "the model"
        self.lost = Counter[str]()  # rows that were not asked, by why; or whose prompt lost a turn's text

    @cached_property
    def few_shot(self) -> str | None:
        """Read where a prompt is made: answers that are kept need no file of it."""
        return few_shot_text(self.loaded)

    def use(self, step: Step) -> None:
        self.step, self.label = step, step.subject.label

    def _start(self) -> None:
        """The engine with the weights of the step's subject: nothing is started, and no tokenizer read, for answers that are kept."""
        if self.step is None:
            return
        started = time.perf_counter()
        self._open(self.step)
        self.step = None
        self.starting += time.perf_counter() - started

    def _open(self, step: Step) -> None:
        from curate.passes.sampling.engines import choose_sampler
        from curate.passes.sampling.open import open_sampler

        super().use(step)
        engine, base = self.recipe.engine, step.subject.base
        model = step.subject.path if self.tokenizer is not None else None
        name, why = choose_sampler(engine.sampler, model, base=base, device=engine.device)
        if self.sampler is not None and self.sampler.name == name:
            self.sampler.use(step.subject.path, base=base)
            return
        self.close()  # an engine that does not take these weights: the plan knows them under the other's name
        self.progress.say(why[:1].upper() + why[1:])
        alike = [s for s in self.subjects if s.base is not None and s.base == (base or model)]
        found = [(s.path, choose_sampler(engine.sampler, s.path, base=s.base, device=engine.device)[0]) for s in alike]
        self.sampler = open_sampler(
            name,
            model,
            base=base,
            adapters=[path for path, taken_by in found if taken_by == name],
            dtype=engine.dtype,
            device=engine.device,
            max_length=self.recipe.tokens.max_length,
            seed=engine.seed,
            server=self.recipe.server.model_dump(),
            expected=expected(self.loaded, step.tasks[0].measured.engine) if name == "openai" else None,
        )

    def run(
        self, rows: list[Row], row_ids: Sequence[str], measurements: list[Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, list[Any]] | None, int]:
        columns: dict[str, Any] = {}
        samples: dict[str, list[Any]] = {}
        cost = 0
        for perturbed in (False, True):
            mine = [m for m in measurements if m.perturbed == perturbed]
            if not mine:
                continue
            variants = [self._variants(row) if perturbed else [row] for row in rows]
            kept = self._kept(mine[0].name, row_ids, [len(of_row) for of_row in variants])
            every = [variant for of_row in variants for variant in of_row]
            ids = [v.row_id for v in every] if perturbed else row_ids
            graded, tokens = self._answers(every, ids, [one for of_row in kept for one in of_row])
            answers = iter(graded)
            of_rows = [[next(answers) for _ in of_row] for of_row in variants]
            cost += tokens
            for measurement in mine:
                columns |= measurement.function(of_rows if perturbed else graded)
                samples[measurement.name] = [padded(row, self.recipe.sampling.samples * perturbed) for row in of_rows]
        return columns, samples, cost

    def _variants(self, row: Row) -> list[Example]:
        assert self.perturb is not None
        return self.perturb.of(row) if isinstance(row, Example) else []

    def _kept(self, measurement: str, row_ids: Sequence[str], counts: Sequence[int]) -> list[list[Any]]:
        """Of every row and each of its `counts` prompts the answers that are kept; None where there are none, [] where none can be drawn."""
        task = next((t for t in self.tasks if t.measurement.name == measurement), None)
        if self.kept is None or task is None:
            return [[None] * n for n in counts]
        return [by_prompt(kept, n) for kept, n in zip(self.kept.take(task, row_ids), counts, strict=True)]

    def _answers(
        self, rows: Sequence[Row], row_ids: Sequence[str], kept: Sequence[list[Any] | None]
    ) -> tuple[list[list[Graded]], int]:
        """Every row's answers with their grades, and the tokens that were run for them. [] for a row that leaves nothing to sample from."""
        from curate.passes.sampling.types import Prompt, Sampling

        recipe = self.recipe.sampling
        drawn: list[list[Any]] = [list(found or ())[: recipe.samples] for found in kept]
        if recipe.temperature == 0:
            drawn = [found[:1] * recipe.samples for found in drawn]
        lacking: dict[int, list[int]] = {}  # number of the first answer to draw -> rows
        for i, found in enumerate(kept):
            if found is None or 0 < len(drawn[i]) < recipe.samples:
                lacking.setdefault(len(drawn[i]), []).append(i)
        tokens = 0
        for first, at in lacking.items():
            self._start()
            prompts = {i: self._prompt(rows[i], row_ids[i]) for i in at}
            asked = {i: replace(prompt, first=first) for i, prompt in prompts.items() if isinstance(prompt, Prompt)}
            sampling = Sampling(
                recipe.samples - first, recipe.temperature, recipe.top_p, recipe.max_new_tokens, tuple(recipe.stop)
            )
            for i, found in zip(asked, self.sampler.sample(list(asked.values()), sampling), strict=True):
                drawn[i] = drawn[i] + found
                tokens += len(asked[i].ids) + sum(s.n_tokens or 0 for s in found)
        graded = [[self._graded(s, row) for s in found] for row, found in zip(rows, drawn, strict=True)]
        return graded, tokens

    def _graded(self, sample: Any, row: Row) -> Graded:
        from curate.measurements.accuracy import Graded

        self.said["answers"] += 1
        self.said["empty"] += not sample.text.strip()
        self.said["unfinished"] += not sample.finished
        return Graded(self._correct(sample.text, row), sample.n_tokens, sample.logp, sample.finished, sample.text)

    def _prompt(self, row: Row, row_id: str) -> Any:
        """The row's prompt, or None where it leaves nothing to sample from. The seed is the row's own, so a row's answers stay its own."""
        from curate.passes.sampling.types import Prompt
        from curate.passes.tokens import as_chat, encode_prompt

        seed = (int(row_id, 16) ^ self.recipe.engine.seed * 0x9E3779B97F4A7C15) % 2**63
        system = self.recipe.sampling.system
        if self.tokenizer is None:
            return _plain_prompt(as_chat(row) if self.chat else row, seed, system, self.few_shot)
        limits = self._limits()
        settings = {"system": system, "few_shot": self.few_shot, "limits": limits}
        how = ("prompt", self._tokenizer_id, limits)
        tokens = self.encodings.of(how, row_id, partial(encode_prompt, row, self.tokenizer, **settings))
        if self.embeddings is not None:
            check_ids([tokens], self.embeddings, self.tokenizer)
        self.lost.update([tokens.problem] if tokens.problem else tokens.left_out)
        return None if tokens.problem else Prompt(tokens.ids, tokens.text, tokens.messages, seed)

    def _correct(self, text: str, row: Row) -> bool | None:
        answer = row.answer if isinstance(row, Example) else None
        if answer is None or not self.grader.readable(answer, row):
            return None
        return self.grader.grade(text, answer, row)

    def notes(self) -> list[str]:
        notes: list[str] = [] if self.sampler is None else self.sampler.notes
        said, most = self.said, self.recipe.sampling.max_new_tokens
        self.said = Counter()
        found = list(dict.fromkeys(notes))
        for what, n in sorted(self.lost.items()):
            left = "the chat template leaves out the text of their"
            found.append(f"{n:,} rows: {what if ' ' in what else f'{left} {what} turn'}.")
        self.lost.clear()
        if 2 * said["empty"] > said["answers"]:
            found.append(
                f"Warning: {said['empty']:,} of {said['answers']:,} answers of {self.label} are empty. An instruct model wants its chat template: "
                "`--set tokens.chat=always`, or give the rows as messages; a base model wants to see what an answer looks like: `sampling.few_shot`."
            )
        if 10 * said["unfinished"] >= 9 * said["answers"] > 0:
            found.append(
                f"Warning: {said['unfinished']:,} of {said['answers']:,} answers of {self.label} did not end within max_new_tokens {most}. Raise it "
                "with `--set sampling.max_new_tokens=…`, or say where an answer ends: `sampling.stop`."
            )
        elif said["unfinished"]:
            found.append(
                f"{said['unfinished']:,} of {said['answers']:,} answers of {self.label} were cut at max_new_tokens {most}, and are graded as they "
                "stand (n_unfinished)."
            )
        return found

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None


def _plain_prompt(row: Row, seed: int, system: str | None, few_shot: str | None) -> Any:
    """A prompt for a server whose tokenizer is its own."""
    from curate.passes.sampling.types import Prompt
    from curate.passes.tokens import with_context

    if isinstance(row.prompt, str):
        parts = [f"{system}\n\n" if system else "", few_shot or "", row.prompt]
        return Prompt([], "".join(parts), None, seed)
    messages = with_context(row.prompt, system, few_shot)
    return Prompt([], "\n".join(m["content"] for m in messages), messages, seed)


@contextmanager
def _runner(
    reads: str, loaded: Loaded, progress: Progress, subjects: list[Subject], store: Store, plan: Plan
) -> Iterator[Runner]:
    kinds: dict[str, type[Runner]] = {"tokens": TokensRunner}
    kinds |= {"forward": ForwardRunner, "backward": BackwardRunner}
    if reads == "direction":
        from curate.forecasting import DirectionRunner

        runner: Runner = DirectionRunner(loaded, progress, store, plan)
    elif reads == "sample":
        runner = SampleRunner(loaded, progress, store)
    elif reads == "neighbours":
        runner = NeighboursRunner(loaded, progress, store, plan)
    else:
        runner = kinds[reads](loaded, progress)
    runner.subjects = subjects
    try:
        yield runner
    finally:
        runner.close()
