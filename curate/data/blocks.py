"""Many rows at once, where they are all alike: texts under the same names, beside columns of numbers and short texts. What most sources hold.

`block_of` looks whether rows are so; any others are read one by one (`Reading`), which gives the same rows and says what is wrong with one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from curate.data.cells import number
from curate.data.columns import UNNAMED
from curate.data.formats import KNOWN_COLUMNS, preference, prompt_completion
from curate.data.layout import Layout
from curate.data.notes import SHORTEST_REPEAT
from curate.data.prompts import BESIDE, MEDIA

ROWS = 512
SCALARS = {str, int, float, bool, type(None)}
SPECIAL = frozenset((*KNOWN_COLUMNS, *BESIDE, *MEDIA, "", UNNAMED))  # columns that are looked at, or called otherwise


@dataclass(frozen=True)
class Block:
    """Rows of one source, in its order. texts: prompt, chosen, rejected (pairs), or prompt, completion (examples); own: the user's other columns."""

    source: str
    kind: str
    index: Sequence[int]
    texts: dict[str, list[str]]
    own: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def head(self, n: int) -> Block:
        """The first n of the rows."""
        texts, own = ({name: values[:n] for name, values in part.items()} for part in (self.texts, self.own))
        return replace(self, index=self.index[:n], texts=texts, own=own)

    def traits(self) -> Counter[str]:
        """What `Notes` counts of them and `Notes.left_out` says: replies that begin with the whole prompt."""
        prompts = [text.strip() for text in self.texts["prompt"]]
        long = [len(text) >= SHORTEST_REPEAT for text in prompts]
        begin = {
            name: [
                fits and reply.lstrip().startswith(prompt)
                for fits, reply, prompt in zip(long, replies, prompts, strict=True)
            ]
            for name, replies in self.texts.items()
            if name != "prompt"
        }
        if self.kind == "sft":
            return Counter({"repeats:completion": sum(begin["completion"])})
        both = sum(a and b for a, b in zip(begin["chosen"], begin["rejected"], strict=True))
        counts = {"both": both} | {name: sum(begin[name]) - both for name in ("chosen", "rejected")}
        return Counter({f"repeats:{name}": n for name, n in counts.items()})


def takes_blocks(layout: Layout) -> bool:
    """Whether rows of this layout may be read as blocks: their texts are columns of their own, and nothing else is used up."""
    if layout.convert is preference:
        return layout.prompt in ("prompt", "question") and layout.uses == {layout.prompt, "chosen", "rejected"}
    is_plain = layout.convert is prompt_completion and layout.reply == "completion"
    return is_plain and layout.prompt in ("prompt", "question") and layout.uses == {layout.prompt, "completion"}


def block_of(
    source: str, layout: Layout, numbers: frozenset[str], rows: Sequence[tuple[int, Any, Any]]
) -> Block | None:
    """The block of these rows (index, line, raw row); None where one of them is anything but texts and plain values under the first one's names.

    numbers: the columns of a text table that hold numbers.
    """
    first = rows[0][2]
    if type(first) is not dict:
        return None
    names = list(first)
    own_names = [name for name in names if name not in layout.uses]
    if not SPECIAL.isdisjoint(own_names) or any("\0" in name or not name.isprintable() for name in names):
        return None
    raws = [raw for _, _, raw in rows]
    if not all(type(raw) is dict and list(raw) == names for raw in raws):
        return None
    used = [layout.prompt, *(("chosen", "rejected") if layout.kind == "preference" else ("completion",))]
    if not set(used) <= set(names):
        return None
    texts = {name if name != layout.prompt else "prompt": [raw[name] for raw in raws] for name in used}
    if not all(map(_are_texts, texts.values())) or not _are_rows(texts):
        return None
    own = {name: [raw[name] for raw in raws] for name in own_names}
    own |= {name: list(map(number, own[name])) for name in own_names if name in numbers}
    if not all(map(_are_plain, own.values())):
        return None
    return Block(source, layout.kind, [index for index, _, _ in rows], texts, own)


def _are_texts(values: list[Any]) -> bool:
    """Whether all are text that is not blank, and none may be messages in JSON."""
    if set(map(type, values)) != {str} or not all(values) or any(map(str.isspace, values)):
        return False
    return _is_unicode(values) and not any(
        text[0] in "[{" or (text[0].isspace() and text.lstrip()[0] in "[{") for text in values
    )


def _are_rows(texts: dict[str, list[str]]) -> bool:
    if "completion" in texts:
        return not any("####" in text for text in texts["completion"])  # a final answer stands behind it
    return not any(a == b for a, b in zip(texts["chosen"], texts["rejected"], strict=True))


def _are_plain(values: list[Any]) -> bool:
    """Whether all are numbers, texts, truth values or nothing, as JSON has them."""
    kinds = set(map(type, values))
    if not kinds <= SCALARS:
        return False
    if float in kinds and not all(math.isfinite(value) for value in values if type(value) is float):
        return False
    return str not in kinds or _is_unicode([value for value in values if type(value) is str])


def _is_unicode(texts: list[str]) -> bool:
    whole = "".join(texts)
    if whole.isascii():
        return True
    try:
        whole.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
