"""Values that are looked at as they come in, whatever they are used for later: paths, names that become part of a file's, addresses with a login."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from curate.errors import without_secrets

ABSOLUTE = re.compile(r"(?<![\w.:/~…])/([\w.@+-]+)/(?:[\w.@+-]+/)*([\w.@+*?-]+)")
LOGIN = re.compile(r"^(\w[\w+.-]*://)([^/?#]*@)")


class Address(str):
    """An address without the user and password that it came with; they are sent with every request, and written nowhere."""

    login: str = ""


def address(written: str) -> Address:
    """https://user:password@host/v1 as https://host/v1, which knows its login. ValueError where a login may be left in it."""
    if re.search(r"[?&][^=&]*(key|token|secret|password)[^=&]*=", written, re.IGNORECASE):  # nor is a key said
        raise ValueError("a key stands in the address. Put it into the environment variable that server.key_env names")
    login = LOGIN.search(written)
    result = Address(LOGIN.sub(r"\1", written))
    if "@" in result:  # the address itself is not said: it may hold a password
        raise ValueError(
            "an @ is left in the address. Write https://user:password@host/v1, with / # ? @ of a password as %2F %23 %3F %40"
        )
    result.login = getattr(written, "login", "") or (login[2] if login else "")
    return result


def without_login(raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it was written, with `server.url` as it is kept."""
    server = raw.get("server")
    if not isinstance(server, dict) or not isinstance(server.get("url"), str):
        return raw
    try:
        kept = str(address(server["url"]))
    except ValueError:  # which the recipe's own check says
        kept = "?"
    return {**raw, "server": {**server, "url": kept}}


def file_name(name: str) -> str:
    """A name that becomes part of a file's. Raises ValueError for one that would lead to another folder, or that no file can have."""
    if not name.strip() or name.startswith(".") or len(name) > 100 or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise ValueError(
            "wanted a name, which becomes part of a file's: no slash, no dot in front, 1 to 100 characters"
        )
    return name


def path(written: str) -> str:
    """A path, or a hub id. Raises ValueError for one that no system has: with characters that no name has, or of a length that none takes."""
    if re.search(r"[\x00-\x1f\x7f]", written):
        raise ValueError("wanted a path: no line break, tab or NUL in it")
    if len(written.encode(errors="replace")) > 4096 or any(
        len(p.encode(errors="replace")) > 255 for p in written.split("/")
    ):
        raise ValueError("wanted a path: at most 4,096 bytes, 255 in each of its names")
    return written


def travelling(text: str, folder: Path) -> str:
    """A text that leaves this machine, such as a card: paths in the recipe's folder are from there, of others only the name is left.

    A path is what begins with a folder that there is at the root here; an address's path is none.
    """
    inside = f"{folder.as_posix().rstrip('/')}/"
    text = text.replace(inside, "") if inside != "/" else text

    def shortened(found: re.Match[str]) -> str:
        return f"…/{found[2]}" if Path(f"/{found[1]}").is_dir() else found[0]

    return ABSOLUTE.sub(shortened, without_secrets(text))


PathText = Annotated[str, AfterValidator(path)]
