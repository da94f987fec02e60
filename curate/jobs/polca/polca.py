"""POLCA of a recipe's run: rows and checkpoints in, hidden breakthroughs out, with the plain loss clustered beside every direction.

    rows, checkpoints -> basis of the run's own weight deltas -> every row's change of loss along each direction -> clusters -> report

Kept in the store under polca/<key>/, a file per segment, written when it is done: stopped and started again, finished segments are not run twice.
The key covers the rows, the checkpoints' weights, the tokenizer and its limits, the engine and the tolerance.
Source: Kangaslahti et al. 2025, arXiv:2506.15872; docs/scores.md, section 7.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curate.console import Progress, cell, counted, table
from curate.errors import UsageError
from curate.jobs.polca.clusters import Cluster, find_clusters
from curate.jobs.polca.decomposition import Decomposition, Integrator, Way, checkpoint_losses
from curate.models.checkpoints import Checkpoint
from curate.models.fingerprints import FingerprintCache
from curate.plan.roles import find_roles
from curate.recipe.load import Loaded, load_recipe
from curate.rows import Row, content_id
from curate.store import Store
from curate.workflow.read import read_sources

VERSION = 1  # of what is kept
TOLERANCE = 0.02
TEXT = 90  # characters of a medoid


@dataclass(frozen=True)
class Found:
    """Clusters of one direction's trajectories, or of the plain loss' (direction None); outliers: numbers of the rows in none."""

    direction: int | None
    clusters: list[Cluster]
    outliers: np.ndarray

    @property
    def hidden(self) -> list[Cluster]:
        return [c for c in self.clusters if c.hidden]


@dataclass(frozen=True)
class Audit:
    """row_ids and texts in the decomposition's order; checkpoints by label; found: the plain loss first, then the directions."""

    decomposition: Decomposition
    row_ids: list[str]
    texts: list[str]
    checkpoints: list[str]
    found: list[Found]
    smallest: int
    way: str
    notes: list[str]
    kept_in: Path

    def to_json(self) -> dict[str, Any]:
        d = self.decomposition
        return {
            "rows": len(self.row_ids),
            "measured": len(d.rows),
            "checkpoints": self.checkpoints,
            "mean_losses": d.losses[d.rows].mean(0).tolist(),
            "completeness": d.completeness(),
            "way": self.way,
            "smallest_cluster": self.smallest,
            "directions": [self._found(found) for found in self.found],
            "notes": self.notes,
            "kept_in": str(self.kept_in),
        }

    def _found(self, found: Found) -> dict[str, Any]:
        k = found.direction
        shares: dict[str, Any] = {"direction": "plain loss"}
        if k is not None:
            shares = {
                "direction": k + 1,
                "path_share": float(self.decomposition.share[k]),
                "loss_share": float(self.decomposition.loss_share()[k]),
            }
        return {
            **shares,
            "outliers": len(found.outliers),
            "clusters": [
                {
                    "rows": [self.row_ids[i] for i in c.rows],
                    "medoids": [self.row_ids[i] for i in c.medoids],
                    "mean": c.mean.tolist(),
                    "breakthrough": None if c.breakthrough is None else self.checkpoints[c.breakthrough],
                    "turn": None if c.breakthrough is None else c.turn,
                    "hidden": c.hidden,
                }
                for c in found.clusters
            ],
        }

    def text(self) -> str:
        """What a person should look at."""
        d, shares = self.decomposition, self.decomposition.loss_share()
        off = d.completeness()
        lines = [
            f"{len(d.rows):,} rows over {len(self.checkpoints)} checkpoints ({self.checkpoints[0]} to {self.checkpoints[-1]}), "
            f"{d.n_directions} directions, by {self.way}.",
            f"Completeness: the directions' sum is off the real change of loss by {off['mean']:.1%} of the mean |Δloss| per row and segment "
            f"(median {off['median']:.2%}, worst segment {off['worst_segment']:.1%}), and by {off['total']:.2%} in total.",
            *self.notes,
            "",
        ]
        rows = []
        for found in self.found:
            k = found.direction
            first = ["plain loss", None, None] if k is None else [k + 1, f"{d.share[k]:.1%}", f"{shares[k]:+.1%}"]
            hidden = None if k is None else len(found.hidden)
            rows.append([*first, len(found.clusters), len(found.outliers), hidden])
        head = ("direction", "of the path", "of the loss change", "clusters", "outliers", "hidden breakthroughs")
        lines.append(table(rows, head=head))
        for found in self.found:
            lines += ["", *self._clusters(found)]
        lines += ["", f"Kept in {self.kept_in} (losses.npz, segment-*.npz: parts per row and direction)."]
        return counted("\n".join(lines))

    def _clusters(self, found: Found) -> Iterator[str]:
        name = "Plain loss, the control" if found.direction is None else f"Direction {found.direction + 1}"
        yield f"{name}: {len(found.clusters)} clusters of {self.smallest} rows or more, {len(found.outliers):,} outliers"
        for number, c in enumerate(found.clusters, 1):
            at = "-" if c.breakthrough is None else self.checkpoints[c.breakthrough]
            mark = "  HIDDEN: the plain loss of these rows does not turn there" if c.hidden else ""
            yield f"  {number}. {len(c.rows):,} rows, {cell(float(c.mean[-1]))} nats/token in all, turns at {at} ({cell(c.turn)}){mark}"
            for i in c.medoids:
                yield f"       {self.row_ids[i]}  {_short(self.texts[i])}"


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
    kept = Store(loaded.store, create=True, on_wait=progress.say)
    with kept.measuring():
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
        decomposition, way, notes, folder = _measured(
            loaded, kept, row_ids, rows, checkpoints, cache, tolerance, progress
        )
    if not len(decomposition.rows):
        raise UsageError(
            f"{loaded.path or 'recipe'}: none of the {len(rows):,} rows has a completion that could be measured."
        )
    notes = [*(f"Left out: {text}" for text in listed.skipped), *notes]
    least = smallest or max(5, round(0.02 * len(decomposition.rows)))
    texts = [_text(row) for row in rows]
    labels = [s.checkpoint or s.label for s in checkpoints]
    return Audit(decomposition, row_ids, texts, labels, find_all(decomposition, least), least, way, notes, folder)


