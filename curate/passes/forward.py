"""The forward pass: rows in, one float64 column per measured number out. Everything that can be read off one pass is
read off it.

    rows -> items (the sequences to run) -> groups (shared prefix once) -> batches of at most `token_budget` tokens
         -> final states of every token -> head statistics at the positions that predict a response token ->
         measurements

Packed layout (passes/packing.py): a pair costs one encoding of its prompt and one of each response; SFT rows that
share a prompt share it too. Padded layout: one sequence per line, sorted by length, padded on the right; for models
that the packed layout does not suit, and as its oracle. Neither layout changes a number by more than rounding, nor
does the order or the company of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from curate.errors import CurateError, ModelError
from curate.passes.batch import Batch
from curate.passes.model import Model, load_model
from curate.passes.packing import Group, Item, Layout
from curate.tokens import Encoded, EncodedPair, common_prefix

if TYPE_CHECKING:
    from curate.measurements import Measurement

__all__ = ["Model", "load_model", "measure", "tokens_to_run"]

CPU_BATCH = 2048  # tokens; a CPU gains nothing from longer batches, and their activations leave its cache
SHARE_FROM = 16  # rows share a prompt of at least this many tokens; below it the bookkeeping costs more than it saves


def measure(
    model: Model,
    encoded: Sequence[Encoded | EncodedPair],
    measurements: Sequence[Measurement],
    *,
    token_budget: int = 16384,
) -> dict[str, np.ndarray]:
    """Run the model once over the rows and read off every measurement: {column: (len(encoded),) float64}, in the rows'
    order.

    NaN where a row has a `problem` (measurements of the prompt alone are taken of rows without a completion too), or is of
    another kind than the measurement. A row longer than `token_budget` runs
    alone; a batch that does not fit into memory is halved until it does. ModelError when a single row does not fit, or
    is longer than learned positions allow.
    """
    out = {column: np.full(len(encoded), np.nan) for m in measurements for column in m.columns}
    for kind, name in ((EncodedPair, "preference"), (Encoded, "sft")):
        wanted = [m for m in measurements if m.kind in (name, "any")]
        rows = [i for i, row in enumerate(encoded) if isinstance(row, kind)]
        _measure_rows(model, encoded, [i for i in rows if encoded[i].problem is None], wanted, token_budget, out)
        prompt_only = [i for i in rows if _is_prompt(encoded[i])]
        _measure_rows(model, encoded, prompt_only, [m for m in wanted if m.prompt_only], token_budget, out)
    return out


def _measure_rows(
    model: Model,
    encoded: Sequence[Encoded | EncodedPair],
    indices: list[int],
    wanted: list[Measurement],
    token_budget: int,
    out: dict[str, np.ndarray],
) -> None:
    if not wanted or not indices:
        return
    alone = any(m.without_prompt for m in wanted)
    rows = {i: _items(i, encoded[i], alone, model.bos) for i in indices}
    _check_lengths(model, rows)
    for bundle in _batches(model, rows, token_budget):
        _measure_batch(model, bundle, encoded, wanted, out)


def _is_prompt(row: Encoded | EncodedPair) -> bool:
    """Whether a row has no completion but a whole prompt."""
    return isinstance(row, Encoded) and row.problem is not None and 0 < len(row.ids) == row.start and not row.truncated


def tokens_to_run(encoded: Sequence[Encoded | EncodedPair], *, without_prompt: bool = False) -> int:
    """How many tokens the packed pass puts through the model for these rows: what a plan's cost is reckoned from."""
    rows = {i: _items(i, row, without_prompt, None) for i, row in enumerate(encoded) if row.problem is None}
    return sum(bundle.n_tokens for bundle in _bundles(rows, 2**62))


@dataclass(frozen=True, slots=True)
class _Bundle:
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


def _items(row: int, encoded: Encoded | EncodedPair, without_prompt: bool, bos: int | None) -> list[Item]:
    """The sequences of one row. `…_alone`: a response without its prompt, after BOS where the row begins with it."""
    if isinstance(encoded, EncodedPair):
        sides = [("chosen", encoded.chosen), ("rejected", encoded.rejected)]
    else:
        sides = [("completion", encoded)]
    items = [Item(row, side, e.ids, e.start) for side, e in sides]
    if without_prompt:
        for side, e in sides:
            head = e.ids[:1] if bos is not None and e.ids[0] == bos else e.ids[:0]
            items.append(Item(row, f"{side}_alone", np.concatenate([head, e.ids[e.start :]]), 1))
    return items


def _check_lengths(model: Model, rows: dict[int, list[Item]]) -> None:
    """Learned positions end where their table ends; rotary ones do not."""
    longest = max(len(item.ids) for items in rows.values() for item in items)
    if model.learned_positions is not None and longest > model.learned_positions:
        raise ModelError(
            f"{model.path}: a row has {longest} tokens, but this model has learned positions for "
            f"{model.learned_positions} only.\n  Set `--set tokens.max_length={model.learned_positions}`."
        )


def _bundles(rows: dict[int, list[Item]], token_budget: int) -> list[_Bundle]:
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


