"""A checksum inside a safetensors file: CRC-32 of all its bytes, with zeros where it stands itself (in the header's metadata, as "crc32")."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import BinaryIO

BLANK = {"crc32": "00000000"}
PLACE = b'"crc32":"00000000"'


class Known:
    """Files that were found whole in this process, by their state: each is read once for that."""

    def __init__(self) -> None:
        self._whole: set[tuple[str, int, int]] = set()

    def fault_of(self, file: Path) -> str | None:
        """As `fault_of_tensors`."""
        found = file.stat()
        state = (str(file), found.st_size, found.st_mtime_ns)
        if state in self._whole:
            return None
        why = fault_of_tensors(file)
        if why is None:
            self._whole.add(state)
        return why


def sealed_tensors(file: Path) -> None:
    """Put the checksum of a safetensors file, just written with BLANK as metadata, in its place."""
    with file.open("r+b") as opened:
        header, rest = _header(opened)
        at = header.index(PLACE) + len(PLACE) - 9
        opened.seek(8 + at)
        opened.write(f"{_crc(opened, header, rest):08x}".encode())


def fault_of_tensors(file: Path) -> str | None:
    """What is wrong with a safetensors file, in words; None where it is what was written, or where nobody can tell: it has no checksum."""
    try:
        with file.open("rb") as opened:
            header, rest = _header(opened)
            noted = json.loads(header).get("__metadata__", {}).get("crc32")
            if noted is None:
                return None
            blank = header.replace(f'"crc32":"{noted}"'.encode(), PLACE)
            found = f"{_crc(opened, blank, rest):08x}"
    except (OSError, ValueError, AttributeError, OverflowError, MemoryError) as error:
        return f"it cannot be read: {error}"
    return None if found == noted else f"its checksum is {found}, and was {noted} when it was written"


def _header(opened: BinaryIO) -> tuple[bytes, int]:
    """A safetensors file's header, and where its tensors begin."""
    size = int.from_bytes(opened.read(8), "little")
    if size > os.fstat(opened.fileno()).st_size:
        raise ValueError("it ends inside its header")
    return opened.read(size), 8 + size


def _crc(opened: BinaryIO, header: bytes, rest: int) -> int:
    before = opened.tell()
    opened.seek(rest)
    found = zlib.crc32(header)
    while piece := opened.read(1 << 22):
        found = zlib.crc32(piece, found)
    opened.seek(before)
    return found
