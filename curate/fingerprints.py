"""What a model folder holds, by content: whether it is whole, and a fingerprint of its weights, which is the same wherever the folder lies.

whole model: config.json and its weight files        LoRA adapter: its base's fingerprint, its config's meaning, its tensors
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from curate.errors import BrokenCheckpoint
from curate.passes import adapter_config
from curate.passes.adapter_config import is_adapter, read_adapter_config
from curate.rows import content_id

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class FingerprintCache:
    """Fingerprints of files by path, size and time of change, so that weights are read once and a tokenizer need not be loaded to be known; and
    what else is slow to find out and follows from files.

    Kept in a JSON file (None: not kept), which may be lost at any time.
    """

    def __init__(self, file: Path | None):
        self.file = file
        try:
            self.known: dict[str, str] = json.loads(file.read_text()) if file else {}
        except (OSError, ValueError):
            self.known = {}

    def of(self, path: Path) -> str:
        """SHA-256 of a file."""

        def digest() -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self.kept(f"{path.resolve()}|{file_state(path)}", digest)

    def tokenizer(self, folder: Path) -> str:
        """`tokenizer_fingerprint` of a model folder, which is loaded only where a file of it has changed (weights aside)."""
        found = (*folder.iterdir(), *folder.glob("*/*.jinja"))
        files = sorted(p for p in found if p.is_file() and not any(p.match(w) for w in WEIGHTS))
        state = content_id(version("transformers"), [(p.relative_to(folder).as_posix(), file_state(p)) for p in files])

        def loaded() -> str:
            from curate.tokens import load_tokenizer, tokenizer_fingerprint

            return tokenizer_fingerprint(load_tokenizer(folder))

        return self.kept(f"tokenizer|{folder.resolve()}|{state}", loaded)

    def positions(self, folder: Path) -> int | None:
        """`context_length` of a model folder, its config read by transformers only where it has changed."""
        from curate.tokens import context_length

        state = content_id(version("transformers"), file_state(folder / "config.json"))
        found = self.kept(f"positions|{folder.resolve()}|{state}", lambda: str(context_length(folder) or ""))
        return int(found) if found else None

    def kept(self, key: str, make: Callable[[], str]) -> str:
        """What is kept under a key that says all that it depends on; made where nothing is."""
        if key not in self.known:
            self._keep(key, make())
        return self.known[key]

    def _keep(self, key: str, value: str) -> None:
        self.known[key] = value
        if self.file is None or not self.file.parent.is_dir():
            return
        new = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:  # a store that cannot be written now is not this file's business
            new.write_text(json.dumps(self.known))
            new.replace(self.file)
        except OSError:
            new.unlink(missing_ok=True)


def file_state(path: Path) -> str:
    """Size and time of change."""
    found = path.stat()
    return f"{found.st_size}|{found.st_mtime_ns}"


def weights_fingerprint(path: Path, cache: FingerprintCache | None = None, *, base: Path | None = None) -> str:
    """20 hex digits over a model folder's config and weights, or over an adapter's and those of the base it sits on; names and places
    do not enter.

    Raises BrokenCheckpoint where a file is missing, unreadable, or half-written.
    """
    check_folder(path)
    cache = cache or FingerprintCache(None)
    digest = hashlib.sha256()
    try:
        if base is not None:
            told = read_adapter_config(path).identity()
            digest.update(f"adapter:{weights_fingerprint(base, cache)}\n{told}\n".encode())
        for file in [path / "config.json"] * (base is None) + _weight_files(path):
            digest.update(f"{file.name}:{cache.of(file)}\n".encode())
    except OSError as error:
        raise BrokenCheckpoint(
            f"{path.name}: {Path(error.filename or path).name} cannot be read ({error.strerror})."
        ) from None
    return digest.hexdigest()[:20]


def _weight_files(path: Path) -> list[Path]:
    if is_adapter(path):
        return [path / adapter_config.WEIGHTS]
    for pattern in WEIGHTS:
        files = sorted(path.glob(pattern))
        if files:
            return files
    return []


def check_folder(path: Path) -> None:
    """A model folder has a readable config, and every weight file that its index names, each as long as its header says; an adapter's its
    own two files. BrokenCheckpoint where it does not; ModelError for an adapter that is not understood.
    """
    if is_adapter(path):
        read_adapter_config(path)
        weights = path / adapter_config.WEIGHTS
        if not weights.is_file():
            raise BrokenCheckpoint(
                f"{path.name}: no {weights.name} beside adapter_config.json; the adapter is incomplete (found: {', '.join(_names(path)[:6])})."
            )
        if not _is_whole(weights):
            raise _half_written(weights)
        return
    try:
        json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        inside = ", ".join(_names(path)[:6]) or "nothing"
        raise BrokenCheckpoint(
            f"{path}: no config.json in this folder, so it is not a model (found: {inside})."
        ) from None
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{path.name}/config.json cannot be read: {error}.") from None
    files = _weight_files(path)
    if not files:
        raise BrokenCheckpoint(
            f"{path.name}: no weights (*.safetensors) beside config.json; the checkpoint is incomplete (found: {', '.join(_names(path)[:6])})."
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError) as error:
            raise BrokenCheckpoint(f"{path.name}/{index.name} cannot be read: {error!r}.") from None
        missing = sorted(wanted - {f.name for f in files})
        if missing:
            raise BrokenCheckpoint(
                f"{path.name}: {missing[0]} is missing ({len(missing)} of {len(wanted)} weight files); the checkpoint is incomplete."
            )
    for file in files:
        if file.suffix == ".safetensors" and not _is_whole(file):
            raise _half_written(file)


def _half_written(file: Path) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{file.parent.name}/{file.name} is cut short or not a safetensors file; the checkpoint is half-written. Remove it or name the others."
    )


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its own header says."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= size - 8:
                return False
            header = json.loads(handle.read(length))
        ends: Iterable[int] = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        return size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())
