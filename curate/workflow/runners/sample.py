"""The sampling pass: prompts to an engine, answers graded and kept; kept answers are graded anew without one."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from curate.console import Progress
from curate.errors import ModelError
from curate.measurements.perturbations import perturbation
from curate.passes.thinking import has_tags
from curate.plan.answers import KeptAnswers, by_prompt, padded
from curate.plan.embeddings import check_ids
from curate.plan.identity import few_shot_text
from curate.plan.row_names import named_rows
from curate.plan.servers import expected
from curate.plan.step import Step
from curate.rows import Example, Row
from curate.scores.stopping import looks, undecided
from curate.workflow.runners.base import Runner
from curate.workflow.runners.prompts import cut_notes, plain_prompt, sampling_of, with_template_settings

if TYPE_CHECKING:
    from curate.measurements.accuracy import Graded, Outcome
    from curate.passes.sampling.reasoned import Thinking
    from curate.passes.sampling.types import Sample
    from curate.recipe.load import Loaded
    from curate.store import Store


class SampleRunner(Runner):
    """One sampling engine for all checkpoints that it takes, started when an answer has to be drawn; answers are graded as they come.

    store: where answers of earlier runs are kept (curate/plan/answers.py); None: all are drawn.
    """

    reads = "sample"

    def __init__(self, loaded: Loaded, progress: Progress, store: Store | None = None):
        super().__init__(loaded, progress)
        from curate.measurements.grading import grader
        from curate.passes.sampling.swap_probe import SwapProbe

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
        self.probe = SwapProbe()
        self.tags: Sequence[str] | None = None  # what opens and closes the model's thinking
        self.whole, self.asked, self.broken = (
            True,
            0,
            0,
        )  # of a step: whether it has all rows; prompts that were asked, and without a finite answer
        self.of_server = False  # whose template is not known: `Thinking.unseen`
        self.enough = Counter[str]()  # where rows are sampled until their band is decided: rows, answers, undecided
        self.lost = Counter[str]()  # rows that were not asked, by why; or whose prompt lost a turn's text

    @cached_property
    def few_shot(self) -> str | None:
        """Read where a prompt is made: answers that are kept need no file of it."""
        return few_shot_text(self.loaded)

    def use(self, step: Step) -> None:
        self.step, self.label = step, step.checkpoint.label
        params = step.tasks[0].measured.params
        self.whole = step.missing == step.rows
        self.asked = self.broken = 0
        self.tags, self.of_server = params.get("thinking"), params.get("tokenizer") == "server"

    def _start(self) -> None:
        """The engine with the weights of the step's checkpoint: nothing is started, and no tokenizer read, for answers that are kept."""
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
        engine, base = self.recipe.engine, step.checkpoint.base
        model = step.checkpoint.path if self.tokenizer is not None else None
        name, why = choose_sampler(engine.sampler, model, base=base, device=engine.device)
        if self.sampler is not None and self.sampler.name == name:
            self.sampler.use(step.checkpoint.path, base=base)
            if name == "vllm":  # transformers' weights are torch's own, and a server is asked who it is
                self.probe.swapped(self.sampler, step.checkpoint.path, base, self.label)
            return
        self.close()  # an engine that does not take these weights: the plan knows them under the other's name
        self.progress.say(why[:1].upper() + why[1:])
        alike = [s for s in self.checkpoints if s.base is not None and s.base == (base or model)]
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
        if name == "vllm" and len(self.checkpoints) > 1:  # weights will be swapped
            self.probe.started(self.sampler, step.checkpoint.path, base)

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
                samples[measurement.name] = [padded(row, self.recipe.sampling.most * perturbed) for row in of_rows]
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
        from curate.passes.sampling.reasoned import told_apart

        samples = self.recipe.sampling.samples
        drawn: list[list[Any]] = [[] for _ in rows]
        graded: list[list[Graded]] = [[] for _ in rows]
        going_on, tokens = list(range(len(rows))), 0
        for n in [samples] if isinstance(samples, int) else looks(samples.least, samples.to):
            tokens += self._draw(rows, row_ids, kept, drawn, going_on, n)
            for i in going_on:
                apart = (
                    told_apart(s, self.tags, opened=self.of_server and not s.finished)
                    for s in drawn[i][len(graded[i]) :]
                )
                graded[i] += [self._graded(s, rows[i]) for s in apart]
            if not isinstance(samples, int):
                going_on = [i for i in going_on if _wants_more(graded[i], samples.band)]
        if not isinstance(samples, int):
            gradable = [row for row in graded if any(g.correct is not None for g in row)]
            self.enough.update(rows=len(gradable), answers=sum(map(len, gradable)), undecided=len(going_on))
        return graded, tokens

    def _draw(
        self,
        rows: Sequence[Row],
        row_ids: Sequence[str],
        kept: Sequence[list[Any] | None],
        drawn: list[list[Any]],
        wanting: Sequence[int],
        n: int,
    ) -> int:
        """Fill `drawn` up to n answers for the rows that want them, from those that are kept first. Returns the tokens that were run."""
        from curate.passes.sampling.reasoned import sample_reasoned
        from curate.passes.sampling.types import Prompt

        recipe = self.recipe.sampling
        lacking: dict[int, list[int]] = {}  # number of the first answer to draw -> rows
        for i in wanting:
            drawn[i] += list(kept[i] or ())[len(drawn[i]) : n]
            if recipe.temperature == 0:
                drawn[i] = drawn[i][:1] * n
            if 0 < len(drawn[i]) < n or (not drawn[i] and kept[i] is None):
                lacking.setdefault(len(drawn[i]), []).append(i)
        tokens = 0
        for first, at in lacking.items():
            self._start()
            prompts = {i: self._prompt(rows[i], row_ids[i]) for i in at}
            asked = {i: replace(prompt, first=first) for i, prompt in prompts.items() if isinstance(prompt, Prompt)}
            sampling, thinking = sampling_of(recipe, n - first), self._thinking()
            answers = sample_reasoned(self.sampler, list(asked.values()), sampling, thinking)
            self.asked += len(asked)
            for i, found in zip(asked, answers, strict=True):
                drawn[i] = drawn[i] + ([] if self._is_broken(found) else found)
                tokens += len(asked[i].ids) + sum(s.n_tokens or 0 for s in found)
        if self.broken and self.broken == self.asked and self.whole:
            raise ModelError(
                f"{self.label}: the model gives no finite number for any of {self.asked:,} prompts. Its weights are damaged, or its activations are "
                "larger than its numbers can be: try another engine.dtype. Nothing of this is kept."
            )
        return tokens

    def _is_broken(self, answers: Sequence[Sample]) -> bool:
        """Whether the model had no distribution to draw an answer from: what came out is no answer, right or wrong."""
        broken = any(s.logp is not None and not math.isfinite(s.logp) for s in answers)
        self.broken += broken
        self.said["broken"] += broken
        return broken

    def _thinking(self) -> Thinking | None:
        from curate.passes.sampling.reasoned import Thinking

        budget = self.recipe.sampling.thinking_tokens
        return None if self.tags is None else Thinking.of(self.tags, self.tokenizer, budget)

    def _graded(self, sample: Sample, row: Row) -> Graded:
        from curate.measurements.accuracy import Graded

        in_thinking = not sample.finished and sample.reasoning is not None and not sample.text.strip()
        correct = self._correct(sample.text, row, never=in_thinking)
        unfinished = in_thinking or (
            not sample.finished and correct is False and self.grader.extract(sample.text) is None
        )
        outcome: Outcome | None = None if correct is None else "right" if correct else "wrong"
        self.said["answers"] += 1
        self.said["empty"] += not (sample.text.strip() or sample.reasoning)
        self.said["cut"] += not sample.finished
        self.said["unfinished"] += unfinished
        self.said["tagged"] += self.tags is None and sample.reasoning is None and has_tags(sample.text)
        return Graded(
            correct,
            sample.n_tokens,
            sample.logp,
            sample.finished,
            sample.text,
            sample.reasoning,
            "unfinished" if unfinished else outcome,
            not (unfinished and correct is not None and self.recipe.sampling.unfinished == "leave_out"),
        )

    def _prompt(self, row: Row, row_id: str) -> Any:
        """The row's prompt, or None where it leaves nothing to sample from. The seed is the row's own, so a row's answers stay its own."""
        from curate.passes.sampling.types import Prompt
        from curate.passes.tokens import as_chat, encode_prompt

        seed = (int(row_id, 16) ^ self.recipe.engine.seed * 0x9E3779B97F4A7C15) % 2**63
        system = self.recipe.sampling.system
        row = with_template_settings(row, self.recipe.sampling.chat_template_kwargs)
        if self.tokenizer is None:
            return plain_prompt(as_chat(row) if self.chat else row, seed, system, self.few_shot)
        limits = self._limits()
        settings = {"system": system, "few_shot": self.few_shot, "limits": limits}
        how = ("prompt", self._tokenizer_id, limits)
        tokens = self.encodings.of(how, row_id, partial(encode_prompt, row, self.tokenizer, **settings))
        if self.embeddings is not None:
            check_ids([tokens], self.embeddings, self.tokenizer)
        self.lost.update([tokens.problem] if tokens.problem else tokens.left_out)
        return (
            None
            if tokens.problem
            else Prompt(tokens.ids, tokens.text, tokens.messages, seed, template_args=row.template_args)
        )

    def _correct(self, text: str, row: Row, *, never: bool = False) -> bool | None:
        """Whether the text gives the row's answer; None where the row has none that can be compared with. never: it did not come to an answer."""
        answer = row.answer if isinstance(row, Example) else None
        if answer is None or not self.grader.readable(answer, row):
            return None
        return not never and self.grader.grade(text, answer, row)

    def notes(self) -> list[str]:
        notes: list[str] = [] if self.sampler is None else self.sampler.notes
        said = self.said
        self.said = Counter()
        found = [*dict.fromkeys(notes), *self.probe.notes]
        self.probe.notes = []
        for what, n in sorted(self.lost.items()):
            left = "the chat template leaves out the text of their"
            found.append(f"{n:,} rows: {what if ' ' in what else f'{left} {what} turn'}.")
        self.lost.clear()
        if said["broken"]:
            found.append(
                f"{said['broken']:,} rows: the model ({self.label}) gives no finite number; what is sampled of them is NULL."
            )
        found += self._saved()
        if 2 * said["empty"] > said["answers"]:
            found.append(
                f"Warning: {said['empty']:,} of {said['answers']:,} answers of {self.label} are empty. An instruct model wants its chat template: "
                "`--set tokens.chat=always`, or give the rows as messages; a base model wants to see what an answer looks like: `sampling.few_shot`."
            )
        if said["tagged"]:
            found.append(
                f"Warning: {said['tagged']:,} of {said['answers']:,} answers of {self.label} hold their thinking (</think>), and are graded with it: "
                '`--set sampling.thinking_tags=\'["<think>", "</think>"]\'`, so that graders see the answer alone.'
            )
        found += cut_notes(said, self.label, self.recipe.sampling)
        return found

    def _saved(self) -> list[str]:
        """What stopping at a decided band saved."""
        samples, rows, answers = self.recipe.sampling.samples, self.enough["rows"], self.enough["answers"]
        undecided_rows = self.enough["undecided"]
        self.enough.clear()
        if isinstance(samples, int) or not rows:
            return []
        most = rows * samples.to
        return [
            f"The band of {rows - undecided_rows:,} of {rows:,} rows was decided by {samples.to} answers or fewer, of {undecided_rows:,} not: "
            f"{answers:,} answers of {self.label} were enough, {most - answers:,} of {most:,} ({(most - answers) / most:.0%}) were saved."
        ]

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None


def _wants_more(graded: Sequence[Graded], band: Sequence[float]) -> bool:
    """Whether a row's band is undecided by the answers that count; not where none can be graded, which no number of answers changes."""
    marks = [g.correct for g in graded if g.counts]
    return any(g.correct is not None for g in graded) and undecided(marks, band[0], band[1])
