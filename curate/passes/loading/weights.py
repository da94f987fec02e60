"""Another checkpoint's weights into a model that is already in memory: one safetensors file or shards, copied tensor
by tensor.

A series of K checkpoints costs one model's memory and no second construction. Tied heads may be left out of the files.
Whatever cannot be copied name by name (checkpoint formats that transformers converts while loading, .bin files) goes
through transformers' own loader, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from curate.errors import ModelError
from curate.passes.descriptions import describe_folder, first_line
from curate.passes.loading.own_code import runs_own_code
from curate.recipe.bounds import read_object

# Keys of a config that may differ between checkpoints of one model.
FREE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "bos_token_id",
    "eos_token_id", "pad_token_id", "_attn_implementation", "_attn_implementation_autoset", "attention_dropout",
    "hidden_dropout", "attn_dropout", "resid_pdrop", "embd_pdrop", "output_hidden_states", "output_attentions",
    "return_dict", "initializer_range", "auto_map", "quantization_config", "problem_type", "id2label", "label2id",
    "chunk_size_feed_forward", "is_encoder_decoder", "gradient_checkpointing",
}  # fmt: skip


def swap(module: Any, path: str | Path) -> None:
    """Copy the weights at `path` into `module`, in place and in its dtype. ModelError, and the old weights, when they
    do not fit.
    """
    folder = local_folder(path)
    _same_architecture(module, folder, path)
    files = _files(folder, path)
    if files:
        from safetensors import SafetensorError, safe_open

        try:
            names = {}  # tensor -> file
            for file in files:
                with safe_open(file, framework="pt") as opened:
                    names.update(dict.fromkeys(opened.keys(), file))
            if _copy_by_name(module, names, path):
                module.tie_weights()
                return
        except (OSError, SafetensorError) as problem:
            raise ModelError(
                f"{path}: unreadable weights ({type(problem).__name__}: {first_line(problem)})."
            ) from problem
    _copy_through_transformers(module, folder, path)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers while it loads weights; they would break ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def local_folder(path: str | Path) -> Path:
    """The folder of a checkpoint: itself, or the local snapshot of a hub id."""
    if Path(path).is_dir():
        return Path(path)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except Exception as problem:
        raise ModelError(
            f"{path}: wanted a checkpoint's folder (config.json, *.safetensors), found {describe_folder(path)}."
        ) from problem


def _files(folder: Path, path: str | Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [folder / name for name in sorted({str(n) for n in read_object(index)["weight_map"].values()})]
        except (ValueError, KeyError, AttributeError) as problem:
            raise ModelError(f"{path}: model.safetensors.index.json is unreadable: {first_line(problem)}") from problem
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"{path}: shards named in model.safetensors.index.json are missing: {', '.join(missing)}.")
        return files
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _same_architecture(module: Any, folder: Path, path: str | Path) -> None:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        if not list(folder.glob("*.safetensors")) or (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{path}: wanted a checkpoint's folder (config.json, *.safetensors), found {describe_folder(path)}."
            )
        return
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=runs_own_code()).to_dict()
    except Exception as problem:
        raise ModelError(
            f"{path}: unreadable config.json ({type(problem).__name__}: {first_line(problem)})."
        ) from problem
    loaded = module.config.to_dict()
    for key in sorted((loaded.keys() | config.keys()) - FREE):
        if loaded.get(key) != config.get(key):
            raise ModelError(
                f"{path}: wanted a checkpoint of the same {loaded.get('model_type')} model, but {key} is "
                f"{config.get(key)!r} there and {loaded.get(key)!r} in the model that is loaded.\n"
                "  Checkpoints of one run share their config.json."
            )


def _copy_by_name(module: Any, names: dict[str, Path], path: str | Path) -> bool:
    """Copy every tensor whose name and shape fit. False (nothing copied) when the names are not the model's."""
    from safetensors import safe_open

    state = dict(module.state_dict())
    by_storage: dict[tuple[int, Any], set[str]] = {}
    for name, tensor in state.items():
        by_storage.setdefault((tensor.data_ptr(), tensor.shape), set()).add(name)
    covered = {other for group in by_storage.values() if group & names.keys() for other in group}
    if not names.keys() <= state.keys() or covered != set(state):
        return False
    for file in sorted(set(names.values())):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                _same_shape(name, tuple(opened.get_slice(name).get_shape()), tuple(state[name].shape), path)
    with torch.no_grad():
        for file in sorted(set(names.values())):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    state[name].copy_(opened.get_tensor(name))
    return True


def _same_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], path: str | Path) -> None:
    if shape != expected:
        raise ModelError(
            f"{path}: {name} has shape {shape}, the model that is loaded has {expected}: not a checkpoint of it."
        )


def _copy_through_transformers(module: Any, folder: Path, path: str | Path) -> None:
    try:
        with quiet():
            other, report = type(module).from_pretrained(
                str(folder), dtype=module.dtype, output_loading_info=True, trust_remote_code=runs_own_code()
            )
    except Exception as problem:
        raise ModelError(
            f"{path}: wanted weights of a {type(module).__name__}, found {describe_folder(folder)}.\n"
            f"  {type(problem).__name__}: {first_line(problem)}"
        ) from problem
    source, target = other.state_dict(), module.state_dict()
    odd = sorted((source.keys() ^ target.keys()) | set(report["missing_keys"]) | set(report["unexpected_keys"]))
    if odd:
        raise ModelError(
            f"{path}: not a checkpoint of the {type(module).__name__} that is loaded: its tensors differ by {len(odd)}, "
            f"{odd[0]} for one."
        )
    for name, tensor in source.items():
        _same_shape(name, tuple(tensor.shape), tuple(target[name].shape), path)
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)
