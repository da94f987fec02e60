"""Graders: is a sampled answer right?

    gsm8k    the final answer after the last "The answer is", else after the last "####"; numbers are compared as numbers
    number   the last number in the text
    math     the last \\boxed{…}, else the final answer; equality is mathematical (math-verify): \\frac{1}{2} = 0.5
    choice   a letter: A, (A), "Answer: B", \\boxed{C}
    exact    the whole text; runs of whitespace count as one space
    {regex: …}                   the last match's group `answer`, else its group 1
    package.module:function      your own: (text, answer) or (text, answer, row) -> bool

Each is a name, or a name with its settings: {choice: {letters: ABCDE}}, {exact: {ignore_case: true}}, {regex: {pattern: …}}.
An answer that a text does not give is wrong, not unknown.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from curate.errors import UsageError
from curate.objects import load_object, places, source_version
from curate.rows import Row

# A minus is a sign unless it follows a digit, a letter, a point or a closing bracket.
NUMBER = re.compile(r"(?:(?<![\w.)\]])[-−]\$?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
THE_ANSWER_IS = re.compile(r"the answer is", re.IGNORECASE)
HASHES = re.compile(r"####")
ANSWER_MARK = re.compile(r"(?:the |final )?answer(?: is)?\s*[:=]|(?:the |final )answer is", re.IGNORECASE)


@dataclass(frozen=True)
class Grader:
    """One way of grading. name: what a recipe writes. version: changes when the rule does. params: its settings.

    extract: the answer that a text gives, None where it gives none (a callable's is the text). same: whether it equals the reference.
    """

    name: str
    version: str
    params: Mapping[str, Any]
    extract: Callable[[str], str | None]
    same: Callable[[str, str, Row | None], bool]
    needs_answer: bool = True
    close: Callable[[], None] = field(default=lambda: None)

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
            where = f"row {row.row_id}" if row is not None else "a row"
            raise UsageError(
                f"grader {self.name}: {where} has no answer to compare with (found {answer!r}). "
                "Name the column with the reference answers: `source.columns: {answer: …}`."
            )
        found = self.extract(text)
        return found is not None and self.same(found, answer if answer is None else str(answer), row)  # type: ignore[arg-type]


def grader(spec: str | Mapping[str, Any], *, folder: str | Path | None = None) -> Grader:
    """The grader that a recipe names. folder: where a module of the user's own is looked for too, usually the recipe's.

    Raises UsageError: an unknown grader (the nearest is offered), unknown settings, a pattern that does not compile or has no group.
    """
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
        return _of_your_own(name, folder)
    if name not in _MAKERS:
        near = difflib.get_close_matches(name, _MAKERS, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
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
            near = difflib.get_close_matches(str(key), allowed, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(allowed) or 'none'}."
            raise UsageError(f"grader {name}: there is no setting {key!r}; {hint}")
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
    """Equal as numbers where both are numbers, else as texts (see `squeeze`)."""
    a, b = as_number(found), as_number(answer)
    return a == b if a is not None and b is not None else squeeze(found) == squeeze(answer)


def squeeze(text: str) -> str:
    """The text with each run of whitespace as one space, none around it, and Unicode's composed forms."""
    return " ".join(unicodedata.normalize("NFC", text).split())


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


def final_answer(text: str) -> str | None:
    """GSM8K's: what follows the last "The answer is", else the last "####", on its line; None where neither is there.

    "$1,234." is 1234; of "5 * 3 = 15 apples" the number after the last "=" is the answer.
    """
    for mark in (THE_ANSWER_IS, HASHES):
        found = list(mark.finditer(text))
        if found:
            said = re.sub(r"^[ :\t]*\n?", "", text[found[-1].end() :]).partition("\n")[0].strip()
            number = NUMBER.search(said.rpartition("=")[2].replace("{,}", ",").replace("\\$", "$"))
            return _plain(number.group()) if number else said.rstrip(".").strip() or None
    return None


def _plain(number: str) -> str:
    return re.sub(r"[,$\s]", "", number).replace("−", "-")


def _math_answer(text: str) -> str | None:
    inside = boxed(text)
    if inside is not None:
        return inside or None
    for mark in (ANSWER_MARK, HASHES):
        found = list(mark.finditer(text))
        if found:
            said = text[found[-1].end() :].strip().partition("\n")[0].strip().rstrip(".")
            return said or None
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else None


# ------------------------------------------------------------------------------------------------ the graders


def _gsm8k() -> Grader:
    def same(found: str, answer: str, row: Row | None) -> bool:
        marked = final_answer(answer)
        return same_answer(found, answer.strip() if marked is None else marked)

    return Grader("gsm8k", "1", {}, final_answer, same)


def _number() -> Grader:
    def same(found: str, answer: str, row: Row | None) -> bool:
        wanted = last_number(answer)
        return wanted is not None and same_answer(found, wanted)

    return Grader("number", "1", {}, last_number, same)


def _math(timeout: float = 5.0) -> Grader:
    from curate.grading_math import MathEquality, version  # math-verify and sympy, in a child process of their own

    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        raise UsageError(f"grader math: timeout is {timeout!r}, expected seconds above 0.")
    equality = MathEquality(timeout=float(timeout))

    def same(found: str, answer: str, row: Row | None) -> bool:
        inside = boxed(answer)
        wanted = answer.strip() if inside is None else inside
        if inside is None and HASHES.search(answer):
            wanted = _math_answer(answer) or wanted
        return same_answer(found.strip("$ "), wanted.strip("$ ")) or equality(wanted, found)

    return Grader(
        "math", f"1+math-verify-{version()}", {"timeout": float(timeout)}, _math_answer, same, close=equality.close
    )


def _choice(letters: str = "ABCD") -> Grader:
    if not isinstance(letters, str) or not re.fullmatch(r"[A-Z]+", letters):
        raise UsageError(f"grader choice: letters is {letters!r}, expected capitals such as ABCD.")
    one = f"[{letters}]"
    wrapped = rf"(?:\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{{\s*)*[(\[*_\"'$`\s]*({one})(?![\w'’])"
    after_mark = re.compile(
        rf"(?i:\banswer(?:\s+is)?\b\s*[:=]?|\bboxed\b|\bchoose\b|\boption\b|\bchoice\b|####)\s*(?i:option|choice)?\s*{wrapped}"
    )
    bracketed = re.compile(rf"[(\[{{]\s*({one})\s*[)\]}}]")
    line = re.compile(rf"(?m)^\W*({one})(?:\s*$|[.):,])")
    alone = re.compile(rf"(?:^|\s)[\W_]*({one})[\W_]*$")

    def extract(text: str) -> str | None:
        for pattern in (after_mark, bracketed, line, alone):
            found = list(pattern.finditer(text.strip()))
            if found:
                return found[-1].group(1)
        return text.strip().upper() if len(text.strip()) == 1 and text.strip().upper() in letters else None

    def same(found: str, answer: str, row: Row | None) -> bool:
        wanted = extract(answer)
        if wanted is None:
            raise UsageError(
                f"grader choice: the answer {answer!r} names none of the letters {letters}. For more letters: {{choice: ABCDEFGHIJ}}."
            )
        return found == wanted

    return Grader("choice", "1", {"letters": letters}, extract, same)


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
        return found[-1].group(group) if found else None

    return Grader("regex", "1", {"pattern": pattern}, extract, lambda found, answer, row: same_answer(found, answer))


def _of_your_own(spec: str, folder: str | Path | None) -> Grader:
    function = load_object(spec, what="grader", folder=folder)
    try:
        takes_row = places(function, 2, 3) == 3
    except TypeError:
        raise UsageError(f"grader {spec!r}: expected a function of (text, answer) or (text, answer, row).") from None

    def same(text: str, answer: str, row: Row | None) -> bool:
        try:
            verdict = function(text, answer, row) if takes_row else function(text, answer)
        except Exception as error:
            where = f" on row {row.row_id}" if row is not None else ""
            raise UsageError(f"grader {spec!r} failed{where}: {type(error).__name__}: {error}") from error
        if type(verdict).__name__ not in ("bool", "bool_"):  # numpy's too
            raise UsageError(
                f"grader {spec!r} returned {verdict!r} ({type(verdict).__name__}), expected True or False."
            )
        return bool(verdict)

    return Grader(spec, source_version(function), {}, lambda text: text, same, needs_answer=False)


# name -> (how it is made, the setting that may stand alone: {regex: "…"} is {regex: {pattern: "…"}})
_MAKERS: dict[str, tuple[Callable[..., Grader], str | None]] = {
    "gsm8k": (_gsm8k, None),
    "number": (_number, None),
    "math": (_math, None),
    "choice": (_choice, "letters"),
    "exact": (_exact, None),
    "regex": (_regex, "pattern"),
}