def find_all(decomposition: Decomposition, smallest: int) -> list[Found]:
    """The plain loss' clusters, and each direction's; row numbers are the decomposition's."""
    rows = decomposition.rows
    plain = decomposition.trajectories(None)[rows]
    found = []
    for direction in (None, *range(decomposition.n_directions)):
        own = decomposition.trajectories(direction)[rows]
        clusters, outliers = find_clusters(own, None if direction is None else plain, smallest=smallest)
        moved = [Cluster(rows[c.rows], rows[c.medoids], c.mean, c.breakthrough, c.turn, c.hidden) for c in clusters]
        found.append(Found(direction, moved, rows[outliers]))
    return found


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


def _measured(
    loaded: Loaded,
    store: Store,
    row_ids: list[str],
    rows: list[Row | None],
    checkpoints: list[Checkpoint],
    cache: FingerprintCache,
    tolerance: float,
    progress: Progress,
) -> tuple[Decomposition, str, list[str], Path]:
    """The decomposition, from the store's files where they are there; how it was taken; notes; its folder."""
    from curate.measurements import MEASUREMENTS
    from curate.passes.loading.model import engine_identity
    from curate.plan.rendering import Renderings

    engine, limits = loaded.recipe.engine, loaded.recipe.tokens
    rendering = Renderings(loaded, cache, {row.style for row in rows if row is not None}, store).of(checkpoints[-1])
    rendered = rendering.params(MEASUREMENTS["likelihood"])
    dtype = "float32" if engine.dtype == "auto" else engine.dtype
    key = content_id(
        "polca",
        VERSION,
        row_ids,
        [s.fingerprint for s in checkpoints],
        cache.tokenizer(Path(checkpoints[-1].tokenizer)),
        limits.model_dump(exclude={"chat"}) | rendered,
        engine_identity(dtype=dtype, device=engine.device),
        tolerance,
    )
    folder = store.folder / "polca" / key
    files = [folder / f"segment-{t:03d}.npz" for t in range(len(checkpoints) - 1)]
    about = folder / "about.json"
    if not all(file.is_file() for file in (about, folder / "losses.npz", *files)):
        folder.mkdir(parents=True, exist_ok=True)
        _measure(loaded, rendering.chat, row_ids, rows, checkpoints, folder, files, dtype, tolerance, progress)
    known = json.loads(about.read_text())
    parts = np.stack([np.load(file)["parts"] for file in files], axis=1)
    notes = list(known["notes"])
    return (
        Decomposition(np.load(folder / "losses.npz")["losses"], parts, np.asarray(known["share"])),
        known["way"],
        notes,
        folder,
    )


