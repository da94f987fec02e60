"""Trajectories that go together, the rows that stand for them, and when they break.

    clusters       HDBSCAN on the (n, K) trajectories; what belongs to none is an outlier and stays apart
    medoid         the row with the least summed distance to the others of its cluster
    second difference of a trajectory c at checkpoint k     (c_{k+1} − c_k) − (c_k − c_{k−1}),  k = 1 … K−2
    breakthrough   the checkpoint with the largest |second difference| of a cluster's mean trajectory: where its course turns most; of those
                   within a tenth of it the first (a drop inside one segment turns as much at its end as at its beginning)
    hidden         the cluster breaks in its projection at a checkpoint where the plain loss of the same rows does not turn:
                   there the plain loss' |second difference| is under half of its own largest

Checkpoints are taken as they come, whatever steps lie between them.
Source: Kangaslahti et al. 2025, arXiv:2506.15872; Campello et al. 2013 (HDBSCAN).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from curate.errors import UsageError

TIE = 0.9  # of the largest second difference
HIDDEN = 0.5  # of the plain loss' largest second difference


@dataclass(frozen=True)
class Cluster:
    """rows: their numbers. medoids: the rows that stand for it, the most central first. mean: (K,) trajectory, nats. breakthrough: number of the
    checkpoint, None with fewer than three. turn: the second difference there, nats (negative: the fall steepens). hidden: None for plain loss.
    """

    rows: np.ndarray
    medoids: np.ndarray
    mean: np.ndarray
    breakthrough: int | None
    turn: float
    hidden: bool | None


def labels_of(trajectories: np.ndarray, *, smallest: int) -> np.ndarray:
    """(n,) cluster numbers by HDBSCAN, −1 for outliers. smallest: rows that make a cluster. UsageError where scikit-learn is not installed."""
    try:
        from sklearn.cluster import HDBSCAN
    except ImportError:
        raise UsageError(
            "clusters of trajectories need scikit-learn, which is not installed here: `pip install 'curate-dynamics[report]'`."
        ) from None
    if len(trajectories) < 2 * smallest:
        return np.full(len(trajectories), -1)
    labels: np.ndarray = HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(trajectories)
    return labels


def find_clusters(
    trajectories: np.ndarray, plain_loss: np.ndarray | None = None, *, smallest: int, medoids: int = 3
) -> tuple[list[Cluster], np.ndarray]:
    """(n, K) trajectories -> the clusters, the largest first, and the outliers' numbers. plain: the plain loss of the same rows."""
    labels = labels_of(trajectories, smallest=smallest)
    clusters = []
    for label in range(labels.max() + 1):
        rows = np.flatnonzero(labels == label)
        mean = trajectories[rows].mean(0)
        at, turn = breakthrough(mean)
        hidden = None if plain_loss is None or at is None else not turns(plain_loss[rows].mean(0), at)
        clusters.append(Cluster(rows, rows[central(trajectories[rows], medoids)], mean, at, turn, hidden))
    return sorted(clusters, key=lambda c: -len(c.rows)), np.flatnonzero(labels < 0)


def central(points: np.ndarray, count: int = 1) -> np.ndarray:
    """Numbers of the `count` points with the least summed Euclidean distance to all, the medoid first. Points are taken a block at a time."""
    sums = np.zeros(len(points))
    squares = (points**2).sum(1)
    for i in range(0, len(points), 512):
        block = points[i : i + 512]
        distances = squares[i : i + 512, None] + squares[None, :] - 2 * block @ points.T
        sums[i : i + 512] = np.sqrt(np.maximum(distances, 0)).sum(1)
    return np.argsort(sums, kind="stable")[:count]


def breakthrough(trajectory: np.ndarray) -> tuple[int | None, float]:
    """(K,) -> the checkpoint of the largest |second difference|, and the second difference; (None, NaN) with fewer than three checkpoints."""
    if len(trajectory) < 3:
        return None, float("nan")
    second = np.diff(trajectory, 2)
    at = int((np.abs(second) >= TIE * np.abs(second).max()).argmax())
    return at + 1, float(second[at])


def turns(trajectory: np.ndarray, at: int) -> bool:
    """Whether a trajectory turns at a checkpoint: at least HIDDEN of its own largest |second difference|."""
    second = np.abs(np.diff(trajectory, 2))
    return bool(second[at - 1] >= HIDDEN * second.max())


def homogeneity(labels: np.ndarray, truth: np.ndarray, *, seen: np.ndarray | None = None) -> float:
    """Share of the clustered rows that have their cluster's majority label, outliers left out; NaN where there is none.

    labels (n,) with −1 for outliers, truth (n,) any integers. seen (n,) bool: majorities are taken of these rows, and the share of the others.
    One cluster of everything gives the majority's share, which is what chance gives.
    """
    right = total = 0
    for cluster in range(labels.max() + 1):
        inside = labels == cluster
        values, counts = np.unique(truth[inside if seen is None else inside & seen], return_counts=True)
        reported = truth[inside if seen is None else inside & ~seen]
        total += len(reported)
        right += int((reported == values[counts.argmax()]).sum()) if len(values) else 0
    return right / total if total else float("nan")
