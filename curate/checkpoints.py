"""Models and a training run's checkpoints: where they are, in step order, with fingerprints of their weights.

A subject is one set of weights that is measured. Checkpoints are folders as transformers and TRL write them (`checkpoint-400`); their step
is the number in the name, or `global_step` of trainer_state.json.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from curate.errors import ModelError
from curate.rows import content_id

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Subject:
    """One set of weights. run: the training run's name ("" for a lone model); checkpoint: its folder's name; step: None where unknown."""

    path: str
    fingerprint: str
    run: str = ""
    checkpoint: str = ""
    step: int | None = None

    @property
    def label(self) -> str:
        return f"{self.run}/{self.checkpoint}" if self.run else self.checkpoint or Path(self.path).name


def find_model(name: str, folder: Path) -> Path:
    """The folder of a model: a path (relative to `folder`), or a hub id that is fetched into the hub's cache.

    Raises ModelError where there is neither.
    """
    path = folder / Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return path.resolve()
    if path.exists():
        raise ModelError(f"{name} is a file, expected a model's folder (config.json, *.safetensors, tokenizer.json).")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_hub(name)
    near = (
        difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1) if path.parent.is_dir() else []
    )
    hint = f" Did you mean {Path(name).with_name(near[0]).as_posix()}?" if near else ""
    raise ModelError(
        f"{name}: no such model folder (looked beside the recipe), and not a hub id like `owner/name`.{hint}"
    )


def find_checkpoints(spec: str | list[str], folder: Path, cache: FingerprintCache | None = None) -> list[Subject]:
    """The checkpoints of a run in step order: a trainer's output folder, or a list of model folders (in the order given, if no steps).

    Raises ModelError where a folder holds none, or where one of them is broken (named).
    """
    if isinstance(spec, list):
        paths = [find_model(name, folder) for name in spec]
        parents = {p.parent for p in paths}
        run = parents.pop().name if len(parents) == 1 else "checkpoints"
        subjects = [_subject(path, run, _step(path), cache) for path in paths]
        if any(s.step is None for s in subjects):
            subjects = [replace(s, step=i) for i, s in enumerate(subjects, start=1)]  # step 0 is a reference's
    else:
        root = (folder / Path(spec).expanduser()).resolve()
        if not root.is_dir():
            raise ModelError(
                f"models.checkpoints: {spec} is not a folder; give a trainer's output folder (with checkpoint-<step>/ in it) or a list."
            )
        found = [
            p
            for p in root.iterdir()
            if p.is_dir() and (p / "config.json").is_file() | bool(re.fullmatch(r"checkpoint-\d+", p.name))
        ]
        if not found:
            raise ModelError(
                f"models.checkpoints: {spec} holds no checkpoint (a folder checkpoint-<step> with config.json and weights). "
                "For the trainer, set save_strategy and save_steps; for a single model, use models.reference."
            )
        subjects = [_subject(path, root.name, _step(path), cache) for path in sorted(found)]
    subjects.sort(key=lambda s: (s.step is None, s.step or 0))
    twice = {s.step for s in subjects if s.step is not None and [x.step for x in subjects].count(s.step) > 1}
    if twice:
        raise ModelError(f"models.checkpoints: two checkpoints have step {min(twice)}; name those you mean in a list.")
    return subjects


def single_model(name: str, folder: Path, cache: FingerprintCache | None = None, *, step: int | None = None) -> Subject:
    """The subject of a lone model, such as `models.reference`."""
    path = find_model(name, folder)
    return Subject(
        str(path), weights_fingerprint(path, cache), "", path.name if path.parent.name != "snapshots" else name, step
    )


class FingerprintCache:
    """Fingerprints of files by path, size and time of change, so that weights are read once and a tokenizer need not be loaded to be known.

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
        key = f"{path.resolve()}|{_state(path)}"
        if key not in self.known:
            with path.open("rb") as file:
                self._keep(key, hashlib.file_digest(file, "sha256").hexdigest())
        return self.known[key]

    def tokenizer(self, folder: Path) -> str:
        """`tokenizer_fingerprint` of a model folder, which is loaded only where a file of it has changed (weights aside)."""
        found = (*folder.iterdir(), *folder.glob("*/*.jinja"))
        files = sorted(p for p in found if p.is_file() and not any(p.match(w) for w in WEIGHTS))
        state = content_id(version("transformers"), [(p.relative_to(folder).as_posix(), _state(p)) for p in files])
        key = f"tokenizer|{folder.resolve()}|{state}"
        if key not in self.known:
            from curate.tokens import load_tokenizer, tokenizer_fingerprint

            self._keep(key, tokenizer_fingerprint(load_tokenizer(folder)))
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


def _state(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size}|{found.st_mtime_ns}"


def weights_fingerprint(path: Path, cache: FingerprintCache | None = None) -> str:
    """20 hex digits over a model folder's config and weights; the folder's name and place do not enter.

    Raises ModelError where a file is missing, unreadable, or half-written.
    """
    _check_folder(path)
    cache = cache or FingerprintCache(None)
    digest = hashlib.sha256()
    try:
        for file in [path / "config.json", *_weight_files(path)]:
            digest.update(f"{file.name}:{cache.of(file)}\n".encode())
    except OSError as error:
        raise ModelError(
            f"{path.name}: {Path(error.filename or path).name} cannot be read ({error.strerror})."
        ) from None
    return digest.hexdigest()[:20]


def _subject(path: Path, run: str, step: int | None, cache: FingerprintCache | None) -> Subject:
    return Subject(str(path), weights_fingerprint(path, cache), run, path.name, step)


def _step(path: Path) -> int | None:
    numbered = re.fullmatch(r"(?:checkpoint|step|global_step)[-_]?(\d+)", path.name)
    if numbered:
        return int(numbered[1])
    try:
        return int(json.loads((path / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _weight_files(path: Path) -> list[Path]:
    for pattern in WEIGHTS:
        files = sorted(path.glob(pattern))
        if files:
            return files
    return []


def _check_folder(path: Path) -> None:
    """A model folder has a readable config, and every weight file that its index names, each as long as its header says."""
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            f"{path.name} is a LoRA adapter, not a model. Merge it into its base first (`peft`: model.merge_and_unload(), then save)."
        )
    try:
        json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        inside = ", ".join(_names(path)[:6]) or "nothing"
        raise ModelError(
            f"{path.name}: no config.json in this folder, so it is not a model (found: {inside})."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name}/config.json cannot be read: {error}.") from None
    files = _weight_files(path)
    if not files:
        raise ModelError(
            f"{path.name}: no weights (*.safetensors) beside config.json; the checkpoint is incomplete (found: {', '.join(_names(path)[:6])})."
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{path.name}/{index.name} cannot be read: {error!r}.") from None
        missing = sorted(wanted - {f.name for f in files})
        if missing:
            raise ModelError(
                f"{path.name}: {missing[0]} is missing ({len(missing)} of {len(wanted)} weight files); the checkpoint is incomplete."
            )
    for file in files:
        if file.suffix == ".safetensors" and not _is_whole(file):
            raise ModelError(
                f"{path.name}/{file.name} is cut short or not a safetensors file; the checkpoint is half-written. Remove it or name the others."
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


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name}: not a folder here, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and has no cached copy."
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name}: not a folder here, and the hub refused it: {str(error).splitlines()[0]}") from None
