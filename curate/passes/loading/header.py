"""The header of a safetensors file: the names of its tensors, with shape and place. Nothing else of the file is read.

    8 bytes n, little-endian; n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}, __metadata__: {…}}; the tensors

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curate.recipe.bounds import json_value

LIMIT = 100_000_000  # bytes, safetensors' own


def read_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(its length in bytes, name -> entry of every tensor). ValueError where it is none of a safetensors file; OSError passes through."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > LIMIT or handle.read(1) != b"{":
            raise ValueError("it does not begin with a header")
        handle.seek(8)
        header = json_value(handle.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        _check(name, entry)
    return length, entries


def _check(name: str, entry: Any) -> None:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not isinstance(shape, list):
        raise ValueError(f"{name!r} in its header has no shape or no place")
    if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)) or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} in its header has a shape or a place that is none")
