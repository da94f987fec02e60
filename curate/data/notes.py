"""What is worth knowing about good rows, counted while they are read: what was left out of them or is there twice (said by every command that
reads rows), and what a person should have seen once (said by `curate validate`).
"""

from __future__ import annotations

import json
from collections import Counter

from curate.data.prompts import MEDIA, left_out
from curate.data.records import Record
from curate.rows import Example, Pair, Row, Text, text_of

HH_HEADERS = ("\n\nHuman:", "\n\nAssistant:")
SHORTEST_REPEAT = 3  # characters of a prompt that a reply may begin with by chance


class Notes:
    """Counts traits of records; `left_out` and `all` are sentences."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.prompts: Counter[int] = Counter()

    def add(self, record: Record, *, repeated: bool = False) -> None:
        """repeated: a row of this content was counted before; only what its own columns and messages hold is new."""
        if record.row is None:
            return
        self.seen.update(set(record.traits))
        self.seen.update(f"beside:{name}" for name in left_out(record.columns, record.row.prompt))
        if not repeated:
            self.prompts[prompt_key(record.row.prompt)] += 1
            self.seen.update(traits(record.row))

    def left_out(self, prompt_column: str = "") -> list[str]:
        """What rows hold that is not measured, or is measured twice."""
        column = prompt_column or "prompt"
        notes = [*self._keys(), *self._beside(column)]
        if n := self.seen["system turn"]:
            notes.append(
                f"In {n:,} rows the column `system` is the prompt's system turn, so all rows are messages. For a model without a chat template "
                f'put it into the text: `columns: {{prompt: "{{system}}\\n{{{column}}}"}}`.'
            )
        for what, note in REPEATS.items():
            if n := self.seen[f"repeats:{what}"]:
                notes.append(
                    f"In {n:,} rows {note} with the whole prompt, which is then measured and trained on twice. If that is not meant, cut it off."
                )
        for name in self._of("binary:"):
            notes.append(
                f"Column `{name}` holds bytes (images, audio) in {self.seen['binary:' + name]:,} rows. They are not kept: an export says only "
                "how many they were."
            )
        return notes

    def _of(self, prefix: str) -> list[str]:
        return sorted(trait.removeprefix(prefix) for trait in self.seen if trait.startswith(prefix))

    def _keys(self) -> list[str]:
        names = [f"{name} (in {self.seen['key:' + name]:,} rows)" for name in self._of("key:")]
        return [f"Text parts have keys that are neither measured nor exported: {', '.join(names)}."] if names else []

    def _beside(self, column: str) -> list[str]:
        notes = []
        for name in self._of("beside:"):
            n = self.seen["beside:" + name]
            if name in MEDIA:
                notes.append(
                    f"{n:,} rows have something in `{name}`, which no pass reads: what is measured is of the text alone."
                )
            elif name in ("tools", "functions"):
                notes.append(
                    f"{n:,} rows have `{name}`, which the chat template is not given: what is measured is of the prompt without them. If they are "
                    f"tools of rows in messages: `columns: {{tools: {name}}}`."
                )
            else:
                notes.append(
                    f"{n:,} rows have something in `{name}`, which is not part of the prompt. If it should be: "
                    f'`columns: {{prompt: "{{{name}}}\\n{{{column}}}"}}`.'
                )
        return notes

    def all(self, n_distinct: int, prompt_column: str) -> list[str]:
        """Everything, a sentence each."""
        seen, notes = self.seen, self.left_out(prompt_column)
        if unpaired := seen["desirable"] + seen["undesirable"]:
            notes.append(
                f"{unpaired} rows are unpaired preferences (KTO): {seen['desirable']} desirable, {seen['undesirable']} undesirable. "
                "Target likelihoods (target_logp, target_nll) can be measured on them; scores of pairs cannot."
            )
        repeated = [count for count in self.prompts.values() if count > 1]
        if repeated:
            notes.append(
                f"{len(repeated)} prompts occur in more than one row: {sum(repeated)} of {n_distinct} distinct rows, the commonest in "
                f"{max(repeated)} of them."
            )
        if seen["several turns"]:
            notes.append(f"{seen['several turns']} rows have a reply of several turns; all of it counts as the reply.")
        if seen["glued"]:
            notes.append(
                f"In {seen['glued']} rows prompt and reply follow each other without white space, as they are. If that is not meant, end the "
                f'prompt with a template: `columns: {{prompt: "{{{prompt_column}}}\\n"}}`.'
            )
        if seen["standard"] and seen["conversational"]:
            notes.append(
                f"{seen['standard']} rows are text, {seen['conversational']} are messages; an export takes one style."
            )
        if 0 < seen["no answer"] < n_distinct - unpaired:
            notes.append(f"{seen['no answer']} rows have no answer to grade against.")
        return notes


REPEATS = {
    "both": "both replies begin",
    "chosen": "the chosen reply alone begins",
    "rejected": "the rejected reply alone begins",
    "completion": "the completion begins",
}


def prompt_key(prompt: Text) -> int:
    """64 bits: enough to count prompts with, within one process."""
    return hash(prompt if isinstance(prompt, str) else json.dumps(prompt))


def traits(row: Row) -> list[str]:
    """What the notes count of a row's texts."""
    names: list[str] = [row.style]
    replies = [reply for reply in ((row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)) if reply]
    if any(
        any(header in reply for header in HH_HEADERS) if isinstance(reply, str) else len(reply) > 1 for reply in replies
    ):
        names.append("several turns")
    texts = [reply for reply in replies if isinstance(reply, str)]
    if isinstance(row.prompt, str) and not row.prompt[-1].isspace() and any(not text[0].isspace() for text in texts):
        names.append("glued")
    if isinstance(row, Example) and row.label is not None:
        names.append("desirable" if row.label else "undesirable")
    elif isinstance(row, Example) and row.answer is None:
        names.append("no answer")
    if repeats := repeated_prompt(row):
        names.append(f"repeats:{repeats}")
    return names


def repeated_prompt(row: Row) -> str:
    """Which reply begins with the prompt's text (of messages: the last user turn's): both, chosen, rejected, completion, or "" for none."""
    prompt = row.prompt if isinstance(row.prompt, str) else _last_user(row.prompt)
    if len(prompt.strip()) < SHORTEST_REPEAT:
        return ""
    if isinstance(row, Example):
        return "completion" if row.completion is not None and _begins(row.completion, prompt) else ""
    chosen, rejected = _begins(row.chosen, prompt), _begins(row.rejected, prompt)
    return "both" if chosen and rejected else "chosen" if chosen else "rejected" if rejected else ""


def _last_user(turns: Text) -> str:
    return next((text_of(turn) for turn in reversed(turns) if turn["role"] == "user"), "")  # type: ignore[arg-type, index]


def _begins(reply: Text, prompt: str) -> bool:
    text = reply if isinstance(reply, str) else text_of(reply[0])
    return text.lstrip().startswith(prompt.strip())
