"""What a folder that is no whole model holds instead, and what makes one of it: training state in shards, other formats, other tasks' models.

Advice that destroys ("remove it") is given only on proof: a file that is shorter than its own header says. A file that may not be read, a link to
nowhere, a pointer that git-lfs left, or a page that a download gave are each said as what they are.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from curate.errors import BrokenCheckpoint, ModelError, OtherLayout, UsageError, listed
from curate.models.other_formats import other_weights, training_state
from curate.passes.loading import adapter_config, header
from curate.passes.loading.adapter_config import is_adapter, read_adapter_config
from curate.passes.loading.own_code import code_files, runs_own_code
from curate.recipe.bounds import read_object

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LOADED = (
    "model.safetensors",
    INDEXES[0],
    "pytorch_model.bin",
    INDEXES[1],
)  # what transformers looks for, in this order
LFS = b"version https://git-lfs"
PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")
TASKS = {
    "ForSequenceClassification": "a classifier or reward model",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a reader that marks answers in a text",
    "ForMaskedLM": "a masked language model",
}


def check_folder(path: Path) -> None:
    """A model folder has a readable config of a model that can be measured, and every weight file that its index names, each as long as its header
    says; an adapter's its own two files. BrokenCheckpoint where files are missing, unreadable or of another layout; ModelError for a model or
    adapter that is not measured here whatever its files are.
    """
    if why := no_folder(path):
        raise BrokenCheckpoint(f"{path}: {why}")
    if is_adapter(path):
        _check_adapter(path)
        return
    config = path / "config.json"
    if not config.exists() and not config.is_symlink():
        known = training_state(path) or other_weights(path)
        if known:
            raise OtherLayout(known)
        inside = ", ".join(names_in(path)[:6]) or "nothing"
        raise BrokenCheckpoint(f"{path}: no config.json in this folder, so it is not a model (found: {inside}).")
    check_config(path, read_config(config))
    files = weight_files(path)
    if not any((path / name).exists() or (path / name).is_symlink() for name in LOADED):
        known = training_state(path) or other_weights(path)
        if known:
            raise OtherLayout(known)
        lacks = (
            f"{files[0].name} but no {INDEXES[0]}, which says what is in which file"
            if files
            else "no weights (*.safetensors) beside config.json"
        )
        raise BrokenCheckpoint(
            f"{path.name}: {lacks}; the checkpoint is incomplete (found: {', '.join(names_in(path)[:6])})."
        )
    for name in INDEXES:
        if (path / name).is_file() and files[0].suffix in name:
            _check_index(path / name, {f.name for f in files})
    for file in files:
        check_file(file, pickled=file.suffix == ".bin")


def no_folder(path: Path) -> str | None:
    """Why a path is no folder that can be looked into, and what to do; None where it is one."""
    try:
        if path.is_symlink() and not path.exists():
            return f"a link to {os.readlink(path)}, which is not there. Is its disk mounted, or was it moved? Point the link to where it is."
        if not path.exists():
            return "there is no such folder."
        if not path.is_dir():
            return "a file, where a folder is expected."
    except OSError as error:  # of a folder above it that may not be entered, of links in a circle
        return f"cannot be looked at ({(error.strerror or str(error)).lower()}). Ask the owner of the folders above it."
    if not os.access(path, os.R_OK | os.X_OK):
        return "this user may not look into this folder (permission denied). Ask its owner, or `chmod a+rx` it."
    return None


def _check_adapter(path: Path) -> None:
    read_start(path / adapter_config.CONFIG)
    read_adapter_config(path)
    weights = path / adapter_config.WEIGHTS
    if not weights.exists() and not weights.is_symlink():
        old = (
            " It has PEFT's older adapter_model.bin: load it with PEFT and `save_pretrained` it."
            if (path / "adapter_model.bin").is_file()
            else ""
        )
        raise BrokenCheckpoint(
            f"{path.name}: no {weights.name} beside adapter_config.json; the adapter is incomplete (found: {', '.join(names_in(path)[:6])}).{old}"
        )
    check_file(weights)


def _check_index(index: Path, present: set[str]) -> None:
    read_start(index)
    try:
        named = {str(name) for name in read_object(index)["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(f"{_named(index)} cannot be read: {listed([repr(error)], longest=200)}.") from None
    if missing := sorted(named - present):
        raise BrokenCheckpoint(
            f"{index.parent.name}: {missing[0]} is missing ({len(missing)} of {len(named)} weight files); the checkpoint is incomplete."
        )


def weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights: an adapter's tensors, safetensors, or .bin where there are no others."""
    if is_adapter(path):
        return [path / adapter_config.WEIGHTS]
    return next((files for pattern in WEIGHTS if (files := sorted(path.glob(pattern)))), [])


