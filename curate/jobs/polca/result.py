"""What POLCA found, as Python, as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curate.console import cell, counted, table
from curate.jobs.polca.clusters import Cluster
from curate.jobs.polca.decomposition import Decomposition

TEXT = 90  # characters of a medoid


@dataclass(frozen=True)
class DirectionClusters:
    """Clusters of one direction's trajectories, or of the plain loss' (direction None); outliers: numbers of the rows in none."""

    direction: int | None
    clusters: list[Cluster]
    outliers: np.ndarray

    @property
    def hidden(self) -> list[Cluster]:
        return [c for c in self.clusters if c.hidden]


@dataclass(frozen=True)
class Audit:
    """row_ids and texts in the decomposition's order; checkpoints by label; by_direction: the plain loss' clusters, then each direction's."""

    decomposition: Decomposition
    row_ids: list[str]
    texts: list[str]
    checkpoints: list[str]
    by_direction: list[DirectionClusters]
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
            "directions": [self._part_json(part) for part in self.by_direction],
            "notes": self.notes,
            "kept_in": str(self.kept_in),
        }

    def _part_json(self, part: DirectionClusters) -> dict[str, Any]:
        k = part.direction
        shares: dict[str, Any] = {"direction": "plain loss"}
        if k is not None:
            shares = {
                "direction": k + 1,
                "path_share": float(self.decomposition.share[k]),
                "loss_share": float(self.decomposition.loss_share()[k]),
            }
        return {
            **shares,
            "outliers": len(part.outliers),
            "clusters": [
                {
                    "rows": [self.row_ids[i] for i in c.rows],
                    "medoids": [self.row_ids[i] for i in c.medoids],
                    "mean": c.mean.tolist(),
                    "breakthrough": None if c.breakthrough is None else self.checkpoints[c.breakthrough],
                    "turn": None if c.breakthrough is None else c.turn,
                    "hidden": c.hidden,
                }
                for c in part.clusters
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
        for part in self.by_direction:
            k = part.direction
            first = ["plain loss", None, None] if k is None else [k + 1, f"{d.share[k]:.1%}", f"{shares[k]:+.1%}"]
            hidden = None if k is None else len(part.hidden)
            rows.append([*first, len(part.clusters), len(part.outliers), hidden])
        head = ("direction", "of the path", "of the loss change", "clusters", "outliers", "hidden breakthroughs")
        lines.append(table(rows, head=head))
        for part in self.by_direction:
            lines += ["", *self._clusters(part)]
        lines += ["", f"Kept in {self.kept_in} (losses.npz, segment-*.npz: parts per row and direction)."]
        return counted("\n".join(lines))

    def _clusters(self, part: DirectionClusters) -> Iterator[str]:
        name = "Plain loss, the control" if part.direction is None else f"Direction {part.direction + 1}"
        yield f"{name}: {len(part.clusters)} clusters of {self.smallest} rows or more, {len(part.outliers):,} outliers"
        for number, c in enumerate(part.clusters, 1):
            at = "-" if c.breakthrough is None else self.checkpoints[c.breakthrough]
            mark = "  HIDDEN: the plain loss of these rows does not turn there" if c.hidden else ""
            yield f"  {number}. {len(c.rows):,} rows, {cell(float(c.mean[-1]))} nats/token in all, turns at {at} ({cell(c.turn)}){mark}"
            for i in c.medoids:
                yield f"       {self.row_ids[i]}  {_short(self.texts[i])}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else f"{line[: TEXT // 2 - 1]} … {line[-TEXT // 2 + 2 :]}"
