"""What a model folder holds, by content: whether it is whole, and a fingerprint of its weights, which is the same wherever the folder lies.

whole model: config.json and its weight files        LoRA adapter: its base's fingerprint, its config's meaning, its tensors
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from curate.errors import BrokenCheckpoint
from curate.models.layouts import WEIGHTS, check_folder, weight_files
from curate.passes.files import write_atomically
from curate.passes.loading.adapter_config import read_adapter_config
from curate.passes.loading.own_code import code_files
from curate.recipe.bounds import json_value, read_object
from curate.rows import content_id

if TYPE_CHECKING:
    from curate.passes.chat import Template

Kept = TypeVar("Kept")
SETTLED = 2.0  # seconds: no clock of a file system is coarser


class FingerprintCache:
    """Fingerprints of files by path, size and time of change, so that weights are read once and a tokenizer need not be loaded to be known; and
    what else is slow to find out and follows from files.

    Kept in a JSON file (None: not kept), which may be lost at any time. slow: called before what is not known is found out.
    """

    def __init__(self, file: Path | None, *, slow: Callable[[], None] = lambda: None):
        self.file, self.slow = file, slow
        try:
            kept = read_object(file) if file else {}
        except (OSError, ValueError):
            kept = {}
        self.known: dict[str, str] = {key: value for key, value in kept.items() if isinstance(value, str)}
        self._once: dict[str, Any] = {}

    def once(self, what: str, find: Callable[[], Any]) -> Any:
        """What stays as it is while this object is used, such as the installed versions: found out once, and kept in no file."""
        if what not in self._once:
            self._once[what] = find()
        return self._once[what]

    def of(self, path: Path) -> str:
        """SHA-256 of a file."""

        def digest() -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self.kept(f"{path.resolve()}|{file_state(path)}", digest)

    def source(self, path: Path) -> bytes:
        """`file_digest` of a source, of a large one taken once for its inode, size and times. A file that is being written is not remembered."""
        from curate.data.sources import LARGE, file_digest

        state = path.stat()
        if state.st_size <= LARGE:
            return file_digest(path)
        key = f"source|{state.st_dev}|{state.st_ino}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}"
        if time.time() - max(state.st_mtime, state.st_ctime) > SETTLED:
            return bytes.fromhex(self.kept(key, lambda: file_digest(path).hex()))
        return file_digest(path)

    def target(self, path: Path) -> bytes:
        """As `source`; but for the first content that a large file is known with the digest by which earlier values know it (`ends_digest`)."""
        from curate.data.sources import LARGE, ends_digest

        whole = self.source(path)
        if path.stat().st_size <= LARGE:
            return whole
        ends = ends_digest(path)
        first: str = self.kept(f"target|{ends.hex()}", whole.hex)
        return ends if bytes.fromhex(first) == whole else whole

    def tokenizer(self, folder: Path) -> str:
        """`tokenizer_fingerprint` of a model folder, which is loaded only where a file of it has changed (weights aside). Own code that may run
        is part of it.
        """

        def loaded() -> str:
            from curate.passes.tokenizer import load_tokenizer, tokenizer_fingerprint

            return tokenizer_fingerprint(load_tokenizer(folder))

        fingerprint: str = self.kept(f"tokenizer|{folder.resolve()}|{self._tokenizer_state(folder)}", loaded)
        return content_id(fingerprint, code) if (code := self.own_code(folder)) else fingerprint

    def own_code(self, folder: Path) -> list[str]:
        """Names and digests of a model's own code, where it may run."""
        return [f"{file.relative_to(folder).as_posix()}:{self.of(file)}" for file in code_files(folder)]

    def _tokenizer_state(self, folder: Path) -> str:
        entries = (*folder.iterdir(), *folder.glob("*/*.jinja"))
        files = sorted(p for p in entries if p.is_file() and not any(p.match(w) for w in WEIGHTS))
        states = [(p.relative_to(folder).as_posix(), file_state(p)) for p in files]
        return content_id(self._transformers(), states, *self.own_code(folder))

    def _transformers(self) -> str:
        return str(self.once("transformers", lambda: version("transformers")))

    def template(self, folder: Path, model: Path) -> Template | None:
        """`template_of` a folder's tokenizer, which is loaded only where a file of it has changed. model: the folder with the generation settings."""
        from curate.passes.chat import template_from_json, template_to_json

        settings = [model / name for name in ("generation_config.json", "config.json")]
        about = content_id(self._tokenizer_state(folder), [file_state(f) if f.is_file() else "" for f in settings], 5)

        def looked() -> str:
            from curate.passes.chat import template_of
            from curate.passes.tokenizer import load_tokenizer

            return template_to_json(template_of(load_tokenizer(folder), stop_ids(model)))

        return self.kept(f"template|{folder.resolve()}|{about}", looked, read=template_from_json)

    def beyond(self, folder: Path, n: int) -> dict[str, int]:
        """The tokens of a folder's tokenizer whose id is n or more, by id."""

        def looked() -> str:
            from curate.passes.tokenizer import load_tokenizer

            tokens = {token: i for token, i in load_tokenizer(folder).get_vocab().items() if i >= n}
            return json.dumps(dict(sorted(tokens.items(), key=lambda entry: entry[1])))

        def read(text: str) -> dict[str, int]:
            return {str(token): int(i) for token, i in json_value(text).items()}

        return self.kept(f"beyond {n}|{folder.resolve()}|{self._tokenizer_state(folder)}", looked, read=read)

    def positions(self, folder: Path) -> int | None:
        """`context_length` of a model folder, its config read by transformers only where it has changed."""
        from curate.passes.tokenizer import context_length

        state = content_id(self._transformers(), file_state(folder / "config.json"), *self.own_code(folder))
        return self.kept(
            f"positions|{folder.resolve()}|{state}",
            lambda: str(context_length(folder) or ""),
            read=lambda text: int(text) if text else None,
        )

    def kept(self, key: str, make: Callable[[], str], *, read: Callable[[str], Kept] = str) -> Kept:  # type: ignore[assignment]
        """What is kept under a key that says all that it depends on; made where nothing is, or nothing that can be read."""
        try:
            return read(self.known[key])
        except (KeyError, ValueError, TypeError, AttributeError):
            self.slow()
            self._keep(key, make())
            return read(self.known[key])

    def _keep(self, key: str, value: str) -> None:
        self.known[key] = value
        if self.file is None or not self.file.parent.is_dir():
            return
        with (
            suppress(OSError),
            write_atomically(self.file) as new,
        ):  # a store that cannot be written now is not this file's business
            new.write_text(json.dumps(self.known))


