"""curate: which fine-tuning examples are worth training on, from how a model learns them.

Everything here is imported when first used, so `import curate` stays light: no torch, no vllm, no duckdb before they are needed.

    import curate
    result = curate.run("recipe.yaml", set={"select.keep.share": 0.5})
    store = curate.Store("store")
    rows = curate.load("data/pairs.jsonl")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("curate-dynamics")
except PackageNotFoundError:  # a checkout on the path without an installation
    __version__ = "0+unknown"

_HOME = {
    "run": "curate.workflow.run",
    "Store": "curate.store",
    "load": "curate.data",
    "score": "curate.scores",
    "dataset_value": "curate.scores",
    "measurement": "curate.measurements",
    "Recorder": "curate.workflow.recorder",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'curate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
