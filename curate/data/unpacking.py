"""A file's bytes, out of a .gz too, and what is wrong with a file as a whole, in words.

A compressed file gives no more than text can have been packed into it.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from curate.errors import ValidationError
from curate.recipe.bounds import PACKED, RATIO

PIECE = 1 << 20  # bytes, or characters, at a time


@contextmanager
def explained(name: str) -> Iterator[None]:
    try:
        yield
    except Bomb as error:
        raise ValidationError(f"{name}: {error}.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValidationError(
            f"{name}: a .gz file that ends too early or is damaged ({error}). Was its download or copy cut off? Fetch it again; "
            "`gzip -t` tests it."
        ) from error
    except UnicodeDecodeError as error:
        raise ValidationError(
            f"{name}: not UTF-8 text (byte {error.object[error.start]:#04x}). Convert it to UTF-8 first."
        ) from error
    except IsADirectoryError as error:
        raise ValidationError(f"{name}: a folder where a file was expected.") from error
    except OSError as error:
        raise ValidationError(
            f"{name}: cannot be read: {error.strerror or error}. Check that you may read it (`ls -l`), and that its disk is whole."
        ) from error


class Unpacked(gzip.GzipFile):
    """A .gz file, up to what text can have been packed into it."""

    def __init__(self, path: Path) -> None:
        self.packed = open(path, "rb")  # noqa: SIM115 (`close` closes it)
        self.given = 0
        super().__init__(fileobj=self.packed, mode="rb")

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.given += len(data)
        check_ratio(self.given, self.packed.tell())
        return data

    def close(self) -> None:
        super().close()
        self.packed.close()


def check_ratio(out: int, packed: int) -> None:
    """ValueError where more came out of a compressed file than text can have been packed into it."""
    if out > PACKED and out > RATIO * packed:
        raise Bomb(
            f"it unpacks to {RATIO} times its size and more, which text never does. If it is what you mean, unpack it first and name the "
            "unpacked file"
        )


class Bomb(ValueError):
    """A compressed file that holds more than text can have been packed into it."""


def open_bytes(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(Unpacked(path), PIECE)
    return open(path, "rb")
