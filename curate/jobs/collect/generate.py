"""New rows like the hard ones, from a model: problems written after a few hard ones, answered several times, kept where the answers agree.

    template     a text with {1} … {n}, where the problems of n different hard rows are put; what the model writes after it, up to a stop
                 string or its end marker, is the new problem
    answer       the one that most of the samples give, as the recipe's grader reads it; kept where its share of all samples is at least
                 `agree` (self-consistency, Wang et al. 2022, arXiv:2203.11171)

A majority is no proof: on problems that a model does not solve, it can agree on what is wrong, and what it does agree on is the easier
part. What was left out is counted by reason. A stronger model as the generator is worth more than a higher `agree`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from curate.errors import UsageError
from curate.jobs.collect.pick import Candidate, Known
from curate.measurements.grading_contract import Grader
from curate.passes.sampling.reasoned import Reasoned
from curate.passes.sampling.types import Prompt, Sample, Sampler, Sampling
from curate.rows import Example, Message, Text, text_of

PLACE = re.compile(r"\{(\d+)\}")
LEAST_BATCH = 16  # problems asked for together
TRIES = 8  # problems asked for, per row that is wanted, before it is given up


@dataclass(frozen=True)
class Template:
    """A text with {1} … {n} for hard rows' problems."""

    text: str
    shots: int

    @classmethod
    def of(cls, text: str, *, file: str) -> Template:
        """UsageError where the places are not {1}, {2}, … without a gap."""
        numbers = {int(number) for number in PLACE.findall(text)}
        if not numbers or numbers != set(range(1, len(numbers) + 1)):
            shown = ", ".join(f"{{{n}}}" for n in sorted(numbers)) or "none"
            raise UsageError(
                f"{file}: wanted a text with the places {{1}}, {{2}}, … for problems of hard rows, found {shown}. For a plain model: "
                "'Problem: {1}\\n\\nProblem: {2}\\n\\nProblem:'"
            )
        return cls(text, len(numbers))

    def fill(self, problems: Sequence[str]) -> str:
        return PLACE.sub(lambda place: problems[int(place[1]) - 1], self.text)


def problem_of(prompt: Text) -> str:
    """The problem that a prompt states: all of a plain one, the last user message of a conversational one."""
    if isinstance(prompt, str):
        return prompt
    asked = [text_of(message) for message in prompt if message["role"] == "user"]
    return asked[-1] if asked else ""


def with_problem(prompt: Text, problem: str) -> Text:
    """A prompt like this one with another problem: its system message is kept, earlier turns are not."""
    if isinstance(prompt, str):
        return problem
    system = tuple(message for message in prompt[:1] if message["role"] == "system")
    return (*system, Message(role="user", content=problem))


def generate(
    hard: Sequence[Candidate],
    take: int,
    *,
    template: Template,
    known: Known,
    sampler: Sampler | Reasoned,
    encode: Callable[[Text, int], Prompt | None],
    encode_plain: Callable[[Text, int], Prompt | None],
    grader: Grader,
    writing: Sampling,
    answering: Sampling,
    agree: float = 0.6,
    seed: int = 0,
) -> tuple[list[Candidate], dict[str, int]]:
    """At most `take` new rows, and how many problems were left out by reason (`asked`: how many were asked for).

    encode: (prompt, seed) -> a prompt as the recipe samples answers (system message, few shots); encode_plain: without either. writing:
    n = 1 a problem; answering: n at least 2. A template of more places than there are hard rows repeats some. `known` grows by the rows.
    Raises UsageError where the grader reads no answer out of a text, or where no majority can be told.
    """
    if answering.n < 2:
        raise UsageError(f"sampling.samples: a majority needs at least 2 answers a problem, found {answering.n}.")
    if grader.name == "exact" or ":" in grader.name:
        raise UsageError(
            f"sampling.grader: {grader.name} reads no answer out of a text, so answers cannot agree. Use gsm8k, number, math, choice or regex."
        )
    rng = random.Random(f"generate/{seed}")
    kept: list[Candidate] = []
    why: Counter[str] = Counter()
    while hard and len(kept) < take and why["asked"] < TRIES * take:
        n = min(max(take - len(kept), LEAST_BATCH), TRIES * take - why["asked"])
        why["asked"] += n
        prompts = _problems(hard, n, rng, template, sampler, encode_plain, writing, known, why)
        _answer(prompts, kept, take, rng, sampler, encode, grader, answering, agree, known, why)
    return kept, dict(+why)


