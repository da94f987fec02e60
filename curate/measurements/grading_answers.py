"""The answer that a text gives: the last number, the last box, what follows "The answer is" or "####".

Each function returns None where a text gives no answer, or gives several without taking one back (grading_hedged.py). What a value is:
grading_values.py.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from decimal import Decimal

from curate.measurements.grading_hedged import hedged, is_revised
from curate.measurements.grading_values import MARKUP, normalised, values, whole_value

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


def as_number(text: str) -> Decimal | None:
    """The number that the whole of `text` is: "$1,234.50" and "−5" are numbers, "5 apples" is none."""
    digits = text.strip().replace("−", "-").replace("{,}", ",").replace("\\$", "").replace("$", "").rstrip(".")
    digits = re.sub(r"^([-+])\s+", r"\1", digits.strip())
    if not re.fullmatch(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?", digits) or not re.search(r"\d", digits):
        return None
    return Decimal(digits.replace(",", ""))


def last_number(text: str) -> str | None:
    """The last number in a text, with its sign, without $ and commas; None where there is none.

    A minus counts as a sign unless it follows a digit, a letter or a closing bracket ("10-5" ends in 5).
    """
    numbers = list(NUMBER.finditer(text.replace("{,}", ",").replace("\\$", "$")))
    return bare_number(numbers[-1].group()) if numbers else None


def same_answer(given: str, answer: str) -> bool:
    """Equal as values where both are (grading_values.py), else as texts (see `squeeze`)."""
    a, b = whole_value(given), whole_value(answer)
    return a.equals(b) if a is not None and b is not None else squeeze(given) == squeeze(answer)


def squeeze(text: str) -> str:
    """The text with each run of whitespace as one space, none around it, and Unicode's composed forms."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def boxed_answer(text: str) -> str | None:
    """The last box of a text; with those that stand on its line and differ, where no word says that it takes their place."""
    boxes = [(m.start(), m.end(), boxed(m.group())) for m in ONE_BOX.finditer(text)]
    last = boxed(text)
    if last is None or not boxes or boxes[-1][2] != last:
        return last
    answers = [last]
    for (_, end, inside), (start, _, _) in reversed(list(itertools.pairwise(boxes))):
        between = text[end:start]
        if "\n" in between or is_revised(between):
            break
        if inside and not any(same_answer(inside, other) for other in answers):
            answers.insert(0, inside)
    return ", ".join(answers)


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
        marks = list(mark.finditer(text))
        if marks:
            after = next((m.start() for m in NEXT_QUESTION.finditer(text) if m.start() > marks[0].end()), len(text))
            last = [m for m in marks if m.end() <= after][-1]
            statement = re.sub(r"^[ :\t]*\n?", "", text[last.end() : max(after, last.end())]).partition("\n")[0].strip()
            statement, _, other = statement.partition("####")
            if other.strip() and not is_revised(statement) and not _state_the_same(statement, other):
                return f"{statement.strip()} or {other.strip()}"
            before = list(MARKS.finditer(text[text.rfind("\n", 0, last.start()) + 1 : last.start()]))
            if before:  # two answers on one line: both, unless the second takes the first one's place
                line = text[text.rfind("\n", 0, last.start()) + 1 : last.start()]
                first = line[before[-1].end() :]
                if not is_revised(first) and not _state_the_same(first, statement):
                    return f"{first.strip()} or {statement}"
            return statement
    return text.strip() if whole_value(text) is not None else None


def _state_the_same(first: str, second: str) -> bool:
    one, other = declared(first), declared(second)
    if one is None or other is None:
        return same_text(re.split(r"[.!?;,](?=\s|$)", first)[0], re.split(r"[.!?;,](?=\s|$)", second)[0])
    return same_answer(one, other)


def final_answer(text: str) -> str | None:
    """GSM8K's: of what `marked_answer` finds the value that is declared first, else the text; None where nothing is.

    "$1,234." is 1234; of "5 * 3 = 15 apples" the number after the last "=" is the answer.
    """
    statement = marked_answer(text)
    if statement is None:
        return None
    value = declared(statement)
    return bare_number(value) if value is not None else statement.rstrip(".").strip() or None


def declared(statement: str) -> str | None:
    """The value that a sentence's first clause says, as it stands there; None where it says none, or several, or is hedged."""
    text = normalised(statement)
    end = next((m.start() for m in CLAUSE_END.finditer(text) if text[: m.start()].strip(MARKUP)), len(text))
    clause = text[:end]
    start = clause.rindex("=") + 1 if clause.rpartition("=")[2].strip() and "=" in clause else 0
    clause = clause[start:]
    listed = values(clause)
    if not listed or listed[0][2].kind == "?":
        return None
    again = len(listed) == 2 and listed[1][2].equals(listed[0][2])  # 1/2 or 0.5
    if GOES_ON.match(clause[listed[0][1] :]) and not again:
        return None
    if hedged(clause) or hedged(text[start:], lists=False):  # a doubt may stand in the next clause
        return None
    return clause[listed[0][0] : listed[0][1]].strip(MARKUP)


def same_text(a: str, b: str) -> bool:
    """Equal as texts but for case, markup around them and a full stop."""
    left, right = (squeeze(normalised(text)).strip(MARKUP).rstrip(".").strip(MARKUP).casefold() for text in (a, b))
    return left == right


def bare_number(number: str) -> str:
    return re.sub(r"[,$\s]", "", number).replace("−", "-")


def math_answer(text: str) -> str | None:
    inside = boxed_answer(text)
    if inside is not None:
        return inside or None
    marks = sorted((m for mark in (ANSWER_MARK, HASHES) for m in mark.finditer(text)), key=lambda m: m.start())
    for last in marks[-1:]:
        statement = text[last.end() :].strip().partition("\n")[0].strip().rstrip(".")
        end = None if hedged(statement, lists=False) or ONE_OF.fullmatch(statement) else SENTENCE_END.search(statement)
        return (statement[: end.start()] if end else statement).strip() or None
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else None
