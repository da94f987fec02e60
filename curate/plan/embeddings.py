"""Whether a tokenizer fits a model: every token that a row, the template or the end of an answer needs has an embedding.

A table that is longer than the vocabulary (padded to a round number) is fine. A token beyond it is an error where something uses it: on a GPU it
is an assert on the device that takes the process down.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import BrokenCheckpoint, ModelError
from curate.models.layouts import read_config, weight_files
from curate.passes.loading.header import read_header

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.models.fingerprints import FingerprintCache
    from curate.store import Store

TABLE = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embed_tokens\.modules_to_save\.\w+)\.weight$"
)
RESIZE = (
    "Tokens were added without `model.resize_token_embeddings(len(tokenizer))`: do that and save both (the new embeddings are untrained), or take "
    "the tokenizer that the model was saved with."
)


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embedding table of a checkpoint's weights: of an adapter that brings its own, those. None where neither weights nor config tell."""
    home = Path(checkpoint.home)
    own = _of_weights(home)
    base = Path(checkpoint.base) if checkpoint.base else home
    return own or (_of_weights(base) if checkpoint.base else None) or _of_config(base)


def _of_weights(folder: Path) -> int | None:
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            try:
                _, header = read_header(file)
            except (OSError, ValueError):  # which loading says
                continue
            shapes = [e["shape"] for name, e in header.items() if TABLE.search(name) and len(e["shape"]) == 2]
            if shapes:
                return int(shapes[0][0])
    return None


def _of_config(folder: Path) -> int | None:
    try:
        config = read_config(folder / "config.json")
    except (OSError, BrokenCheckpoint):
        return None
    text = config.get("text_config")
    size = (text if isinstance(text, dict) and text else config).get("vocab_size")
    return size if type(size) is int else None


def check_tokenizer(checkpoint: Checkpoint, cache: FingerprintCache, store: Store, sources: Sequence[str]) -> list[str]:
    """What to say of tokens without embeddings that nothing uses. ModelError where a row, the template or the end of an answer uses one, where they
    are not added ones but the tokenizer's own (it is another model's), or where the config's padding is beyond the table.
    """
    home = Path(checkpoint.home)
    if not home.is_dir() or (n := embedding_rows(checkpoint)) is None:
        return []
    pad = _padding(Path(checkpoint.base) if checkpoint.base else home)
    if pad is not None and pad >= n:
        raise ModelError(
            f"{checkpoint.label}: pad_token_id {pad} in its config.json is beyond its {n:,} embeddings (ids 0 to {n - 1:,}). Set it to one "
            "that has."
        )
    folder = Path(checkpoint.tokenizer)
    beyond = cache.beyond(folder, n)
    if not beyond:
        return []
    token, id = next(iter(beyond.items()))
    many = f" and {len(beyond) - 1:,} more" if len(beyond) > 1 else ""
    problem = f"{checkpoint.label}: the token {token!r} has id {id:,}{many}, but the model has {n:,} embeddings (ids 0 to {n - 1:,})"
    added, special, template = _added(folder)
    if not beyond.keys() <= added:
        raise ModelError(
            f"{problem}, and it is no added token: the tokenizer in {folder.name} is another model's. Put the model's own beside its weights."
        )
    if used := next((t for t in beyond if t in special or t in template), None):
        raise ModelError(
            f"{problem}. {used!r} is its end or another special token, or stands in its chat template.\n  {RESIZE}"
        )
    if row := _row_with(list(beyond), store, sources):
        raise ModelError(f"{problem}. {row}\n  {RESIZE}")
    return [f"{problem}. No row uses it, so nothing is wrong with what is measured. {RESIZE}"]


def _padding(folder: Path) -> int | None:
    try:
        pad_id = read_config(folder / "config.json").get("pad_token_id")
    except (OSError, BrokenCheckpoint):
        return None
    return pad_id if isinstance(pad_id, int) else None


def _added(folder: Path) -> tuple[set[str], set[str], str]:
    """Of a folder's tokenizer: its added tokens, bos and eos, and the text of its chat template."""
    from curate.passes.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    special = {str(t) for t in (tokenizer.bos_token, tokenizer.eos_token) if t}
    return set(tokenizer.get_added_vocab()), special, str(tokenizer.chat_template or "")


def _row_with(tokens: Collection[str], store: Store, sources: Sequence[str]) -> str | None:
    """Which row has one of these tokens in its text, and how many have."""
    for token in tokens:
        row_ids = store.sql(
            "SELECT row_id FROM rows WHERE contains(concat_ws(' ', prompt, chosen, rejected, completion), ?) ORDER BY position",
            [token],
            source=list(sources) or None,
        )["row_id"].to_list()
        if row_ids:
            return f"{len(row_ids):,} of the rows use {token!r}, row {row_ids[0]} for one."
    return None


def check_ids(encoded: Iterable[Any], n: int, tokenizer: Any) -> None:
    """ModelError where ids are beyond the embedding table, before a model is run on them."""
    for row in encoded:
        for side in (row.chosen, row.rejected) if hasattr(row, "chosen") else (row,):
            if len(side.ids) and int(np.max(side.ids)) >= n:
                id = int(np.max(side.ids))
                raise ModelError(
                    f"A row uses the token {tokenizer.convert_ids_to_tokens(id)!r}, which has id {id:,}; the model has {n:,} embeddings "
                    f"(ids 0 to {n - 1:,}).\n  {RESIZE}"
                )