def _bundle(members: list[int], rows: dict[int, list[Item]]) -> _Bundle:
    items = [item for row in members for item in rows[row]]
    main = [item for item in items if not item.side.endswith("_alone")]
    prefix = min((common_prefix(main[0].ids, other.ids) for other in main[1:]), default=0)
    groups = [Group(tuple(main), prefix)]
    groups += [Group((item,), 0) for item in items if item.side.endswith("_alone")]
    return _Bundle(tuple(members), tuple(groups))


def _batches(model: Model, rows: dict[int, list[Item]], token_budget: int) -> Iterator[_Bundle]:
    """Bundles joined up to the budget: counted with padding, and sorted by length, in the padded layout."""
    padded = model.layout == "padded"
    limit = model.rope_limit
    solo = {row: i for row, i in rows.items() if limit and max(len(item.ids) for item in i) >= limit}
    rows = {row: items for row, items in rows.items() if row not in solo}
    bundles = [_bundle([row], rows) for row in rows] if padded else _bundles(rows, token_budget)
    if padded:
        bundles.sort(key=lambda bundle: bundle.longest, reverse=True)
    room = min(token_budget, CPU_BATCH) if model.device.type == "cpu" else token_budget
    batch: list[_Bundle] = []
    size = 0
    for bundle in bundles:
        own = len(bundle.items) * (batch[0] if batch else bundle).longest if padded else bundle.n_tokens
        if batch and size + own > room:
            yield _join(batch)
            batch, size = [], 0
        batch.append(bundle)
        size += own
    if batch:
        yield _join(batch)
    for row in solo:  # angles that depend on the longest sequence of a batch: no company
        yield _bundle([row], solo)


def _join(bundles: list[_Bundle]) -> _Bundle:
    return _Bundle(
        tuple(row for bundle in bundles for row in bundle.rows),
        tuple(group for bundle in bundles for group in bundle.groups),
    )


def _measure_batch(
    model: Model,
    bundle: _Bundle,
    encoded: Sequence[Encoded | EncodedPair],
    wanted: Sequence[Measurement],
    out: dict[str, np.ndarray],
) -> None:
    """Run one bundle and write every measurement's columns; halved and run again where memory is short."""
    try:
        with torch.inference_mode():
            states, where = _states(model, bundle)
            of = [encoded[row] for row in bundle.rows]
            batch = Batch(model.head, bundle.rows, of, bundle.items, where, states, {s for m in wanted for s in m.head})
            for m in wanted:
                _write(m, batch, out)
            return
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        if type(problem) is RuntimeError and "can't allocate memory" not in str(problem):  # how torch says it on a CPU
            raise
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(bundle.rows) == 1:
            raise ModelError(
                f"{model.path}: one row of {bundle.n_tokens} tokens does not fit into the memory of {model.device}.\n"
                "  Lower `tokens.max_length`, or use a smaller dtype."
            ) from None
    rows: dict[int, list[Item]] = {}
    for item in bundle.items:
        rows.setdefault(item.row, []).append(item)
    half = len(bundle.rows) // 2
    for part in (bundle.rows[:half], bundle.rows[half:]):
        smaller = _join(_bundles({row: rows[row] for row in part}, 2**62))
        _measure_batch(model, smaller, encoded, wanted, out)


def _write(m: Measurement, batch: Batch, out: dict[str, np.ndarray]) -> None:
    found = m.function(batch)
    if set(found) != set(m.columns):
        raise CurateError(
            f"measurement {m.name}: declared the columns {', '.join(m.columns)}, returned {', '.join(found) or 'none'}."
        )
    for column, values in found.items():
        if tuple(values.shape) != (len(batch.rows),):
            raise CurateError(
                f"measurement {m.name}: {column} has shape {tuple(values.shape)}, expected one number per row: "
                f"({len(batch.rows)},). `batch.chosen.sum(values)` and `.mean(values)` turn tokens into rows."
            )
        out[column][list(batch.rows)] = values.double().cpu().numpy()


def _states(model: Model, bundle: _Bundle) -> tuple[torch.Tensor, list[np.ndarray]]:
    """(N, d) final states of all tokens that were run, and for each item the index there of each of its positions."""
    items = bundle.items
    longest = bundle.longest
    if model.rope_limit is not None and longest >= model.rope_limit:
        parts = [_padded_states(model, [item]) for item in items]
        ends = np.cumsum([0] + [len(part) for part in parts])
        return torch.cat(parts), [np.arange(ends[i], ends[i] + len(item.ids)) for i, item in enumerate(items)]
    if model.layout == "packed":
        layout = Layout.of(bundle.groups)
        return model.packed_states(layout), layout.where
    states = _padded_states(model, items)
    return states, [np.arange(i * longest, i * longest + len(item.ids)) for i, item in enumerate(items)]


def _padded_states(model: Model, items: Sequence[Item]) -> torch.Tensor:
    """(len(items) · longest, d): one sequence per line, padded on the right."""
    longest = max(len(item.ids) for item in items)
    ids = np.zeros((len(items), longest), np.int64)
    mask = np.zeros((len(items), longest), np.int64)
    for i, item in enumerate(items):
        ids[i, : len(item.ids)] = item.ids
        mask[i, : len(item.ids)] = 1
    inputs = {} if mask.all() else {"attention_mask": torch.from_numpy(mask).to(model.device)}
    return model.states(torch.from_numpy(ids).to(model.device), **inputs).flatten(0, 1)