def stop_ids(folder: Path) -> list[int]:
    """The ids that end an answer by a model folder's generation_config.json, or its config.json where that says none."""
    for name in ("generation_config.json", "config.json"):
        try:
            ids = read_object(folder / name).get("eos_token_id")
        except (OSError, ValueError):
            continue
        if ids is not None:
            return [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
    return []


def file_state(path: Path) -> str:
    """Size and time of change."""
    state = path.stat()
    return f"{state.st_size}|{state.st_mtime_ns}"


def weights_fingerprint(path: Path, cache: FingerprintCache | None = None, *, base: Path | None = None) -> str:
    """20 hex digits over a model folder's config and weights, or over an adapter's and those of the base it sits on; names and places
    do not enter. Over its own code, too, where that may run.

    Raises BrokenCheckpoint where a file is missing, unreadable, or half-written.
    """
    check_folder(path)
    cache = cache or FingerprintCache(None)
    digest = hashlib.sha256()
    try:
        if base is not None:
            adapter = read_adapter_config(path).identity()
            digest.update(f"adapter:{weights_fingerprint(base, cache)}\n{adapter}\n".encode())
        for file in [path / "config.json"] * (base is None) + weight_files(path):
            digest.update(f"{file.name}:{cache.of(file)}\n".encode())
        for code in cache.own_code(path):
            digest.update(f"{code}\n".encode())
    except OSError as error:
        raise BrokenCheckpoint(
            f"{path.name}: {Path(error.filename or path).name} cannot be read ({error.strerror})."
        ) from None
    return digest.hexdigest()[:20]
