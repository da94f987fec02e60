"""Rows into batches of whole rows: the sequences a row needs, a shared prompt once, at most so many tokens together.

row -> items (the sequences to run) -> bundle (rows that share a prompt, and the groups their items make) -> batch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.layout import Group, Item, Layout
from curate.passes.tokens import Encoded, EncodedPair, common_prefix

if TYPE_CHECKING:
    from curate.passes.loading.model import Model

CPU_BATCH = (
    3072  # tokens; longer batches gain a CPU nothing and hold more memory, shorter ones read the weights more often
)
SHARE_FROM = 16  # rows share a prompt of at least this many tokens; below it the bookkeeping costs more than it saves
NO_LIMIT = 2**62  # tokens: all rows in one batch


@dataclass(frozen=True, slots=True)
class Bundle:
    """Whole rows, and the groups that their items make. Batches are made of bundles, so that no row is torn apart."""

    rows: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def n_tokens(self) -> int:
        return sum(group.n_tokens for group in self.groups)

    @property
    def items(self) -> list[Item]:
        return [item for group in self.groups for item in group.items]

    @property
    def longest(self) -> int:
        return max(len(item.ids) for item in self.items)


def items_of(row: int, encoded: Encoded | EncodedPair, without_prompt: bool, bos: int | None) -> list[Item]:
    """The sequences of one row, numbered `row`: two of a pair, else one. `…_alone`: a response without its prompt, after
    BOS where the row begins with it.
    """
    if isinstance(encoded, EncodedPair):
        sides = [("chosen", encoded.chosen), ("rejected", encoded.rejected)]
    else:
        sides = [("completion", encoded)]
    items = [Item(row, side, e.ids, e.start, e.counted) for side, e in sides]
    if without_prompt:
        for side, e in sides:
            head = e.ids[:1] if bos is not None and e.ids[0] == bos else e.ids[:0]
            items.append(Item(row, f"{side}_alone", np.concatenate([head, e.ids[e.start :]]), 1))
    return items


def check_lengths(model: Model, rows: dict[int, list[Item]]) -> None:
    """Learned positions end where their table ends; rotary ones do not. ModelError where a row is longer."""
    longest = max(len(item.ids) for items in rows.values() for item in items)
    if model.learned_positions is not None and longest > model.learned_positions:
        raise ModelError(
            f"{model.path}: a row has {longest} tokens, but this model has learned positions for "
            f"{model.learned_positions} only.\n  Set `--set tokens.max_length={model.learned_positions}`."
        )


def bundle_rows(rows: dict[int, list[Item]], token_budget: int) -> list[Bundle]:
    """Rows with the same prompt together, in order of first appearance, at most `token_budget` tokens each."""
    together: dict[object, list[int]] = {}
    for row, items in rows.items():
        first = items[0]
        key = first.ids[: first.start].tobytes() if first.start >= SHARE_FROM else row
        together.setdefault(key, []).append(row)
    bundles = []
    for members in together.values():
        piece: list[int] = []
        size = 0
        for row in members:
            start = rows[row][0].start if piece else 0  # the prompt is there already
            own = sum(len(item.ids) - start for item in rows[row])
            if piece and size + own > token_budget:
                bundles.append(_bundle(piece, rows))
                piece, size = [], 0
            piece.append(row)
            size += own
        bundles.append(_bundle(piece, rows))
    return bundles


def _bundle(members: list[int], rows: dict[int, list[Item]]) -> Bundle:
    items = [item for row in members for item in rows[row]]
    main = [item for item in items if not item.side.endswith("_alone")]
    prefix = min((common_prefix(main[0].ids, other.ids) for other in main[1:]), default=0)
    groups = [Group(tuple(main), prefix)]
    groups += [Group((item,), 0) for item in items if item.side.endswith("_alone")]
    return Bundle(tuple(members), tuple(groups))


def batch_rows(model: Model, rows: dict[int, list[Item]], token_budget: int) -> Iterator[Bundle]:
    """Bundles joined up to the budget: counted with padding, and sorted by length, in the padded layout."""
    padded = model.layout == "padded"
    limit = model.rope_limit
    solo = {row: i for row, i in rows.items() if limit and max(len(item.ids) for item in i) >= limit}
    rows = {row: items for row, items in rows.items() if row not in solo}
    bundles = [_bundle([row], rows) for row in rows] if padded else bundle_rows(rows, token_budget)
    if padded:
        bundles.sort(key=lambda bundle: bundle.longest, reverse=True)
    room = min(token_budget, CPU_BATCH) if model.device.type == "cpu" else token_budget
    batch: list[Bundle] = []
    size = 0
    for bundle in bundles:
        own = len(bundle.items) * (batch[0] if batch else bundle).longest if padded else bundle.n_tokens
        if batch and size + own > room:
            yield join(batch)
            batch, size = [], 0
        batch.append(bundle)
        size += own
    if batch:
        yield join(batch)
    for row in solo:  # angles that depend on the longest sequence of a batch: no company
        yield _bundle([row], solo)


def join(bundles: list[Bundle]) -> Bundle:
    """Bundles to run as one batch."""
    return Bundle(
        tuple(row for bundle in bundles for row in bundle.rows),
        tuple(group for bundle in bundles for group in bundle.groups),
    )


def bundle_halves(bundle: Bundle) -> list[Bundle]:
    """The first and the second half of a bundle's rows, each to run as one batch; none of a single row."""
    rows: dict[int, list[Item]] = {}
    for item in bundle.items:
        rows.setdefault(item.row, []).append(item)
    half = len(bundle.rows) // 2
    parts = (bundle.rows[:half], bundle.rows[half:]) if half else ()
    return [join(bundle_rows({row: rows[row] for row in part}, NO_LIMIT)) for part in parts]


def states_of(model: Model, bundle: Bundle) -> tuple[torch.Tensor, list[np.ndarray]]:
    """(N, d) final states of all tokens that were run, and for each item the index there of each of its positions."""
    items = bundle.items
    longest = bundle.longest
    if model.rope_limit is not None and longest >= model.rope_limit:
        parts = [model.padded_states([item]) for item in items]
        ends = np.cumsum([0] + [len(part) for part in parts])
        return torch.cat(parts), [np.arange(ends[i], ends[i] + len(item.ids)) for i, item in enumerate(items)]
    if model.layout == "packed":
        layout = Layout.of(bundle.groups)
        return model.packed_states(layout), layout.where
    states = model.padded_states(items)
    return states, [np.arange(i * longest, i * longest + len(item.ids)) for i, item in enumerate(items)]
