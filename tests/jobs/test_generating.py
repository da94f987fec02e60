"""Rows that a model writes: the template, the majority by hand, and what is left out, with a sampler that says what it is told."""

from __future__ import annotations

import pytest

from curate.errors import UsageError
from curate.jobs.collect.generate import Template, generate, majority, problem_of, with_problem
from curate.jobs.collect.pick import Candidate, Known
from curate.measurements.grading import grader
from curate.passes.sampling.types import Prompt, Sample, Sampling
from curate.rows import Example

HARD = [Candidate(Example(f"hard {i}?", f" #### {i}", str(i))) for i in range(3)]


def says(text: str, *, logp: float = -1.0, finished: bool = True) -> Sample:
    return Sample(text, 1, logp, finished)


class Scripted:
    """Writes the problems of `script` one after another; its answers to each are the script's."""

    def __init__(self, script: list[tuple[str, list[str]]]):
        self.script, self.at, self.asked = script, 0, []

    def sample(self, prompts, sampling):
        self.asked += prompts
        answers = dict(self.script)
        if sampling.n > 1:
            return [[says(text) for text in answers[p.text]] for p in prompts]
        said = self.script[self.at : self.at + len(prompts)]
        self.at += len(prompts)
        return [[says(problem)] for problem, _ in said] + [[] for _ in prompts[len(said) :]]


def run(script, *, take=5, known=(), agree=0.6, hard=HARD, text="Q: {1}\n\nQ: {2}\n\nQ:", seed=0):
    sampler = Scripted(script)
    found = generate(
        hard,
        take,
        template=Template.of(text, file="t"),
        known=Known([*known, *(row.row for row in hard)]),
        sampler=sampler,
        encode=lambda text, seed: Prompt([1], problem_of(text), None, seed),
        encode_plain=lambda text, seed: Prompt([1], problem_of(text), None, seed),
        grader=grader("gsm8k"),
        writing=Sampling(1),
        answering=Sampling(4),
        agree=agree,
        seed=seed,
    )
    return *found, sampler


def four(*answers: str) -> list[str]:
    return [f"so #### {answer}" if answer else "no idea" for answer in answers]


def test_kept_where_the_answers_agree_and_counted_where_not():
    script = [
        ("new one?", four("7", "7", "7", "1")),
        ("unsure?", four("1", "2", "1", "2")),
        ("hard 1?", four("1", "1", "1", "1")),  # a row that is there
        ("New one", four("7", "7", "7", "7")),  # reads like the first
        ("", four()),
        ("two of four?", four("3.0", "3", "", "")),
        ("held out?", four("1", "1", "1", "1")),
    ]
    kept, why, sampler = run(script, known=[Example("Held out", "x")])
    assert [(c.row.prompt, c.row.completion, c.row.answer) for c in kept] == [("new one?", "so #### 7", "7")]
    assert kept[0].columns == {"generated": True}
    assert why["answers disagree"] == 2
    assert why["known"] == 3
    assert why["asked"] == 40  # eight a wanted row, then it is given up
    kept, _, _ = run(script, agree=0.5)
    assert [c.row.prompt for c in kept] == ["new one?", "two of four?", "held out?"]
    shown = sampler.asked[0].text  # two different hard problems in the template's places
    assert shown.startswith("Q: hard ") and shown.endswith("\n\nQ:") and len(set(shown.split("\n\n")[:2])) == 2


def test_no_more_than_wanted_and_the_same_again():
    script = [(f"new {i}?", four("1", "1", "1", "1")) for i in range(40)]
    kept, why, sampler = run(script, take=3)
    assert len(kept) == 3 and why["more than wanted"] == 13
    again = run(script, take=3)
    assert (again[0], again[1], again[2].asked) == (kept, why, sampler.asked)
    assert run(script, take=3, seed=1)[2].asked != sampler.asked


def test_the_majority_by_hand():
    gsm8k = grader("gsm8k")
    table = [
        ([("a #### 5", -4), ("b #### 5.0", -1), ("c #### 6", -1)], ("5", "b #### 5.0")),  # the likeliest of the two
        ([("#### 5", -1), ("#### 6", -1)], (None, None)),  # nobody's
        ([("nothing", -1)], (None, None)),
    ]
    for samples, (answer, said) in table:
        found, texts = majority([says(text, logp=logp) for text, logp in samples], gsm8k)
        assert found == answer
        assert (texts[0].text if texts else None) == said
    cut = [says("#### 5", finished=False), says("#### 6")]
    assert majority(cut, gsm8k)[0] == "6"


def test_conversations_keep_their_system_message():
    talk = ({"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    more = (*talk, {"role": "user", "content": "c"})
    assert problem_of(more) == "c"
    assert with_problem(more, "d") == (talk[0], {"role": "user", "content": "d"})
    hard = [Candidate(Example(more, ({"role": "assistant", "content": "x"},), "1"))]
    kept, _, _ = run([("new?", four("1", "1", "1", "1"))], hard=hard, text="Like {1}:", take=1)
    assert kept[0].row.prompt == (talk[0], {"role": "user", "content": "new?"})
    assert kept[0].row.completion == ({"role": "assistant", "content": "so #### 1"},)


@pytest.mark.parametrize("text", ["no place", "{2}", "{1} {3}"])
def test_a_template_without_its_places_is_refused(text):
    with pytest.raises(UsageError, match="t.txt: wanted"):
        Template.of(text, file="t.txt")


def test_a_grader_that_reads_nothing_cannot_tell_a_majority():
    with pytest.raises(UsageError, match="grader"):
        generate(
            HARD, 1, template=Template.of("{1}", file="t"), known=Known(), sampler=Scripted([]), encode=None, encode_plain=None,
            grader=grader("exact"), writing=Sampling(1), answering=Sampling(4),
        )  # fmt: skip
