"""What a short answer's value is, and whether two values are equal: numbers, fractions, percentages, times, tuples.

    1,234.50   −5   1e3   $5   5/2   3 1/2   3½   \\frac{5}{2}   50%   12:30   3:2   (1, 2)   [1; 2]

Both sides of a comparison are read by the same rules, and values are compared exactly (as fractions). A word beside a number is its unit and
does not count; 50% is 50 and is 0.5. Expressions are math-verify's (grading_math.py).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

SIGN = r"(?:(?<![\w.)\]])(?:[-+]|(?i:minus|negative)\s)\s?\$?)?"  # a minus after a digit, a letter or a bracket is an operator
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][-+]?\d{1,2}(?![\w.]))?"
COLON = r"(?<![\d:.])\d+(?::\d+)+(?![\d:])(?:\s*(?P<half>[ap])\.?m\b\.?)?"
FRACTION = rf"(?<![\d/])(?:(?P<whole>\d+)\s+)?(?P<top>{DIGITS})\s*/\s*\$?(?P<bottom>{DIGITS})(?!\s*/)"
NUMBER = rf"(?P<number>{DIGITS})"
VALUE = re.compile(
    rf"(?P<sign>{SIGN})(?:(?P<colon>{COLON})|{FRACTION}|{NUMBER})(?P<percent>\s*(?:%|percent\b|per cent\b))?", re.I
)
# What follows a number in a product or a power, and in a word that is no unit: "5x", "5 y", "5^2", "5k", "5\\pi", "5*x" are not 5.
UNITS = {
    *(
        "m",
        "g",
        "h",
        "l",
        "s",
        "c",
        "f",
        "km",
        "cm",
        "mm",
        "dm",
        "kg",
        "mg",
        "lb",
        "lbs",
        "oz",
        "ft",
        "in",
        "yd",
        "yds",
        "mi",
        "mph",
        "kph",
        "kmh",
    ),
    *(
        "hr",
        "hrs",
        "min",
        "mins",
        "sec",
        "ms",
        "ml",
        "cl",
        "kw",
        "kwh",
        "w",
        "am",
        "pm",
        "st",
        "nd",
        "rd",
        "th",
        "ct",
        "cts",
        "pc",
        "pcs",
        "pt",
        "pts",
        "d",
    ),
}
FUNCTION = r"(?:sqrt|sin|cos|tan|cot|log|exp|factorial|mod)"
IN_TERM = re.compile(
    rf"\s*(?:\^(?!\s*\{{?\s*\\?circ)|[√π∞])|\s*\\(?:pi|sqrt|sin|cos|tan|log|ln|exp|alpha|beta|gamma|theta|phi|lambda|infty|times|cdot|pm|div)\b"
    rf"|\s?{FUNCTION}(?![A-Za-z])|\s[xyz]\b|\s*[-+*/·×^]\s*\(?[xyzn]\b|\s?\(\s*(?:\d*\s*[-+*]?\s*)?[xyzn]\b",
)
WORD = re.compile(r"[A-Za-z]+")
AREA = re.compile(r"\d\s*(?:sq\.?\s*)?(?:[mcdk]?m|ft|in|inches|feet|yd|yards|mi|miles|meters|metres)\s*\^?\{?$", re.I)
BRACKETS = re.compile(r"[(\[{](?=[^()\[\]{}]*\d)([^()\[\]{}]*)[)\]}]")
LONGEST = 300  # characters: what is longer is no answer, and slow to compute with
MARKUP = " \t\n*_`\"'$€£¥₹"


@dataclass(frozen=True)
class Value:
    """Numbers joined by `kind`: "" of a lone number, ":" of a time or ratio, "," of a tuple, whose `brackets` are "" where it has none; "?" of a
    number that is a part of something else ("5x"), which equals nothing.
    """

    kind: str
    numbers: tuple[Fraction, ...]
    percent: bool = False
    half: str = ""  # a or p, of am and pm
    brackets: str = ""

    def equals(self, other: Value) -> bool:
        """Equal as values. What only one of them says (a percent sign, am or pm, brackets) does not tell them apart."""
        if self.kind != other.kind or self.kind == "?" or len(self.numbers) != len(other.numbers):
            return False
        for name in ("half", "brackets"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine and its and mine != its:
                return False
        if self.numbers == other.numbers:
            return True
        if self.percent == other.percent or self.kind:
            return False
        share, number = (self, other) if self.percent else (other, self)
        return share.numbers[0] / 100 == number.numbers[0]


def normalised(text: str) -> str:
    """The text in the characters that values are read in: one minus, one space, `1/2` for ½ and \\frac{1}{2}, no LaTeX around digits."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))|(?<=\d)(?:\\[,!]|\{,\})(?=\d{3})", ",", text)
    text = "".join(_vulgar(c) if unicodedata.category(c) == "No" else c for c in text)
    text = text.translate({0x2212: "-", 0xFE63: "-", 0xFF0D: "-", 0x2044: "/", 0x00A0: " ", 0x2009: " ", 0x202F: " "})
    text = re.sub(r"(?<![\w)\]])\s?[–—](?=\s?\$?[\d.])", "-", text)
    text = re.sub(r"\\[dt]?frac\s*(?:\{(-?\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))", _fraction, text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|boxed|fbox)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\\([$%])", r"\1", re.sub(r"\\(?:left|right|[,!;: ()])", " ", text))


