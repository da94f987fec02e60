r"""Answers that are hedged: "5 or 6", "5 apples (or maybe 6)", "The answer is 5. The answer is 6." A hedged answer is none, so that it is wrong.

No hedge is the same value said twice ("1/2 or 0.5", "2 hours or 120 minutes": another unit), nor a revision ("The answer is 5. Wait, the answer
is 6.", or on a line of its own): there the last one counts.
"""

from __future__ import annotations

import itertools
import re

from curate.measurements.grading_values import MARKUP, Value, normalised, values

Placed = tuple[int, int, Value]  # start, end, value
REVISED = re.compile(
    r"(?i:\b(?:wait|no|not|wrong|actually|sorry|correction|corrected|mistake|instead|rather|scratch|oops|hmm|but|however|so|thus|hence|therefore|"
    r"then|total|half|twice|after|finally|now)\b)|=\s*$|n['’]t\b"
)
DOUBT = r"(?:or|maybe|perhaps|possibly|alternatively)"
LINK = r"(?:it|could|can|might|may|be|also|even|else|maybe|perhaps|possibly|about|is|either|the|answer)"
BETWEEN = re.compile(  # what stands between two values of which one is meant
    rf"(?P<unit>[^\d,.;:!?|/&()\n]*?)\s*[.,;:!?]?\s*\(?\s*(?:(?:but|and)\s+)?(?:\band\s*/\s*or\b|\b{DOUBT}\b|\b(?:could|might|may)\s+(?:also\s+)?be\b)"
    rf"[\s,:]*(?:\b{LINK}\b\s*)*[-+($€£\s]*",
    re.IGNORECASE,
)
LISTED = re.compile(  # what stands between the values of a list
    r"[^\d,.;:!?|/&()\n=<>*+^]*?(?:\s+and\s+|\s*[;|&/]\s*|,\s*|\s+to\s+|\s*[-–]\s*)[-+($€£\s]*|[\s$€£]+", re.IGNORECASE
)
AND = re.compile(r"\s*(?:\band\b|[,;|&])\s*[$€£]*", re.IGNORECASE)
MARKED = re.compile(r"^.*?\banswer\s*(?:is)?\s*[:=]?\s*(?:between\s+)?", re.IGNORECASE)
GIVES_WAY = re.compile(
    r"\b(?:because|since|as|so|not|instead|rather|which|where|when|after|than|if|for|of|in)\b", re.IGNORECASE
)


OTHER_LETTER = re.compile(
    rf"\w\W{{0,4}}?\s*(?:\b{DOUBT}\b|/|\band\s*/\s*or\b)[\s,]*(?:\b{LINK}\b\s*)*\W{{0,3}}(?-i:[A-Z])(?!\w)", re.I
)


def in_doubt(between: str) -> bool:
    """Whether "or", or a word like it, is all that stands between two answers."""
    return bool(BETWEEN.fullmatch(between))


def is_revised(between: str) -> bool:
    """Whether a second answer on the same line takes the first one's place, by what stands between them."""
    return bool(REVISED.search(between))


def hedged(answer: str, *, lists: bool = True) -> bool:
    """Whether the first value of an answer has another beside it that could be meant instead. lists: or one that is given with it ("5 and 6")."""
    text = normalised(answer)
    placed = values(text)
    return any(_beside(text, one, other, lists=lists) for one, other in itertools.pairwise(placed) if one is placed[0])


def last_is_hedged(answer: str) -> bool:
    """Whether the last value of a text is one of two that could be meant, or of a list that is all that its line says."""
    text = normalised(answer).strip()
    placed = values(text)
    if len(placed) > 1 and _beside(text, placed[-2], placed[-1], lists=False):
        return True
    line = MARKED.sub("", text.rpartition("\n")[2]).strip(MARKUP + ".")
    placed = values(line)
    if len(placed) < 2 or line[: placed[0][0]].strip(MARKUP) or line[placed[-1][1] :].strip(MARKUP):
        return False
    return all(
        AND.fullmatch(line[one[1] : other[0]]) and not one[2].equals(other[2])
        for one, other in itertools.pairwise(placed)
    )


def _beside(text: str, one: Placed, other: Placed, *, lists: bool) -> bool:
    if one[2].equals(other[2]):
        return False
    between = text[one[1] : other[0]].replace("$", " ").replace("*", " ")
    doubt = BETWEEN.fullmatch(between)
    if doubt:
        unit, its = doubt["unit"].strip(MARKUP), re.match(r"\s*([A-Za-z]*)", text[other[1] :])
        restated = unit and its and its[1] and its[1].casefold() != unit.casefold()
        return not restated and not GIVES_WAY.search(unit)
    return lists and bool(LISTED.fullmatch(between)) and not GIVES_WAY.search(between)
