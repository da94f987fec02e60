"""Whether code that a model's folder brings is run. transformers would ask on the terminal; here a recipe says it (`models.trust_remote_code`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_allowed: ContextVar[bool] = ContextVar("own code of models", default=False)


@contextmanager
def allowing_own_code(allowed: bool) -> Iterator[None]:
    """What is loaded inside, by this thread, may run its folder's code, or not."""
    before = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(before)


def runs_own_code() -> bool:
    """For `trust_remote_code=`, wherever transformers or vLLM load something."""
    return _allowed.get()


def code_files(folder: Path) -> list[Path]:
    """A model's own code, where it may run."""
    return sorted(folder.rglob("*.py")) if runs_own_code() else []
