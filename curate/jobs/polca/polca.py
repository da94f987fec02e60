"""POLCA of a recipe's run: rows and checkpoints in, hidden breakthroughs out, with the plain loss clustered beside every direction.

    rows, checkpoints -> basis of the run's own weight deltas -> every row's change of loss along each direction -> clusters -> report

Stopped and started again, finished segments are not run twice (measured.py: where they are kept).
Source: Kangaslahti et al. 2025, arXiv:2506.15872.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curate.console import Progress
from curate.errors import UsageError
from curate.jobs.polca.clusters import Cluster, find_clusters
from curate.jobs.polca.decomposition import Decomposition
from curate.jobs.polca.measured import Measuring
from curate.jobs.polca.result import Audit, DirectionClusters
from curate.models.fingerprints import FingerprintCache
from curate.passes.loading.own_code import allowing_own_code
from curate.plan.roles import find_roles
from curate.recipe.load import Loaded, load_recipe
from curate.rows import Row, text_of
from curate.store import Store
from curate.workflow.read import read_sources

TOLERANCE = 0.02


def audit(
    recipe: str | Path | dict[str, Any],
    *,
    set: dict[str, Any] | list[str] | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
    smallest: int | None = None,
    tolerance: float = TOLERANCE,
) -> Audit:
    """Take a recipe's training run apart over its SFT rows.

    smallest: rows that make a cluster (default: 2% of the rows, 5 at least). tolerance: of the decomposition's sum, per segment, in mean |Δloss|.
    dtype auto is float32: interpolated weights rounded to bf16 are no path. UsageError where the recipe is of another kind, has no checkpoints or
    scikit-learn is missing; ModelError where the checkpoints are not of one model.
    """
    progress = progress or Progress(quiet=True)
    loaded = load_recipe(recipe, set=set, store=store)
    _check(loaded, smallest, tolerance)
    kept = Store(loaded.store, create=True, on_wait=progress.say, on_damage=progress.warn)
    with kept.measuring(), allowing_own_code(loaded.recipe.models.trust_remote_code):
        sources = read_sources(loaded, kept, progress)
        row_ids = kept.row_ids_of(sources["train"], kind="sft", role="train")
        rows = list(kept.iter_rows(row_ids))
        cache = FingerprintCache(kept.folder / "weights.json")
        listed = find_roles(loaded, cache)
        checkpoints = list(listed.series)
        if len(checkpoints) < 2:
            raise UsageError(
                f"{loaded.path or 'recipe'}: POLCA needs the weights of two checkpoints or more, found {len(checkpoints)} in `models`."
            )
        of_row = dict(zip(row_ids, rows, strict=True))
        measured = Measuring(loaded, kept, of_row, checkpoints, cache, tolerance).result(progress)
    decomposition = measured.decomposition
    if not len(decomposition.rows):
        raise UsageError(
            f"{loaded.path or 'recipe'}: none of the {len(rows):,} rows has a completion that could be measured."
        )
    notes = [*(f"Left out: {text}" for text in listed.skipped), *measured.notes]
    least = smallest or max(5, round(0.02 * len(decomposition.rows)))
    texts = [_text(row) for row in rows]
    labels = [s.checkpoint or s.label for s in checkpoints]
    clusters = find_all(decomposition, least)
    way, folder = measured.way, measured.kept_in
    return Audit(decomposition, row_ids, texts, labels, clusters, least, way, notes, folder)


def find_all(decomposition: Decomposition, smallest: int) -> list[DirectionClusters]:
    """The plain loss' clusters, and each direction's; row numbers are the decomposition's."""
    rows = decomposition.rows
    plain_loss = decomposition.trajectories(None)[rows]
    result = []
    for direction in (None, *range(decomposition.n_directions)):
        own = decomposition.trajectories(direction)[rows]
        clusters, outliers = find_clusters(own, None if direction is None else plain_loss, smallest=smallest)
        moved = [Cluster(rows[c.rows], rows[c.medoids], c.mean, c.breakthrough, c.turn, c.hidden) for c in clusters]
        result.append(DirectionClusters(direction, moved, rows[outliers]))
    return result


def _check(loaded: Loaded, smallest: int | None, tolerance: float) -> None:
    recipe, name = loaded.recipe, loaded.path or "recipe"
    if smallest is not None and smallest < 2:
        raise UsageError(f"--smallest {smallest}: expected rows that make a cluster, 2 or more.")
    if not tolerance >= 0:
        raise UsageError(f"--tolerance {tolerance}: expected a share of the mean |Δloss|, such as {TOLERANCE}.")
    if recipe.kind != "sft" or recipe.models.checkpoints is None:
        raise UsageError(
            f"{name}: POLCA takes a run apart: wanted `kind: sft` and `models: {{checkpoints: …}}`, found kind {recipe.kind} and "
            f"{'no checkpoints' if recipe.models.checkpoints is None else 'checkpoints'}. `curate init sft` writes such a recipe."
        )
    if recipe.source is None:
        raise UsageError(f"{name}: there is no `source`: POLCA needs the rows' texts.")
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UsageError(
            "POLCA clusters with scikit-learn, which is not installed here: `pip install 'curate-dynamics[report]'`."
        ) from None


def _text(row: Row | None) -> str:
    """Prompt and completion on one line."""
    if row is None:
        return ""
    parts = [row.prompt, getattr(row, "completion", None) or ""]
    return " → ".join(p if isinstance(p, str) else " | ".join(text_of(m) for m in p) for p in parts)