def _measure(
    loaded: Loaded,
    chat: bool,
    row_ids: list[str],
    rows: list[Row | None],
    checkpoints: list[Checkpoint],
    folder: Path,
    files: list[Path],
    dtype: str,
    tolerance: float,
    progress: Progress,
) -> None:
    """Run what is missing, a file per segment."""
    from curate.passes.gradients.projections import why_not_gradients
    from curate.passes.gradients.segments import Segments
    from curate.passes.loading.model import load_model
    from curate.passes.tokens import Encoded, Limits, encode, load_tokenizer

    engine = loaded.recipe.engine
    tokenizer = load_tokenizer(checkpoints[-1].tokenizer)
    limits = Limits(loaded.recipe.tokens.max_length, loaded.recipe.tokens.truncation, chat)
    nothing = Encoded(np.zeros(0, np.int32), 0, problem="no text")
    encoded: list[Any] = [nothing if row is None else encode(row, tokenizer, limits) for row in rows]
    with load_model(checkpoints[0].path, base=checkpoints[0].base, dtype=dtype, device=engine.device) as model:
        reason = why_not_gradients(model)
        way: Way = "gradients" if reason is None else "forwards"
        notes = [] if reason is None else [f"By differences of forward passes: {reason}"]
        unmeasured = sum(e.problem is not None for e in encoded)
        if unmeasured:
            notes.append(
                f"{unmeasured:,} of {len(rows):,} rows cannot be measured (no completion, or too long) and are left out."
            )
        segments = Segments(model, [s.path for s in checkpoints])
        losses = checkpoint_losses(segments, encoded, token_budget=engine.token_budget)
        _save(folder / "losses.npz", losses=losses)
        about = {
            "way": way,
            "notes": notes,
            "share": segments.share.tolist(),
            "checkpoints": [s.label for s in checkpoints],
            "row_ids": row_ids,
        }
        _write(folder / "about.json", json.dumps(about).encode())
        integrator = Integrator(
            segments, encoded, losses, way=way, tolerance=tolerance, token_budget=engine.token_budget
        )
        done = sum(file.is_file() for file in files)
        with progress.bar("polca", len(files), done=done, unit="segments") as count:
            for t, file in enumerate(files):
                if not file.is_file():
                    parts, nodes = integrator.parts(t)
                    _save(file, parts=parts, nodes=np.asarray(nodes))
                    count(1)


def _save(file: Path, **arrays: np.ndarray) -> None:
    """An npz that is there whole or not at all."""
    new = file.with_name(f".{file.name}.{os.getpid()}.npz")
    np.savez(new, **arrays)  # type: ignore[arg-type]
    new.replace(file)


def _write(file: Path, content: bytes) -> None:
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_bytes(content)
    new.replace(file)


def _text(row: Row | None) -> str:
    """Prompt and completion on one line."""
    if row is None:
        return ""
    parts = [row.prompt, getattr(row, "completion", None) or ""]
    return " → ".join(p if isinstance(p, str) else " | ".join(m["content"] for m in p) for p in parts)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else f"{line[: TEXT // 2 - 1]} … {line[-TEXT // 2 + 2 :]}"
