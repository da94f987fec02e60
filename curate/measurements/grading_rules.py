"""The graders that a recipe names: gsm8k, number, math, choice, exact and regex. grading.py says what each one reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from curate.errors import UsageError
from curate.measurements.grading_answers import (
    ANSWER_MARK,
    HASHES,
    ONE_OF,
    bare_number,
    boxed_answer,
    declared,
    final_answer,
    marked_answer,
    math_answer,
    same_answer,
    same_text,
    squeeze,
)
from curate.measurements.grading_choice import Choice
from curate.measurements.grading_contract import Grader, NoVerdict
from curate.measurements.grading_hedged import OTHER_LETTER, hedged, in_doubt, last_is_hedged
from curate.measurements.grading_values import last_value, only_value, whole_value
from curate.rows import Row


def _gsm8k() -> Grader:
    def final_part(answer: str) -> str:
        marked = marked_answer(answer)
        return answer.strip() if marked is None else marked

    def same(given: str, answer: str, row: Row | None) -> bool:
        if same_text(given, final_part(answer)):
            return True
        mine, its = only_value(given), only_value(final_part(answer))
        return mine is not None and its is not None and mine.equals(its)

    def right(text: str, answer: str, row: Row | None) -> bool:
        given = marked_answer(text)
        if not given:
            return False
        if same_text(given, final_part(answer)):
            return True
        if hedged(given, lists=False):
            return False
        if same_text(re.split(r"[.!?;](?=\s)", given)[0], final_part(answer)):
            return True
        value = declared(given)
        return value is not None and same(value, answer, row)

    return Grader("gsm8k", "3", {}, final_answer, same, right=right, shown="#### {}")


def _number() -> Grader:
    def extract(text: str) -> str | None:
        last = last_value(text)
        return bare_number(last[0]) if last and not last_is_hedged(text) else None

    def same(given: str, answer: str, row: Row | None) -> bool:
        ours, theirs = last_value(given), last_value(answer)
        return ours is not None and theirs is not None and ours[1].equals(theirs[1]) and not last_is_hedged(given)

    return Grader("number", "3", {}, extract, same, right=same, reads=lambda answer, row: extract(answer) is not None)


def _math(timeout: float = 5.0) -> Grader:
    from curate.measurements.grading_math import (  # math-verify and sympy, in a child process of their own
        MathEquality,
        version,
    )

    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        raise UsageError(f"grader math: timeout is {timeout!r}, expected seconds above 0.")
    equality = MathEquality(timeout=float(timeout))

    def same(given: str, answer: str, row: Row | None) -> bool:
        inside = boxed_answer(answer)
        reference = answer.strip() if inside is None else inside
        if inside is None and (HASHES.search(answer) or ANSWER_MARK.search(answer)):
            reference = math_answer(answer) or reference
        if (hedged(given, lists=False) or ONE_OF.fullmatch(given)) and _is_one(reference):
            return False
        return same_answer(given.strip("$ "), reference.strip("$ ")) or equality(reference, given)

    made = f"3+math-verify-{version()}"
    settings = {"timeout": float(timeout)}
    return Grader("math", made, settings, math_answer, same, close=equality.close, shown="\\boxed{{}}")


def _is_one(reference: str) -> bool:
    """Whether a reference is one value, 5 or x = 5: of a set, a tuple or an interval the values are no hedge."""
    value = whole_value(reference.rpartition("=")[2]) if reference.count("=") <= 1 else None
    return value is not None and not value.kind


def _choice(letters: str = "ABCD") -> Grader:
    if not isinstance(letters, str) or not re.fullmatch(r"[A-Z]+", letters):
        raise UsageError(f"grader choice: letters is {letters!r}, expected capitals such as ABCD.")
    choice = Choice(letters)

    def same(letter: str, answer: str, row: Row | None) -> bool:
        reference = choice.of_reference(answer, row)
        if reference is None:
            raise NoVerdict(
                "cannot grade",
                f": the answer {answer!r} names none of the letters {letters}. For more letters: {{choice: ABCDEFGHIJ}}.",
            )
        return letter == reference

    def right(text: str, answer: str, row: Row | None) -> bool:
        letter = choice.of_text(text, row)
        return same(letter or "", answer, row)

    def reads(answer: str, row: Row | None) -> bool:
        return choice.of_reference(answer, row) is not None

    return Grader("choice", "3", {"letters": letters}, choice.of_text, same, right=right, reads=reads)


def _exact(ignore_case: bool = False) -> Grader:
    if not isinstance(ignore_case, bool):
        raise UsageError(f"grader exact: ignore_case is {ignore_case!r}, expected true or false.")

    def same(given: str, answer: str, row: Row | None) -> bool:
        a, b = squeeze(given), squeeze(answer)
        return a.casefold() == b.casefold() if ignore_case else a == b

    return Grader("exact", "1", {"ignore_case": ignore_case}, lambda text: text, same)


def _regex(pattern: str) -> Grader:
    if not isinstance(pattern, str):
        raise UsageError(f"grader regex: expected a pattern (text), found {pattern!r}.")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"grader regex: {pattern!r} is no regular expression: {error}.") from None
    if not compiled.groups:
        raise UsageError(
            f"grader regex: {pattern!r} has no group; put what is the answer in brackets: `(…)` or `(?P<answer>…)`."
        )
    group: str | int = "answer" if "answer" in compiled.groupindex else 1

    def extract(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        if not matches or _is_hedged_match(text, matches, group):
            return None
        return matches[-1].group(group)

    def same(given: str, answer: str, row: Row | None) -> bool:
        matches = list(compiled.finditer(answer))
        if matches and len(matches[-1].group()) > len(
            matches[-1].group(group) or ""
        ):  # a whole solution, read as the text is
            return same_answer(given, matches[-1].group(group) or "")
        return same_answer(given, answer)

    return Grader("regex", "3", {"pattern": pattern}, extract, same)


def _is_hedged_match(text: str, matches: Sequence[re.Match[str]], group: str | int) -> bool:
    """Whether the last match is one of two that could be meant: "x = 5 or x = 6", "x = 5 or 6", "Answer: A or B"."""
    last = matches[-1]
    if last.group(group) is None:
        return False
    given = last.group(group)
    if len(matches) > 1 and matches[-2].group(group) is not None and not same_answer(matches[-2].group(group), given):
        if in_doubt(text[matches[-2].end() : last.start()]):
            return True
    line = text[last.start(group) :].partition("\n")[0]
    if whole_value(given) is not None:
        return hedged(line, lists=False)
    return len(given) == 1 and given.isalpha() and bool(OTHER_LETTER.match(line))


# name -> (how it is made, the setting that may stand alone: {regex: "…"} is {regex: {pattern: "…"}})
RULES: dict[str, tuple[Callable[..., Grader], str | None]] = {
    "gsm8k": (_gsm8k, None),
    "number": (_number, None),
    "math": (_math, None),
    "choice": (_choice, "letters"),
    "exact": (_exact, None),
    "regex": (_regex, "pattern"),
}
