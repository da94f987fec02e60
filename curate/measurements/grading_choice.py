r"""Which option of a multiple-choice question a text declares: the letter that is called the answer, whatever is said of the others after it.

    1  declared     "Answer: B", "the answer is (B)", \boxed{B}, "I choose B", "B is correct", "B it is"; the last one counts
    2  concluded    "so it must be B", "hence (B)"
    3  opening      "B", "(B) because …", "B. Paris" at the start of a text that lists no other option
    4  mentioned    the last (B), the last line that begins with a letter, a lone letter at the end
    5  by its text  "Paris", where the question lists "B. Paris"

A letter that is denied ("not A", "A is wrong", "why not C", "I would not choose A") is none. A declared letter beyond the options is an
answer that is wrong, and ends the search. So is a hedged answer: "A or B", "A/B", "A and C",
\boxed{A, B}, "Answer: A. Answer: B".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from curate.measurements.grading_hedged import DOUBT, LINK, is_revised
from curate.rows import Example, Row, text_of

OPEN = r"(?:\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{\s*)*[(\[*_\"'$`\s]*"
CLOSE = r"[)\]}*_\"'$`]*"
LETTER = rf"{OPEN}(?P<letter>[A-Za-z])(?![\w'’]){CLOSE}"
NAMED = r"(?i:option|choice|letter)?\s*"
BEFORE = re.compile(
    rf"(?i:\banswer(?:\s+(?:is|would\s+be|must\s+be|should\s+be))?\b\s*[:=]?|\bboxed\b|\b(?:choose|pick|select|go(?:ing)?\s+(?:with|for))\b|"
    rf"\b(?:correct|right|best)\s+(?:option|choice|one)\s*(?:is|:)?|####)\s*{NAMED}{LETTER}"
)
AFTER = re.compile(
    rf"(?<![\w'’])(?:(?i:option|choice)\s+)?{LETTER}\s*(?i:[:,-]\s*(?:yes|correct|right|true)\b|\s+it\s+is\b|\s+is\s+(?:the\s+)?(?:correct|right|best|answer|true)\b)"
)
CONCLUDED = re.compile(
    rf"(?i:\b(?:so|therefore|thus|hence|must\s+be|conclude|leaves|leaving|but|go\s+with)\b)[\s,:]*(?i:(?:it|that|the\s+answer|this)\s+(?:is|must\s+be|leaves)\s+)?{NAMED}{LETTER}(?=\s*[.!,;]|\s*$|\n|\s+(?i:because|since)\b)"
)
BRACKETED = re.compile(r"[(\[{]\s*(?P<letter>[A-Za-z])\s*[)\]}]")
LINE = re.compile(r"(?m)^\W*(?P<letter>[A-Z])(?:\s*$|[.):,])")
ALONE = re.compile(r"(?:^|\s)[\W_]*(?P<letter>[A-Z])[\W_]*$")
OPENING = re.compile(
    rf"\s*{OPEN}(?P<letter>[A-Za-z])(?![\w'’])(?:{CLOSE}\s*$|{CLOSE}[.):,;]|{CLOSE}\s+(?=because|since|as\b|for\b)|{CLOSE}\s*\n)"
)
LISTED = re.compile(r"(?m)^\s*[(\[*]*[A-Z][)\].:]+\s")
DENIED_BEFORE = re.compile(
    r"(?i:\b(?:not|never|cannot|neither|nor|why|than|instead\s+of|rules?\s+out|exclude|eliminate)\b|n['’]t\b)"
)
CLAUSE = re.compile(
    r"[.!?;\n]|\b(?i:but)\b|,\s+(?=(?i:so|therefore|thus|hence|i|it|the|then|we|my|that|this|which|leaving)\b)"
)  # where what was denied before is over
DENIED_AFTER = re.compile(
    rf"{CLOSE}\s*,?\s*(?i:(?:is|was|are|would\s+be|seems|looks|can)\s*(?:also\s+)?(?:not\b|n['’]t|wrong|incorrect|false|out\b|impossible)|"
    rf"(?:do|does)\s*(?:not\b|n['’]t)|being\s+(?:wrong|incorrect|false|out)\b|isn['’]t|cannot|can['’]t|fails|is\s+ruled|[:,-]?\s*(?:no|wrong|incorrect|false)\b)"
)
# "the answer is a dog", "the answer I found": a small letter, or A or I, is an option only where no word follows it
WORD_FOLLOWS = re.compile(
    r"[ \t]+(?!(?i:because|since|as|for|and|but|so|not|which|while|in|with|here|or|is|it)\b)[a-z]"
)
INLINE = re.compile(r"(?<![\w'’])[(\[]?([A-Z])[)\].:]?\s+(.+?)(?=\s+[(\[]?[A-Z][)\].:]?\s|\s*$)")

# Another letter that is given beside one. After it and words of the option's own: "B) Paris or C) Berlin"; joined to it: "A and C", "A/B", "A, B".
NO_OPTION = r"(?i:because|since|as|and|or|but|for|not|neither|nor|rather|than|instead|while|so|is|was|if|though)"
WORDS = rf"(?:[ \t]+(?!{NO_OPTION}\b)(?![A-Z]\b)[^\s.,;:!?/|()]+){{0,8}}?"
OTHER = rf"(?:(?i:option|choice|letter|answer)\s+)?{OPEN}(?P<other>[A-Za-z])(?![\w'’]){CLOSE}"
IN_DOUBT = re.compile(
    rf"{CLOSE}[.):]?{WORDS}\s*[.,;!?]?\s*\(?\s*(?:(?i:but|and)\s+)?(?i:and\s*/\s*or\b|\b{DOUBT}\b|\b(?:it\s+)?(?:could|might|may)\s+(?:also\s+)?be\b)"
    rf"[\s,:]*(?i:\b{LINK}\b\s*)*{OTHER}|{CLOSE}\s*[/|]\s*{OTHER.replace('other', 'slash')}"
    rf"|{CLOSE}{WORDS}[,;]\s*[(\[](?P<listed>[A-Z])[)\]]"
)
JOINED = re.compile(
    rf"{CLOSE}\s*(?i:,\s*and\b|\band\b|as\s+well\s+as\b|[,;&+])\s*(?i:\balso\b|\bboth\b)?\s*{OTHER}"
    rf"(?=\s*(?:$|[.,;!?)\n&+/]|(?i:and|or|both|are|because|since)\b))"
)
BESIDE_BEFORE = re.compile(
    rf"(?<![\w'’])(?P<other>[A-Za-z]){CLOSE}\s*(?i:,?\s*\b(?:and\s*/\s*or|{DOUBT}|and|(?:it\s+)?(?:could|might|may)\s+(?:also\s+)?be)\b|[/|&+])[\s,:]*(?i:\b{LINK}\b\s*)*(?i:option|choice|letter|answer)?\s*{OPEN}$"
)
COMMA_BEFORE = re.compile(rf"(?<![\w'’])(?P<other>[A-Za-z]){CLOSE}\s*,\s*{OPEN}$")
# more letters of a list that one word denies: "A, B and C are wrong"
LIST_GOES_ON = re.compile(rf"(?:\s*(?:,\s*(?i:and|or)\b|(?i:\band|\bor)\b|[,&/])\s*{OPEN}[A-Za-z](?![\w'’]){CLOSE})*")
ONLY_LETTERS = re.compile(rf"(?:{OPEN}[A-Za-z](?![\w'’]){CLOSE}[\s.,;:]*)+")
IS_MARK = re.compile(r"(?i)\W*(?:answer|boxed|####)")


class Choice:
    """The options by their letters."""

    def __init__(self, letters: str):
        self.letters = letters

    def of_text(self, text: str, row: Row | None = None) -> str | None:
        """The letter that a text declares; None where it declares none, or one beyond the options."""
        text = re.sub(r"\\text\w*\s*\{\s*(or|and|and/or)\s*\}", r" \1 ", text.strip())
        cut = re.search(r"\n\s*(?i:question|problem|q)\s*\d*\s*[:.]", text)
        if cut and cut.start():  # a next question, and what is answered there, is not this row's
            return self.of_text(text[: cut.start()], row)
        if len(text) == 1:
            return text.upper() if text.upper() in self.letters else None
        for tier in ((BEFORE, AFTER), (CONCLUDED,)):
            declared = [match for pattern in tier for match in self._affirmed(pattern, text)]
            if declared:
                declared.sort(key=lambda match: match.start("letter"))
                last = declared[-1]["letter"].upper()
                if self._hedged(declared[-1], text) or self._twice(declared, text):
                    return None
                return last if last in self.letters else None
        if ONLY_LETTERS.fullmatch(text) and len(set(re.findall(r"(?<![A-Za-z])[A-Z](?![a-z])", text.upper()))) > 1:
            return None
        opening = OPENING.match(text)
        if opening and self._hedged(opening, text):
            return None
        if opening and not self._denied(opening, text) and not LISTED.search(text, opening.end()):
            letter = opening["letter"]
            if letter.isupper() or opening.end() == len(text) or text[opening.end() - 1] == ")":
                return letter.upper() if letter.upper() in self.letters else None
        for pattern in (BRACKETED, LINE, ALONE):
            within = [m for m in self._affirmed(pattern, text) if m["letter"].upper() in self.letters]
            if within:
                return None if self._hedged(within[-1], text, lists=True) else within[-1]["letter"].upper()
        return self._by_text(text, row)

    def of_reference(self, answer: str, row: Row | None = None) -> str | None:
        """The letter of a reference: one by its text first, where the question lists it."""
        return self._by_text(answer, row) or self.of_text(answer, row)

    def _affirmed(self, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
        """Matches whose letter is meant as an option, and not denied."""
        for match in pattern.finditer(text):
            letter, end = match["letter"], match.end("letter")
            if (letter.islower() or letter in "AI") and WORD_FOLLOWS.match(text, end) and pattern is not AFTER:
                continue
            if letter.upper() not in self.letters and not re.match(rf"{CLOSE}\s*(?:[.,;:!\n]|$)", text[end:]):
                continue
            if not self._denied(match, text):
                yield match

    def _denied(self, match: re.Match[str], text: str) -> bool:
        start, end = match.start("letter"), match.end("letter")
        before = CLAUSE.split(text[max(0, start - 80) : start])[-1]
        return bool(DENIED_BEFORE.search(before) or DENIED_AFTER.match(text, end))

    def _hedged(self, match: re.Match[str], text: str, *, lists: bool = False) -> bool:
        """Whether another option is given beside this one. lists: also one before a comma."""
        letter, start, end = match["letter"], match.start("letter"), match.end("letter")
        for after in (IN_DOUBT.match(text, end), JOINED.match(text, end)):
            other = next(
                (group for group in ("other", "slash", "listed") if after and after.groupdict().get(group)), ""
            )
            if (
                after
                and self._is_other(after[other], letter, text, after.end(other))
                and not self._dismissed(text, after.end(other))
            ):
                return True
        head = text[max(0, start - 60) : start]
        for before in (BESIDE_BEFORE.search(head), COMMA_BEFORE.search(head) if lists else None):
            if before and self._is_other(before["other"], letter, "", 0):
                clause = CLAUSE.split(head[: before.start()])[-1]
                return not DENIED_BEFORE.search(clause)
        return False

    def _dismissed(self, text: str, end: int) -> bool:
        """Whether another letter, or the list that begins with it, is denied right after: "A and C are wrong"."""
        rest = LIST_GOES_ON.match(text, end)
        return bool(DENIED_AFTER.match(text, end) or (rest and DENIED_AFTER.match(text, rest.end())))

    def _is_other(self, other: str, letter: str, text: str, end: int) -> bool:
        """Whether a letter is another option, and no word ("a", "I")."""
        if other.upper() == letter.upper() or (other.islower() and letter.isupper()):
            return False
        return not ((other.islower() or other in "AI") and WORD_FOLLOWS.match(text, end))

    def _twice(self, declared: list[re.Match[str]], text: str) -> bool:
        """Whether the line of the last answer declares another one too, and no word says that the last takes its place."""
        last = declared[-1]
        alike = [
            m for m in declared if (m.re is AFTER) == (last.re is AFTER) and (m.re is AFTER or IS_MARK.match(m[0]))
        ]
        if len(alike) < 2 or alike[-1] is not last or alike[-2]["letter"].upper() == last["letter"].upper():
            return False
        between = text[alike[-2].end("letter") : last.start("letter")]
        return "\n" not in between and not is_revised(between)

    def _by_text(self, text: str, row: Row | None) -> str | None:
        """The letter of the one option whose text this is, or declares; None where the question lists no such option."""
        options = self._options(row)
        if not options:
            return None
        after_mark = re.split(r"(?i:answer\s*(?:is)?\s*[:=]?)", text)[-1]
        for candidate in (_bare(text), _bare(after_mark)):
            matching = [letter for letter, option in options.items() if candidate and option == candidate]
            if len(matching) == 1:
                return matching[0]
        return None

    def _options(self, row: Row | None) -> dict[str, str]:
        """letter -> text of the options that a row's question lists, in their order from A; {} where it lists none."""
        if not isinstance(row, Example):
            return {}
        prompt = row.prompt if isinstance(row.prompt, str) else text_of(row.prompt[-1]) if row.prompt else ""
        by_line = re.findall(r"(?m)^\s*[(\[*]*([A-Z])[)\].:*]+\s*(.+?)\s*$", prompt)
        for listed in (by_line, [(m[1], m[2]) for m in INLINE.finditer(prompt)]):
            options = {letter: _bare(option) for letter, option in listed if letter in self.letters}
            if (
                len(options) >= 2
                and list(options) == list(self.letters[: len(options)])
                and len(listed) == len(options)
            ):
                return options
        return {}


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(" .*_\"'`()[]").casefold()