def _vulgar(character: str) -> str:
    parts = unicodedata.normalize("NFKC", character)
    if unicodedata.decomposition(character).startswith("<super>"):
        return f"^{parts}"
    return f" {parts.replace(chr(0x2044), '/')}" if "\u2044" in parts else character


def _fraction(match: re.Match[str]) -> str:
    top, bottom = match[1] or match[3], match[2] or match[4]
    return f" {top}/{bottom}"


def values(text: str) -> list[tuple[int, int, Value]]:
    """(start, end, value) of everything in a text that has gone through `normalised`; a tuple counts once, its members do not."""
    entries: list[tuple[int, int, Value]] = []
    for bracket in BRACKETS.finditer(text):
        members = _members(bracket[1])
        if members is not None:
            entries.append((bracket.start(), bracket.end(), Value(",", members, brackets=text[bracket.start()])))
    inside = [(start, end) for start, end, _ in entries]
    for match in VALUE.finditer(text):
        if not any(start <= match.start() < end for start, end in inside):
            value = _value(match)
            if value is not None and AREA.search(text, max(0, match.start() - 14), match.start()):
                continue  # 25 cm^2
            if value is not None and not value.kind and _in_term(text, match.start(), match.end()):
                value = Value("?", ())
            if value is not None:
                entries.append((match.start(), match.end(), value))
    return sorted(entries, key=lambda one: one[0])


def whole_value(text: str) -> Value | None:
    """The value that a text is, nothing but markup around it; None where there is more, or none."""
    if len(text) > LONGEST:
        return None
    text = normalised(text).strip(MARKUP).rstrip(".").strip(MARKUP)
    entries = values(text)
    if len(entries) == 1 and not text[: entries[0][0]].strip("( [") and not text[entries[0][1] :].strip(") ]."):
        return entries[0][2] if entries[0][2].kind != "?" else None
    members = _members(text)
    return Value(",", members) if members is not None else None


def only_value(text: str) -> Value | None:
    """The value that a text says: its only one, what follows its last "=" where that has one; None where there are several, or none."""
    text = normalised(text)
    for part in (text, text.rpartition("=")[2] if "=" in text else ""):
        entries = values(part)
        if len(entries) == 1:
            return entries[0][2] if entries[0][2].kind != "?" else None
    return whole_value(text)


def last_value(text: str) -> tuple[str, Value] | None:
    """The last value that a text says, and how it stands there."""
    text = normalised(text)
    tail = text[-LONGEST:]
    entries = values(tail)
    if tail != text and (not entries or entries[-1][0] == 0):  # it may begin before the tail
        tail, entries = text, values(text)
    return (tail[entries[-1][0] : entries[-1][1]], entries[-1][2]) if entries else None


def _in_term(text: str, start: int, end: int) -> bool:
    """Whether a number is a part of a term: "5x", "x5", "5^2", "5k"."""
    if re.search(r"(?<![A-Za-z])[A-Za-z]$", text[max(0, start - 2) : start]):
        return True
    word = WORD.match(text, end)
    if word and not re.match(FUNCTION, word[0]):
        name = word[0].lower()
        return name not in UNITS and (len(name) < 3 or not re.search("[aeiou]", name))
    return bool(IN_TERM.match(text, end))


def _members(text: str) -> tuple[Fraction, ...] | None:
    """The numbers of a tuple, by what separates them; None where it is none, or has one member."""
    separator = r";" if ";" in text else r",\s+" if re.search(r",\s", text) else r"," if "," in text else r"\s+"
    parts = [part.strip(MARKUP) for part in re.split(separator, text.strip())]
    if len(parts) < 2 or (separator == r"\s+" and VALUE.fullmatch(text.strip())):
        return None
    matches = [VALUE.fullmatch(part) for part in parts]
    read = [_value(match) if match else None for match in matches]
    if any(value is None or value.kind for value in read):
        return None
    return tuple(value.numbers[0] for value in read if value is not None)


def _value(match: re.Match[str]) -> Value | None:
    if match.end() - match.start() > LONGEST:
        return None
    percent, negative = bool(match["percent"]), match["sign"][:1].lower() in ("-", "m", "n") and bool(match["sign"])
    if match["colon"]:
        numbers = tuple(Fraction(part) for part in re.findall(r"\d+", match["colon"]))
        return Value(":", numbers, half=(match["half"] or "").lower())
    if match["number"]:
        number = Fraction(match["number"].replace(",", ""))
    else:
        bottom = Fraction(match["bottom"].replace(",", ""))
        if not bottom:
            return None
        number = Fraction(match["whole"] or 0) + Fraction(match["top"].replace(",", "")) / bottom
    return Value("", (-number if negative else number,), percent)
