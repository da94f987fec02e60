"""What a user can cause, and the exit code each has on the command line.

Every message says what was wanted, what was found (file, row, column), and the next command. Raised once, never logged and raised.
"""

from __future__ import annotations

import base64
import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable
from urllib.parse import quote


class CurateError(Exception):
    """Something failed that the user can do something about. Exit code 1."""

    exit_code = 1


class UsageError(CurateError):
    """Wrong use of a command, or a wrong recipe. Exit code 2."""

    exit_code = 2


class ValidationError(CurateError):
    """Rows that are not what their kind needs: names file, row, column, and what was found."""


class ModelError(CurateError):
    """A model, tokenizer or checkpoint that cannot be read or used."""


class BrokenCheckpoint(ModelError):
    """A checkpoint whose files are missing, cut short or unreadable: of a run, it can be left out (models.on_broken_checkpoint)."""


class OtherLayout(BrokenCheckpoint):
    """A folder that holds training state or weights in another format: whole, perhaps, but nothing that is loaded as it is."""


class EngineError(CurateError):
    """A sampling engine or server that cannot start, cannot serve this model, or died."""


class StoreError(CurateError):
    """A store that is locked, damaged, full, or of another version."""


class DamagedStore(StoreError):
    """A database file whose content is not what was written; shards and sources make it again."""


# A disk that is full, cannot be written, or a limit of the system that is reached: told from other errors, whatever library met it.
KEPT = "What was finished is kept; run the same command again."
FULL = f"the disk is full. Free some space (or name another folder). {KEPT}"
LIMITS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: f"the disk quota is used up. Free some space (or name another folder). {KEPT}",
    errno.EFBIG: f"a file would be larger than this system allows (`ulimit -f`, or the file system). {KEPT}",
    errno.EROFS: "the file system is read-only. Name a folder that can be written, with --store or export.to.",
    errno.ENAMETOOLONG: "a path is longer than this system takes (255 bytes a name, 4,096 in all). Name another one.",
    errno.EMFILE: f"too many files are open at once (`ulimit -n` says how many may be). {KEPT}",
    errno.ENFILE: f"the system has too many files open. {KEPT}",
}
SPELT = {
    "no space left on device": errno.ENOSPC,
    "not enough space": errno.ENOSPC,
    "os error 28": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "too many open files": errno.EMFILE,
    "file name too long": errno.ENAMETOOLONG,
}


def disk_trouble(error: BaseException | None) -> StoreError | None:
    """What is wrong with the disk, of an error or of what caused it; None where that is not it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, CurateError):
        seen.add(id(error))
        text = str(error).lower()
        number = getattr(error, "errno", None) if isinstance(error, OSError) else None
        if number not in LIMITS:
            number = next((n for spelt, n in SPELT.items() if spelt in text), None)
        if number is not None:
            file = getattr(error, "filename", None)
            return StoreError(f"{f'{file}: ' if file else ''}{LIMITS[number]}")
        error = error.__cause__ or error.__context__
    return None


SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)  # of environment variables
SECRET_FORMS = (
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), r"\1 …"),
    (re.compile(r"\b(?:hf_|sk-)[\w-]{16,}"), "…"),
    (re.compile(r"(?<=://)[^/?#\s@]+@"), "…@"),
)


def without_secrets(text: str, more: Iterable[str] = ()) -> str:
    """A text that is shown or kept, without the keys and passwords that a server or a library may repeat in it.

    Those are the values of environment variables whose names say so, `more`, both as they are, in a URL and in base64, and what looks like a key.
    """
    own = [value for name, value in os.environ.items() if SECRET_NAMES.search(name) and not value.startswith("/")]
    known = [secret for secret in (*own, *more) if len(secret) > 5]
    forms = {
        form for s in known for form in (s, quote(s, safe=""), base64.b64encode(s.encode(errors="replace")).decode())
    }
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "…")
    for pattern, instead in SECRET_FORMS:
        text = pattern.sub(instead, text)
    return text


def listed(names: Iterable[object], *, most: int = 40, longest: int = 60) -> str:
    """Names as a message lists them: so many of them, and so much of each."""
    known = [str(name) for name in names]
    shown = ", ".join(name if len(name) <= longest else f"{name[:longest]}…" for name in known[:most])
    return shown if len(known) <= most else f"{shown} and {len(known) - most:,} more"


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Of the known names the one that was probably meant; None where none is like it. cutoff: how alike, from 0 to 1."""
    found = difflib.get_close_matches(name, list(known), 1, cutoff)
    return found[0] if found else None


def did_you_mean(
    name: str,
    known: Iterable[str],
    otherwise: str = "",
    *,
    cutoff: float = 0.6,
    show: Callable[[str], str] = repr,
    sentence: bool = False,
    before: str = "",
    after: str = "",
) -> str:
    """ "did you mean 'near'?", or `otherwise` where no known name is near. show: how a name is written. sentence: whether it begins one.

    before, after: what joins the question to its message, such as a space; not joined to `otherwise`.
    """
    near = nearest(name, known, cutoff=cutoff)
    return otherwise if near is None else f"{before}{'D' if sentence else 'd'}id you mean {show(near)}?{after}"
