"""The decomposition of a run's path, measured once and kept in the store under polca/<key>/: a file per segment, written when it is done.

The key covers the rows, the checkpoints' weights, the tokenizer and its limits, the engine and the tolerance.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curate.console import Progress
from curate.jobs.polca.decomposition import Decomposition, Integrator, Way, checkpoint_losses
from curate.models.checkpoints import Checkpoint
from curate.models.fingerprints import FingerprintCache
from curate.passes.files import write_atomically
from curate.recipe.bounds import own_object
from curate.recipe.load import Loaded
from curate.rows import Row, content_id
from curate.store import Store

VERSION = 1  # of what is kept


@dataclass(frozen=True)
class Measured:
    """The decomposition; way: how it was taken; notes: what to tell the user; kept_in: its folder."""

    decomposition: Decomposition
    way: str
    notes: list[str]
    kept_in: Path


class Measuring:
    """One run's path over some rows, and its files in the store."""

    def __init__(
        self,
        loaded: Loaded,
        store: Store,
        rows: dict[str, Row | None],
        checkpoints: list[Checkpoint],
        cache: FingerprintCache,
        tolerance: float,
    ):
        """rows: by row id, None for a row without text. cache: of the checkpoints' fingerprints."""
        from curate.measurements import MEASUREMENTS
        from curate.passes.loading.engine import engine_identity
        from curate.plan.rendering import Renderings

        self.loaded, self.rows, self.checkpoints, self.tolerance = loaded, rows, checkpoints, tolerance
        engine, limits = loaded.recipe.engine, loaded.recipe.tokens
        styles = {row.style for row in rows.values() if row is not None}
        rendering = Renderings(loaded, cache, styles, store).of(checkpoints[-1])
        self.chat = rendering.chat
        self.dtype = "float32" if engine.dtype == "auto" else engine.dtype
        key = content_id(
            "polca",
            VERSION,
            list(rows),
            [checkpoint.fingerprint for checkpoint in checkpoints],
            cache.tokenizer(Path(checkpoints[-1].tokenizer)),
            {"max_length": limits.max_length, "truncation": limits.truncation}
            | rendering.params(MEASUREMENTS["likelihood"]),
            engine_identity(dtype=self.dtype, device=engine.device),
            tolerance,
        )
        self.folder = store.folder / "polca" / key
        self.about, self.losses = self.folder / "about.json", self.folder / "losses.npz"
        self.segments = [self.folder / f"segment-{t:03d}.npz" for t in range(len(checkpoints) - 1)]

    def result(self, progress: Progress) -> Measured:
        """From the store's files; what is missing of them is run first."""
        if not all(file.is_file() for file in (self.about, self.losses, *self.segments)):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._run(progress)
        about = own_object(self.about)
        parts = np.stack([np.load(file)["parts"] for file in self.segments], axis=1)
        decomposition = Decomposition(np.load(self.losses)["losses"], parts, np.asarray(about["share"]))
        return Measured(decomposition, about["way"], list(about["notes"]), self.folder)

    def _run(self, progress: Progress) -> None:
        from curate.passes.gradients.projections import why_not_gradients
        from curate.passes.gradients.segments import Segments
        from curate.passes.loading.model import load_model

        engine, first = self.loaded.recipe.engine, self.checkpoints[0]
        encoded = self._encoded()
        with load_model(first.path, base=first.base, dtype=self.dtype, device=engine.device) as model:
            reason = why_not_gradients(model)
            way: Way = "gradients" if reason is None else "forwards"
            notes = [] if reason is None else [f"By differences of forward passes: {reason}"]
            segments = Segments(model, [checkpoint.path for checkpoint in self.checkpoints])
            losses = checkpoint_losses(segments, encoded, token_budget=engine.token_budget)
            _save(self.losses, losses=losses)
            self._write_about(way, [*notes, *_unmeasured(encoded)], segments.share.tolist())
            integrator = Integrator(
                segments, encoded, losses, way=way, tolerance=self.tolerance, token_budget=engine.token_budget
            )
            done = sum(file.is_file() for file in self.segments)
            with progress.bar("polca", len(self.segments), done=done, unit="segments") as count:
                for t, file in enumerate(self.segments):
                    if not file.is_file():
                        parts, nodes = integrator.parts(t)
                        _save(file, parts=parts, nodes=np.asarray(nodes))
                        count(1)

    def _encoded(self) -> list[Any]:
        from curate.passes.tokenizer import load_tokenizer
        from curate.passes.tokens import Encoded, Limits, encode

        tokens = self.loaded.recipe.tokens
        tokenizer = load_tokenizer(self.checkpoints[-1].tokenizer)
        limits = Limits(tokens.max_length, tokens.truncation, self.chat, tokens.turns)
        nothing = Encoded(np.zeros(0, np.int32), 0, problem="no text")
        return [nothing if row is None else encode(row, tokenizer, limits) for row in self.rows.values()]

    def _write_about(self, way: Way, notes: list[str], share: list[float]) -> None:
        about = {
            "way": way,
            "notes": notes,
            "share": share,
            "checkpoints": [checkpoint.label for checkpoint in self.checkpoints],
            "row_ids": list(self.rows),
        }
        with write_atomically(self.about) as new:
            new.write_bytes(json.dumps(about).encode())


def _unmeasured(encoded: list[Any]) -> list[str]:
    """A note where rows cannot be measured."""
    n = sum(one.problem is not None for one in encoded)
    share = f"{n:,} of {len(encoded):,} rows"
    return [f"{share} cannot be measured (no completion, or too long) and are left out."] if n else []


def _save(file: Path, **arrays: np.ndarray) -> None:
    """An npz that is there whole or not at all."""
    with write_atomically(file) as new, new.open("wb") as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]
