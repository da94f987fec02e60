"""The tokenizer of a model folder: loading it, its fingerprint, and how many tokens its model was made for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from curate.errors import ModelError
from curate.passes.chat import as_chat as as_chat
from curate.passes.descriptions import describe_folder, first_line
from curate.passes.loading.own_code import runs_own_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")  # a training writes these beside the tokenizer
KEPT = 4  # tokenizers
_kept: dict[tuple[object, ...], PreTrainedTokenizerBase] = {}  # the one that was asked for last stands at the end


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; whoever asks gets the same object as long as the folder's files are the same, so nobody sets
    anything of it. ModelError, with what was found there, when it cannot be read.
    """
    key = _files_of(Path(path))
    tokenizer = _kept.pop(key) if key in _kept else _load(path)
    if key:
        _kept[key] = tokenizer
        while len(_kept) > KEPT:
            del _kept[next(iter(_kept))]
    return tokenizer


def _files_of(folder: Path) -> tuple[object, ...]:
    """What changes when somebody changes a folder's tokenizer: its small files. () for a hub id."""
    try:
        entries = [*folder.iterdir(), *folder.glob("*/*.jinja")]
        files = sorted((str(file), file.stat()) for file in entries if not file.name.endswith(WEIGHTS))
    except OSError:
        return ()
    return (
        str(folder.resolve()),
        runs_own_code(),
        *((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in files),
    )


def _load(path: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=runs_own_code())
    except Exception as problem:  # OSError, ValueError, KeyError, ImportError, and json's and tokenizers' own
        raise ModelError(
            f"{path}: wanted a folder or hub id with a tokenizer (tokenizer.json, tokenizer_config.json), "
            f"found {describe_folder(path)}.\n"
            f"  {type(problem).__name__}: {first_line(problem)}\n"
            "  Save one beside the weights with `tokenizer.save_pretrained(folder)`."
        ) from problem


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """20 hex digits over everything that decides the ids of a text: vocabulary, merges, normaliser, special tokens,
    chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = json.loads(backend.to_str())
        body.pop("truncation", None)  # state of the last call, not of the tokenizer
        body.pop("padding", None)
    else:
        body = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    parts = [
        body,
        special,
        tokenizer.chat_template,
        getattr(tokenizer, "add_bos_token", None),
        getattr(tokenizer, "add_eos_token", None),
    ]
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def context_length(path: str | Path) -> int | None:
    """How many tokens the model at a path was made for (its config), None where it does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=runs_own_code())
    except Exception as problem:
        raise ModelError(
            f"{path}: wanted a folder or hub id with a model's config.json, found {describe_folder(path)}.\n"
            f"  {type(problem).__name__}: {first_line(problem)}"
        ) from problem
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None