def _problems(
    hard: Sequence[Candidate],
    n: int,
    rng: random.Random,
    template: Template,
    sampler: Sampler | Reasoned,
    encode: Callable[[Text, int], Prompt | None],
    writing: Sampling,
    known: Known,
    why: Counter[str],
) -> list[Text]:
    """Prompts of new problems: neither empty, nor cut off, nor known."""
    models, asked = [], []
    for _ in range(n):
        shown = rng.sample(hard, template.shots) if template.shots <= len(hard) else rng.choices(hard, k=template.shots)
        text = template.fill([problem_of(row.row.prompt) for row in shown])
        is_text = isinstance(shown[0].row.prompt, str)
        prompt = encode(text if is_text else (Message(role="user", content=text),), rng.getrandbits(62))
        if prompt is None:
            why["template too long"] += 1
        else:
            models.append(shown[0].row.prompt)
            asked.append(prompt)
    prompts: list[Text] = []
    seen: set[str] = set()
    for like, samples in zip(models, sampler.sample(asked, replace(writing, n=1)), strict=True):
        problem = samples[0].text.strip() if samples else ""
        if not problem or not samples[0].finished:
            why["empty or cut off"] += 1
        elif known.has_prompt(with_problem(like, problem)) or problem in seen:
            why["known"] += 1
        else:
            seen.add(problem)
            prompts.append(with_problem(like, problem))
    return prompts


def _answer(
    prompts: Sequence[Text],
    kept: list[Candidate],
    take: int,
    rng: random.Random,
    sampler: Sampler | Reasoned,
    encode: Callable[[Text, int], Prompt | None],
    grader: Grader,
    answering: Sampling,
    agree: float,
    known: Known,
    why: Counter[str],
) -> None:
    """Answer the problems, and put those whose answers agree into `kept`, until it holds `take`."""
    encoded = [(prompt, encode(prompt, rng.getrandbits(62))) for prompt in prompts]
    why["too long to answer"] += sum(ready is None for _, ready in encoded)
    fitting = [(prompt, ready) for prompt, ready in encoded if ready is not None]
    for (prompt, _), samples in zip(fitting, sampler.sample([ready for _, ready in fitting], answering), strict=True):
        answer, agreeing = majority(samples, grader)
        if answer is None or len(agreeing) < 2 or len(agreeing) / answering.n < agree:
            why["answers disagree"] += 1
            continue
        text = agreeing[0].text
        completion: Text = text if isinstance(prompt, str) else (Message(role="assistant", content=text.strip()),)
        row = Example(prompt, completion, answer)
        if known.refusal(row):
            why["known"] += 1
        elif len(kept) < take:
            known.add(row)
            kept.append(Candidate(row, {"generated": True}))
        else:
            why["more than wanted"] += 1


def majority(samples: Sequence[Sample], grader: Grader) -> tuple[str | None, list[Sample]]:
    """The answer that most finished samples give, and those samples, the likeliest per token first; (None, []) where none gives any.

    Answers are the same where the grader says so. Of two that are equally frequent neither is the majority.
    """
    groups: list[tuple[str, list[Sample]]] = []
    for sample in samples:
        answer_given = grader.extract(sample.text) if sample.finished else None
        if answer_given is None:
            continue
        home = next((members for answer, members in groups if grader.same(answer_given, answer, None)), None)
        if home is None:
            groups.append((answer_given, [sample]))
        else:
            home.append(sample)
    groups.sort(key=lambda group: -len(group[1]))
    if not groups or (len(groups) > 1 and len(groups[0][1]) == len(groups[1][1])):
        return None, []
    answer, agreeing = groups[0]
    return answer, sorted(agreeing, key=_unlikeliness)


def _unlikeliness(sample: Sample) -> float:
    return -(sample.logp or 0.0) / (sample.n_tokens or 1)