def check_pickles(paths: Iterable[str | Path | None], *, allowed: bool, key: str = "models.allow_pickle") -> None:
    """UsageError for a model whose weights are pickles, which nobody has allowed: a pickle is a program that its reader runs."""
    if allowed:
        return
    for path in paths:
        folder = Path(path or "")
        if not path or any((folder / name).exists() for name in LOADED[:2]):
            continue
        pickle = next((name for name in LOADED[2:] if (folder / name).exists()), None)
        if pickle is not None:
            raise UsageError(
                f"{folder}: its weights are pickles ({pickle}), which can hold code, and no safetensors are beside them. "
                "Save them as safetensors (`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)`, where you trust them), or "
                f"set {key}: true, and they are read as tensors alone."
            )


def names_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def check_config(path: Path, config: dict[str, Any]) -> None:
    """ModelError for a model that cannot be measured whatever its weights are: its own code, an encoder-decoder, a classifier."""
    _check_own_code(path, config)
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{path.name}: an encoder-decoder ({config.get('model_type')}); rows are measured on causal language models, which read prompt and "
            "response as one sequence. Name a decoder-only model."
        )
    said = config.get("architectures")
    if said is not None and not (isinstance(said, list) and all(isinstance(name, str) for name in said)):
        raise BrokenCheckpoint(
            f"{path.name}/config.json: architectures is {str(said)[:60]!r}, expected a list of names such as LlamaForCausalLM. Save the model again."
        )
    names = said or []
    task = next((TASKS[suffix] for name in names for suffix in TASKS if name.endswith(suffix)), None)
    if task is not None:
        raise ModelError(
            f"{path.name}: {names[0]} is {task}, it has no language model's head. Name the causal language model that is trained or measured."
        )


def _check_own_code(path: Path, config: dict[str, Any]) -> None:
    """ModelError for a model whose own code nobody has allowed, and for code that lies in another repository, so that its fingerprint misses it."""
    modules = own_modules(config)
    if runs_own_code():
        elsewhere = next((name for name in (*modules, *own_modules(_tokenizer_config(path))) if "--" in name), None)
        if elsewhere is not None:
            raise ModelError(
                f"{path.name}: its code is not in its folder but in another repository ({elsewhere.replace('--', ', ')}.py), where it can change. "
                "Copy that file into the folder, and name it there in auto_map of config.json without the repository."
            )
    elif modules and not _is_native(config):
        raise ModelError(
            f"{path.name}: this model brings its own code ({modules[0].split('--')[-1]}.py, named by auto_map in its config.json; model_type "
            f"{config.get('model_type')!r} is not one of transformers' own). curate runs no code out of a model's folder that nobody allowed.\n"
            "  Name a model of an architecture that transformers has, upgrade transformers if it has this one by now, or, where you have read the "
            "code and trust it, set models.trust_remote_code: true."
        )


def own_modules(config: dict[str, Any]) -> list[str]:
    """The modules that a config's auto_map names, without their classes; of another repository as owner/name--module."""
    auto_map = config.get("auto_map") or {}
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    names = [name for value in values for name in (value if isinstance(value, list | tuple) else [value]) if name]
    return list(dict.fromkeys(str(name).rpartition(".")[0] or str(name) for name in names))


