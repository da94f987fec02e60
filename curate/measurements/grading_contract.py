"""What a grader is: a rule that says whether a sampled answer equals the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from curate.errors import UsageError
from curate.rows import Row


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
            given = self.extract(text)
            return given is not None and self.same(given, answer if answer is None else str(answer), row)  # type: ignore[arg-type]
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
