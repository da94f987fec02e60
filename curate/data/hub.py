"""Datasets of the Hugging Face hub: owner/name, owner/name:config, owner/name/folder. Rows are streamed; whether it is there is asked first.

The hub is asked once and waited for SECONDS at most: a path that was misspelt is said at once, not after a minute of retries.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import ValidationError

HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*(:[\w.-]+)?")
SECONDS = 2.0
WAIT = "HF_HUB_ETAG_TIMEOUT"  # the hub's own variable for how long an answer is waited for


def hub_parts(name: str) -> tuple[str, str | None, str | None]:
    """(repository, config, folder) of owner/name:config or owner/name/folder."""
    name, _, config = name.partition(":")
    parts = name.split("/")
    return "/".join(parts[:2]), config or None, "/".join(parts[2:]) or None


@dataclass
class _Answer:
    commit: str | None = None
    error: Exception | None = None


def find_on_hub(name: str, revision: str | None, hint: str) -> str | None:
    """The commit a revision (or the default branch) stands at, None where the hub may not be asked but has been (offline, a copy in the cache).

    ValidationError where it has no such dataset or does not answer. hint: what else the name may mean.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository = hub_parts(name)[0]
    if huggingface_hub.is_offline_mode():
        if _cached(repository):
            return None
        raise not_found(
            name, "HF_HUB_OFFLINE is set, so the hub is not asked, and there is no copy of it in the cache", hint
        )
    wait = float(os.environ.get(WAIT) or SECONDS)
    answer = _Answer()

    def ask() -> None:
        try:
            answer.commit = huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=wait).sha
        except Exception as error:  # its own classes, and those of the library that it reads the network with
            answer.error = error

    asking = threading.Thread(target=ask, daemon=True)  # looking a host's name up has no time limit of its own
    asking.start()
    asking.join(wait)
    if asking.is_alive():
        raise not_found(name, f"the hub did not answer within {wait:g} s ({WAIT}=30 waits longer)", hint)
    if isinstance(answer.error, errors.RevisionNotFoundError):
        raise ValidationError(
            f"{name}: the hub's dataset has no revision {revision!r}. Choose another with `--set source.revision=…`."
        )
    if isinstance(answer.error, errors.GatedRepoError):
        raise ValidationError(f"{name}: a gated dataset of the hub: ask for access on its page, then `hf auth login`.")
    if isinstance(answer.error, errors.RepositoryNotFoundError):
        raise not_found(name, "the hub has no dataset of this name (or a private one: `hf auth login`)", hint)
    if answer.error is not None:
        raise not_found(name, f"the hub cannot be reached ({first_line(answer.error)})", hint)
    return answer.commit


def not_found(name: str, why: str, hint: str) -> ValidationError:
    return ValidationError(
        f"{name}: no such file or folder here, and as a dataset of the Hugging Face hub: {why}.{hint}"
    )


def _cached(repository: str) -> bool:
    from huggingface_hub import constants

    folder = repository.replace("/", "--")
    datasets_home = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return (Path(constants.HF_HUB_CACHE) / f"datasets--{folder}").is_dir() or (
        Path(datasets_home) / repository.replace("/", "___")
    ).is_dir()


def hub_rows(name: str, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    import datasets

    repository, config, folder = hub_parts(name)
    try:
        yield from streamed(
            datasets.load_dataset(repository, config, data_dir=folder, split=split, revision=revision, streaming=True)
        )
    except (
        Exception
    ) as error:  # connection, missing, gated, no such split or config: `datasets` has a class for each and says it well
        raise ValidationError(
            f"{name}: no such file or folder here, and the Hugging Face hub did not give a dataset of this name "
            f"({type(error).__name__}: {first_line(error)}). Check the spelling, the split ({split}; slices such as train[:10] are not read: "
            "`limit` takes the first rows), the network and HF_HUB_OFFLINE; a configuration is named as owner/name:config."
        ) from error


def streamed(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows of a streamed dataset: images and audio as they are stored, class labels by their names."""
    from curate.data.labels import class_names, with_names

    features = getattr(rows, "features", None)
    if features:
        rows = rows.decode(False)
    labels = class_names(features)
    for row in rows:
        yield with_names(dict(row), labels)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
