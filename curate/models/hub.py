"""A model of the hub: its id, and the snapshot of it that is fetched into the cache."""

from __future__ import annotations

import re
from pathlib import Path

from curate.errors import ModelError
from curate.passes.loading.own_code import runs_own_code

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def fetch_snapshot(repo: str, revision: str | None) -> Path:
    """The snapshot of a hub repository, fetched where the cache has none: safetensors, or .bin weights where there are no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    name = f"{repo}@{revision}" if revision else repo
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if runs_own_code() else [])]
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
        if not any(snapshot.glob("*.safetensors")):
            snapshot = Path(
                snapshot_download(repo, revision=revision, allow_patterns=[*patterns, "pytorch_model*.bin"])
            )
        return snapshot
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name}: not a folder here, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and has no cached copy."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{name}: the hub has the repository {repo}, but no revision {revision} of it.") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name}: not a folder here, and the hub refused it: {str(error).splitlines()[0]}") from None
