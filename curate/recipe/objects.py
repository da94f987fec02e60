"""Objects of a user's own that a recipe names: "package.module:object". Standard library only.

Scores, measurements, graders and perturbations are found this way; a user's module is looked for on Python's path, then in the recipe's
folder and the current one (a console command's own path has neither).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

from curate.errors import UsageError, did_you_mean


def load_object(spec: str, *, what: str, folder: str | Path | None = None) -> Any:
    """Import "package.module:object" (object may be dotted).

    what: the noun for messages ("score"). folder: where to look besides Python's path and the current folder, usually the recipe's.
    Raises UsageError when the module is not found, fails while it is imported, or has no such object (the nearest one is offered).
    """
    module_name, _, attribute = spec.partition(":")
    if not attribute or not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise UsageError(f"{what} {spec!r}: a {what} of your own is named `package.module:object`.")
    module = _import(module_name, spec, what, folder)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            hint = did_you_mean(part, [n for n in dir(value) if not n.startswith("__")], sentence=True, before=" ")
            raise UsageError(f"{what} {spec!r}: module {module_name!r} ({_where(module)}) has no {part!r}.{hint}")
        value = getattr(value, part)
    return value


def n_positional(function: Any, least: int, most: int) -> int:
    """How many positional arguments to call a function with: `most` where it has places for them, else `least`. TypeError where it takes neither."""
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise TypeError(str(error)) from None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    n = most if sum(p.kind in positional for p in signature.parameters.values()) >= most else least
    signature.bind(*range(n))
    return n


def source_version(function: Any) -> str:
    """12 hex digits over a function's own source, or over that of an object's class; "unknown" where there is none. What it calls is not in it,
    nor is an edit that this process has not imported.
    """
    code: Any = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    return _version_of(code)


@cache
def _version_of(code: Any) -> str:
    try:
        return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:12]
    except (OSError, TypeError):
        return "unknown"


def _import(module_name: str, spec: str, what: str, folder: str | Path | None) -> Any:
    folders = [str(Path(place).resolve()) for place in (*([folder] if folder else []), ".")]
    added = [place for place in dict.fromkeys(folders) if place not in sys.path]
    sys.path.extend(added)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UsageError(
                f"{what} {spec!r}: there is no module {error.name!r}, neither on Python's path nor in {', '.join(dict.fromkeys(folders))}."
            ) from None
        raise UsageError(
            f"{what} {spec!r}: importing {module_name!r} failed: {error}. Install what it imports."
        ) from error
    except Exception as error:
        raise UsageError(
            f"{what} {spec!r}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        for place in added:
            if place in sys.path:
                sys.path.remove(place)


def _where(module: Any) -> str:
    return getattr(module, "__file__", None) or "built in"