def _tokenizer_config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / "tokenizer_config.json")
    except (OSError, ValueError):  # whoever loads the tokenizer says it
        return {}


def own_code_notes(folders: Iterable[str | Path | None]) -> list[str]:
    """A sentence for each model folder whose code runs."""
    notes = []
    for folder in dict.fromkeys(Path(one) for one in folders if one):
        if files := code_files(folder):
            names = listed(file.relative_to(folder).as_posix() for file in files)
            notes.append(f"models.trust_remote_code: Python code out of {folder.name} is run ({names}).")
    return list(dict.fromkeys(notes))


def _is_native(config: dict[str, Any]) -> bool:
    """Whether transformers has this model's class itself, which it then takes with trust_remote_code=False."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def check_file(file: Path, *, pickled: bool = False) -> None:
    """BrokenCheckpoint where a weight file is not readable or not whole, saying which of the many reasons it is. pickled: a .bin file."""
    read_start(file)
    if pickled:
        with file.open("rb") as handle:
            cut = handle.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(file)
        if cut:
            raise _half_written(file, "cut short (its end, where torch.save writes the list of tensors, is missing)")
        return
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > header.LIMIT or handle.read(1) != b"{":
            raise _not_safetensors(file)
        if length > size - 8:
            raise _half_written(file, f"cut short ({size:,} bytes, its header alone has {length:,})")
    try:
        length, entries = header.read_header(file)
    except ValueError:
        raise _not_safetensors(file) from None
    expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < expected:
        raise _half_written(file, f"cut short ({size:,} of {expected:,} bytes)")
    if size > expected:
        raise BrokenCheckpoint(
            f"{_named(file)} is {size - expected:,} bytes longer than its own header says: not what was saved. Copy it again from where it came."
        )


def read_start(file: Path) -> bytes:
    """The first bytes of a model's file. BrokenCheckpoint where it cannot be read, is empty, or stands in for a file that was not fetched."""
    if file.is_symlink() and not file.exists():
        raise BrokenCheckpoint(
            f"{_named(file)} is a link to {file.readlink()}, which is not there (not downloaded, a cleaned cache, or a disk that is not mounted). "
            "Fetch it again, or mend the link."
        )
    if file.is_dir():
        raise BrokenCheckpoint(f"{_named(file)} is a folder, expected a file.")
    try:
        with file.open("rb") as handle:
            start = handle.read(64)
    except PermissionError:
        raise BrokenCheckpoint(
            f"{_named(file)} cannot be read: this user may not (permission denied). The file itself may be whole: ask its owner, or `chmod a+r` it."
        ) from None
    except OSError as error:
        raise BrokenCheckpoint(f"{_named(file)} cannot be read ({error.strerror or error}).") from None
    if start.startswith(LFS):
        raise BrokenCheckpoint(
            f"{_named(file)} is a git-lfs pointer, a few lines in place of the file: it was cloned without git-lfs. "
            "Run `git lfs install` and `git lfs pull` in that repository."
        )
    if start.lstrip().lower().startswith(PAGE):
        raise BrokenCheckpoint(
            f"{_named(file)} is a web page, not the file: the download gave a page instead (not logged in, or no such file). Download it again."
        )
    if not start:
        raise _half_written(file, "empty (0 bytes)")
    return start


def read_config(file: Path) -> dict[str, Any]:
    """A model's config.json. BrokenCheckpoint where it cannot be read."""
    read_start(file)
    try:
        return read_object(file)
    except ValueError as error:
        raise BrokenCheckpoint(f"{_named(file)} cannot be read: {error}.") from None


def _named(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _half_written(file: Path, how: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{_named(file)} is {how}; the checkpoint is half-written. If no training or copy is writing it now, remove it or name the others."
    )


def _not_safetensors(file: Path) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{_named(file)} is not a safetensors file (its header cannot be read): half-written, or something else under this name. "
        "Save or copy it again."
    )
