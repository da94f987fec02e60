"""Graders: is a sampled answer right?

    gsm8k    the final answer after the last "The answer is", else after the last "####", or the whole text where that is nothing but a value
    number   the last number in the text (a fraction, a time, a tuple is one)
    math     the last \\boxed{…}, else the final answer; equality is mathematical (math-verify): \\frac{1}{2} = 0.5
    choice   the letter that is declared: A, (A), "Answer: B", \\boxed{C}, or the option's own text (grading_choice.py)
    exact    the whole text; runs of whitespace count as one space
    {regex: …}                   the last match's group `answer`, else its group 1
    package.module:function      your own: (text, answer) or (text, answer, row) -> bool
    {package.module:function: {threshold: 0.7}}                  the same -> a number; right is what reaches the threshold

Each is a name, or a name with its settings: {choice: {letters: ABCDE}}, {exact: {ignore_case: true}}, {regex: {pattern: …}}. Text and reference
are read by the same rules (grading_values.py). An answer that a text does not give is wrong, not unknown; a reference that cannot be read makes
it unknown (`readable`). docs/grading.md says more.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import numbers
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from curate.errors import UsageError, did_you_mean
from curate.measurements.grading_choice import Choice
from curate.measurements.grading_hedged import OTHER_LETTER, hedged, in_doubt, is_revised, last_is_hedged
from curate.measurements.grading_values import MARKUP, last_value, only_value, plain, values, whole_value
from curate.recipe.objects import load_object, places, source_version
from curate.rows import Row

# What `last_number` and `as_number` read. A minus is a sign unless it follows a digit, a letter, a point or a closing bracket.
NUMBER = re.compile(r"(?:(?<![\w.)\]])[-−]\$?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
THE_ANSWER_IS = re.compile(r"the answer is(?!\s+(?:not|never)\b|n['’]t)", re.IGNORECASE)
NEXT_QUESTION = re.compile(r"\n\s*(?:question|problem|q)\s*\d*\s*[:.]", re.IGNORECASE)
CLAUSE_END = re.compile(
    r"[.!?;](?=\s|$)|,(?=\s+[A-Za-z])|(?<=\S)\s+\(|\n|\s(?:because|since|as|so|not|instead|rather|but|which|where|when|after)\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(
    r"[.!?;]\s|,\s+(?=(?:because|since|as|so|for|not|which|but)\b)|\s(?:because|since)\b", re.IGNORECASE
)
GOES_ON = re.compile(r"\s*(?:and|or|to|,|;|[-+*/^×·–])\s*[-$(]?\s*\d", re.IGNORECASE)
MARKS = re.compile(r"the answer is(?!\s+(?:not|never)\b|n['’]t)|####", re.IGNORECASE)
ONE_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\\[A-Za-z]+|[^\s{}$])")
ONE_OF = re.compile(r"[^|;]*\d\s*[|;]\s*[-+$]*\d[^|;]*")
HASHES = re.compile(r"####")
ANSWER_MARK = re.compile(r"(?:the |final )?answer(?: is)?\s*[:=]|(?:the |final )answer is", re.IGNORECASE)


class NoVerdict(UsageError):
    """A grader that cannot say whether an answer is right. what: it did. why: what follows where it did."""

    def __init__(self, what: str, why: str):
        super().__init__(what + why)
        self.what, self.why = what, why


@dataclass(frozen=True)
class Grader:
    """One way of grading. name: what a recipe writes. version: changes when the rule does. params: its settings.

    extract: the answer that a text gives, None where it gives none (a callable's is the text). same: whether it equals the reference. right: both
    at once, where an answer is told with the whole text, or the row, in view. readable: whether a reference can be compared with.
    """

    name: str
    version: str
    params: Mapping[str, Any]
    extract: Callable[[str], str | None]
    same: Callable[[str, str, Row | None], bool]
    needs_answer: bool = True
    close: Callable[[], None] = field(default=lambda: None)
    right: Callable[[str, str, Row | None], bool] | None = None
    reads: Callable[[str, Row | None], bool] = field(default=lambda answer, row: True)
    shown: str = "{}"  # an answer as a text that the grader reads
    named: Callable[[Row], str] = field(default=lambda row: f"row {row.row_id}")  # how errors name a row

    @property
    def fingerprint(self) -> str:
        """Name, version and settings: graded samples are reused only under the same one."""
        settings = json.dumps(dict(self.params), sort_keys=True, ensure_ascii=False) if self.params else ""
        return f"{self.name}/{self.version}{settings}"

    def grade(self, text: str, answer: str | None, row: Row | None = None) -> bool:
        """Whether `text`, a sampled response, gives `answer`, the reference (which may be a whole solution that ends in it).

        Raises UsageError where there is no reference to compare with.
        """
        if self.needs_answer and (answer is None or not str(answer).strip()):
            where = self.named(row) if row is not None else "a row"
            raise UsageError(
                f"grader {self.name}: {where} has no answer to compare with (found {answer!r}). "
                "Name the column with the reference answers: `source.columns: {answer: …}`."
            )
        try:
            if self.right is not None:
                return self.right(text, str(answer), row)
            found = self.extract(text)
            return found is not None and self.same(found, answer if answer is None else str(answer), row)  # type: ignore[arg-type]
        except NoVerdict as error:
            where = f" on {self.named(row)}" if row is not None else ""
            raise UsageError(f"grader {self.name!r} {error.what}{where}{error.why}") from error.__cause__

    def readable(self, answer: str | None, row: Row | None = None) -> bool:
        """Whether a text can be graded against this reference at all."""
        if not self.needs_answer:
            return True
        return answer is not None and bool(str(answer).strip()) and self.reads(str(answer), row)

    def knows_itself(self, answer: str, row: Row | None = None) -> bool:
        """Whether a text that says just the reference is right."""
        return self.readable(answer, row) and self.grade(self.shown.replace("{}", answer), answer, row)


def grader(
    spec: str | Mapping[str, Any],
    *,
    folder: str | Path | None = None,
    named: Callable[[Row], str] | None = None,
) -> Grader:
    """The grader that a recipe names. folder: where a module of the user's own is looked for too, usually the recipe's. named: how its errors
    name a row, by its id if not given.

    Raises UsageError: an unknown grader (the nearest is offered), unknown settings, a pattern that does not compile or has no group.
    """
    made = _made(spec, folder)
    return made if named is None else replace(made, named=named)


def _made(spec: str | Mapping[str, Any], folder: str | Path | None) -> Grader:
    if isinstance(spec, str):
        name: str = spec
        settings: Any = {}
    elif isinstance(spec, Mapping) and len(spec) == 1:
        name, settings = next(iter(spec.items()))
    else:
        raise UsageError(
            f"grader: expected a name or one name with its settings, such as {{regex: '…'}}; found {spec!r}."
        )
    if ":" in name:
        return _of_your_own(name, settings, folder)
    if name not in _MAKERS:
        hint = did_you_mean(name, _MAKERS, cutoff=0.5, after=" ")
        raise UsageError(
            f"there is no grader {name!r}; {hint}there are {', '.join(_MAKERS)}, and package.module:function."
        )
    maker, only = _MAKERS[name]
    if not isinstance(settings, Mapping):
        if only is None:
            raise UsageError(f"grader {name}: it takes no settings; found {settings!r}. Write `grader: {name}`.")
        settings = {only: settings}
    allowed = inspect.signature(maker).parameters
    for key in settings:
        if key not in allowed:
            hint = did_you_mean(str(key), allowed, f"it takes {', '.join(allowed) or 'none'}.", cutoff=0.5)
            raise UsageError(f"grader {name}: there is no setting {key!r}; {hint}")
        if isinstance(allowed[key].default, bool) and not isinstance(settings[key], bool):
            raise UsageError(f"grader {name}: {key} is {settings[key]!r}, expected true or false.")
    missing = [k for k, p in allowed.items() if p.default is p.empty and k not in settings]
    if missing:
        raise UsageError(f"grader {name}: {missing[0]!r} is missing; write `grader: {{{name}: …}}`.")
    return maker(**settings)


# ------------------------------------------------------------------------------------------------ what texts say


def as_number(text: str) -> Decimal | None:
    """The number that the whole of `text` is: "$1,234.50" and "−5" are numbers, "5 apples" is none."""
    plain = text.strip().replace("−", "-").replace("{,}", ",").replace("\\$", "").replace("$", "").rstrip(".")
    plain = re.sub(r"^([-+])\s+", r"\1", plain.strip())
    if not re.fullmatch(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?", plain) or not re.search(r"\d", plain):
        return None
    return Decimal(plain.replace(",", ""))


def last_number(text: str) -> str | None:
    """The last number in a text, with its sign, without $ and commas; None where there is none.

    A minus counts as a sign unless it follows a digit, a letter or a closing bracket ("10-5" ends in 5).
    """
    found = list(NUMBER.finditer(text.replace("{,}", ",").replace("\\$", "$")))
    return _plain(found[-1].group()) if found else None


def same_answer(found: str, answer: str) -> bool:
    """Equal as values where both are (grading_values.py), else as texts (see `squeeze`)."""
    a, b = whole_value(found), whole_value(answer)
    return a.equals(b) if a is not None and b is not None else squeeze(found) == squeeze(answer)


def squeeze(text: str) -> str:
    """The text with each run of whitespace as one space, none around it, and Unicode's composed forms."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def boxed_answer(text: str) -> str | None:
    """The last box of a text; with those that stand on its line and differ, where no word says that it takes their place."""
    boxes = [(m.start(), m.end(), boxed(m.group())) for m in ONE_BOX.finditer(text)]
    last = boxed(text)
    if last is None or not boxes or boxes[-1][2] != last:
        return last
    found = [last]
    for (_, end, inside), (start, _, _) in reversed(list(itertools.pairwise(boxes))):
        between = text[end:start]
        if "\n" in between or is_revised(between):
            break
        if inside and not any(same_answer(inside, other) for other in found):
            found.insert(0, inside)
    return ", ".join(found)


def boxed(text: str) -> str | None:
    """What stands in the last complete \\boxed{…} (or \\fbox{…}, or \\boxed followed by one token); None where there is none."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*", text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            token = re.match(r"\\[A-Za-z]+|[^\s{}$]", rest)
            if token:
                return token.group()
            continue
        depth = 0
        for i, character in enumerate(rest):
            escaped = i > 0 and rest[i - 1] == "\\" and (i < 2 or rest[i - 2] != "\\")
            if character in "{}" and not escaped:
                depth += 1 if character == "{" else -1
                if depth == 0:
                    return rest[1:i].strip()
    return None


def marked_answer(text: str) -> str | None:
    """What follows the last "The answer is", else the last "####", on its line; the whole text where it is nothing but a value; else None.

    A next question that the text goes on to, and what is said of that, do not count.
    """
    for mark in (THE_ANSWER_IS, HASHES):
        found = list(mark.finditer(text))
        if found:
            after = next((m.start() for m in NEXT_QUESTION.finditer(text) if m.start() > found[0].end()), len(text))
            last = [m for m in found if m.end() <= after][-1]
            said = re.sub(r"^[ :\t]*\n?", "", text[last.end() : max(after, last.end())]).partition("\n")[0].strip()
            said, _, other = said.partition("####")
            if other.strip() and not is_revised(said) and not _same_said(said, other):
                return f"{said.strip()} or {other.strip()}"
            before = list(MARKS.finditer(text[text.rfind("\n", 0, last.start()) + 1 : last.start()]))
            if before:  # two answers on one line: both, unless the second takes the first one's place
                line = text[text.rfind("\n", 0, last.start()) + 1 : last.start()]
                first = line[before[-1].end() :]
                if not is_revised(first) and not _same_said(first, said):
                    return f"{first.strip()} or {said}"
            return said
    return text.strip() if whole_value(text) is not None else None


def _same_said(first: str, second: str) -> bool:
    one, other = declared(first), declared(second)
    if one is None or other is None:
        return same_text(re.split(r"[.!?;,](?=\s|$)", first)[0], re.split(r"[.!?;,](?=\s|$)", second)[0])
    return same_answer(one, other)


def final_answer(text: str) -> str | None:
    """GSM8K's: of what `marked_answer` finds the value that is declared first, else the text; None where nothing is.

    "$1,234." is 1234; of "5 * 3 = 15 apples" the number after the last "=" is the answer.
    """
    said = marked_answer(text)
    if said is None:
        return None
    value = declared(said)
    return _plain(value) if value is not None else said.rstrip(".").strip() or None


def declared(said: str) -> str | None:
    """The value that a sentence's first clause says, as it stands there; None where it says none, or several, or is hedged."""
    text = plain(said)
    end = next((m.start() for m in CLAUSE_END.finditer(text) if text[: m.start()].strip(MARKUP)), len(text))
    clause = text[:end]
    start = clause.rindex("=") + 1 if clause.rpartition("=")[2].strip() and "=" in clause else 0
    clause = clause[start:]
    found = values(clause)
    if not found or found[0][2].kind == "?":
        return None
    again = len(found) == 2 and found[1][2].equals(found[0][2])  # 1/2 or 0.5
    if GOES_ON.match(clause[found[0][1] :]) and not again:
        return None
    if hedged(clause) or hedged(text[start:], lists=False):  # a doubt may stand in the next clause
        return None
    return clause[found[0][0] : found[0][1]].strip(MARKUP)


def same_text(a: str, b: str) -> bool:
    """Equal as texts but for case, markup around them and a full stop."""
    left, right = (squeeze(plain(text)).strip(MARKUP).rstrip(".").strip(MARKUP).casefold() for text in (a, b))
    return left == right


def _plain(number: str) -> str:
    return re.sub(r"[,$\s]", "", number).replace("−", "-")


def _math_answer(text: str) -> str | None:
    inside = boxed_answer(text)
    if inside is not None:
        return inside or None
    found = sorted((m for mark in (ANSWER_MARK, HASHES) for m in mark.finditer(text)), key=lambda m: m.start())
    for last in found[-1:]:
        said = text[last.end() :].strip().partition("\n")[0].strip().rstrip(".")
        end = None if hedged(said, lists=False) or ONE_OF.fullmatch(said) else SENTENCE_END.search(said)
        return (said[: end.start()] if end else said).strip() or None
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else None


# ------------------------------------------------------------------------------------------------ the graders


def _gsm8k() -> Grader:
    def wanted(answer: str) -> str:
        marked = marked_answer(answer)
        return answer.strip() if marked is None else marked

    def same(found: str, answer: str, row: Row | None) -> bool:
        if same_text(found, wanted(answer)):
            return True
        mine, its = only_value(found), only_value(wanted(answer))
        return mine is not None and its is not None and mine.equals(its)

    def right(text: str, answer: str, row: Row | None) -> bool:
        said = marked_answer(text)
        if not said:
            return False
        if same_text(said, wanted(answer)):
            return True
        if hedged(said, lists=False):
            return False
        if same_text(re.split(r"[.!?;](?=\s)", said)[0], wanted(answer)):
            return True
        found = declared(said)
        return found is not None and same(found, answer, row)

    return Grader("gsm8k", "3", {}, final_answer, same, right=right, shown="#### {}")


def _number() -> Grader:
    def extract(text: str) -> str | None:
        found = last_value(text)
        return _plain(found[0]) if found and not last_is_hedged(text) else None

    def same(found: str, answer: str, row: Row | None) -> bool:
        said, wanted = last_value(found), last_value(answer)
        return said is not None and wanted is not None and said[1].equals(wanted[1]) and not last_is_hedged(found)

    return Grader("number", "3", {}, extract, same, right=same, reads=lambda answer, row: extract(answer) is not None)


def _math(timeout: float = 5.0) -> Grader:
    from curate.measurements.grading_math import (  # math-verify and sympy, in a child process of their own
        MathEquality,
        version,
    )

    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        raise UsageError(f"grader math: timeout is {timeout!r}, expected seconds above 0.")
    equality = MathEquality(timeout=float(timeout))

    def same(found: str, answer: str, row: Row | None) -> bool:
        inside = boxed_answer(answer)
        wanted = answer.strip() if inside is None else inside
        if inside is None and (HASHES.search(answer) or ANSWER_MARK.search(answer)):
            wanted = _math_answer(answer) or wanted
        if (hedged(found, lists=False) or ONE_OF.fullmatch(found)) and not hedged(wanted, lists=False):
            return False
        return same_answer(found.strip("$ "), wanted.strip("$ ")) or equality(wanted, found)

    made = f"3+math-verify-{version()}"
    settings = {"timeout": float(timeout)}
    return Grader("math", made, settings, _math_answer, same, close=equality.close, shown="\\boxed{{}}")


def _choice(letters: str = "ABCD") -> Grader:
    if not isinstance(letters, str) or not re.fullmatch(r"[A-Z]+", letters):
        raise UsageError(f"grader choice: letters is {letters!r}, expected capitals such as ABCD.")
    choice = Choice(letters)

    def same(found: str, answer: str, row: Row | None) -> bool:
        wanted = choice.of_reference(answer, row)
        if wanted is None:
            raise NoVerdict(
                "cannot grade",
                f": the answer {answer!r} names none of the letters {letters}. For more letters: {{choice: ABCDEFGHIJ}}.",
            )
        return found == wanted

    def right(text: str, answer: str, row: Row | None) -> bool:
        found = choice.of_text(text, row)
        return same(found or "", answer, row)

    def reads(answer: str, row: Row | None) -> bool:
        return choice.of_reference(answer, row) is not None

    return Grader("choice", "3", {"letters": letters}, choice.of_text, same, right=right, reads=reads)


def _exact(ignore_case: bool = False) -> Grader:
    if not isinstance(ignore_case, bool):
        raise UsageError(f"grader exact: ignore_case is {ignore_case!r}, expected true or false.")

    def same(found: str, answer: str, row: Row | None) -> bool:
        a, b = squeeze(found), squeeze(answer)
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
        found = list(compiled.finditer(text))
        if not found or _is_hedged_match(text, found, group):
            return None
        return found[-1].group(group)

    def same(found: str, answer: str, row: Row | None) -> bool:
        matches = list(compiled.finditer(answer))
        if matches and len(matches[-1].group()) > len(
            matches[-1].group(group) or ""
        ):  # a whole solution, read as the text is
            return same_answer(found, matches[-1].group(group) or "")
        return same_answer(found, answer)

    return Grader("regex", "3", {"pattern": pattern}, extract, same)


def _is_hedged_match(text: str, found: Sequence[re.Match[str]], group: str | int) -> bool:
    """Whether the last match is one of two that could be meant: "x = 5 or x = 6", "x = 5 or 6", "Answer: A or B"."""
    last = found[-1]
    if last.group(group) is None:
        return False
    said = last.group(group)
    if len(found) > 1 and found[-2].group(group) is not None and not same_answer(found[-2].group(group), said):
        if in_doubt(text[found[-2].end() : last.start()]):
            return True
    line = text[last.start(group) :].partition("\n")[0]
    if whole_value(said) is not None:
        return hedged(line, lists=False)
    return len(said) == 1 and said.isalpha() and bool(OTHER_LETTER.match(line))


def _of_your_own(spec: str, settings: Any, folder: str | Path | None) -> Grader:
    settings = settings if isinstance(settings, Mapping) else {"threshold": settings}
    unknown = sorted(map(str, set(settings) - {"threshold"}))
    if unknown:
        raise UsageError(f"grader {spec!r}: there is no setting {unknown[0]!r}; a grader of your own takes threshold.")
    threshold = settings.get("threshold")
    if settings and (
        isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold)
    ):
        raise UsageError(f"grader {spec!r}: threshold is {threshold!r}, expected a number.")
    function = load_object(spec, what="grader", folder=folder)
    try:
        takes_row = places(function, 2, 3) == 3
    except TypeError:
        raise UsageError(f"grader {spec!r}: expected a function of (text, answer) or (text, answer, row).") from None

    def same(text: str, answer: str, row: Row | None) -> bool:
        try:
            verdict = function(text, answer, row) if takes_row else function(text, answer)
        except Exception as error:
            raise NoVerdict("failed", f": {type(error).__name__}: {error}") from error
        return _verdict(verdict, spec, threshold)

    return Grader(spec, source_version(function), dict(settings), lambda text: text, same, needs_answer=False)


def _verdict(said: Any, spec: str, threshold: float | None) -> bool:
    """What a grader of the user's own says, as right or wrong."""
    kind = type(said).__name__
    is_bool = kind in ("bool", "bool_")  # numpy's too
    is_number = not is_bool and isinstance(said, numbers.Real) and math.isfinite(said)
    if is_bool and threshold is None:
        return bool(said)
    if is_number and threshold is not None:
        return bool(said >= threshold)
    found = f"returned {said!r} ({kind})"
    if threshold is not None:
        raise NoVerdict(found, f", expected a number to compare with its threshold {threshold:g}.")
    hint = f" For a number say what is right: `grader: {{{spec}: {{threshold: 0.5}}}}`." if is_number else ""
    raise NoVerdict(found, f", expected True or False.{hint}")


# name -> (how it is made, the setting that may stand alone: {regex: "…"} is {regex: {pattern: "…"}})
_MAKERS: dict[str, tuple[Callable[..., Grader], str | None]] = {
    "gsm8k": (_gsm8k, None),
    "number": (_number, None),
    "math": (_math, None),
    "choice": (_choice, "letters"),
    "exact": (_exact, None),
    "regex": (_regex, "pattern"),
}
