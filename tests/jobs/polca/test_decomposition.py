"""Losses taken apart along directions: exact on quadratics, complete on a model, finer where it must be."""

from __future__ import annotations

import numpy as np
import pytest

from curate.jobs.polca.decomposition import Decomposition, Integrator, decompose, simpson
from curate.passes.gradients import projections
from curate.passes.gradients.segments import Segments
from curate.passes.loading.model import load_model
from curate.passes.tokens import Encoded
from tests.tiny_models import make_llama


class Toy:
    """A path through R^4 in place of a model's weights; basis: an orthonormal (4, r)."""

    def __init__(self, path: np.ndarray, basis: np.ndarray):
        self.path, self.basis, self.model = path, basis, None
        self.steps = basis.T @ np.diff(path, axis=0).T  # (r, K−1)
        self.share = np.ones(basis.shape[1]) / basis.shape[1]

    def __len__(self) -> int:
        return len(self.path) - 1

    def put(self, segment: int, u: float) -> None:
        self.at = (1 - u) * self.path[segment] + u * self.path[segment + 1]


def integrator(toy: Toy, loss, gradient, monkeypatch, **settings) -> Integrator:
    """loss, gradient: θ -> (rows,), (rows, 4)."""
    monkeypatch.setattr(projections, "by_gradients", lambda model, rows, basis, **_: gradient(toy.at) @ basis)
    return Integrator(toy, [], np.stack([loss(x) for x in toy.path], axis=1), **settings)


def test_quadratics_are_exact(monkeypatch):
    """ℓ_x = ½ (θ − a_x)ᵀ H (θ − a_x): the part along b is ⟨b, Δ⟩⟨b, H(θ̄ − a_x)⟩, θ̄ the middle of the segment."""
    rng = np.random.default_rng(0)
    path = rng.normal(size=(4, 4))
    basis = np.linalg.qr(np.diff(path, axis=0).T)[0]  # (4, 3)
    h = rng.normal(size=(4, 4))
    h, a = h @ h.T, rng.normal(size=(5, 4))
    loss = lambda x: 0.5 * np.einsum("xi,ij,xj->x", x - a, h, x - a)  # noqa: E731
    toy = Toy(path, basis)
    one = integrator(toy, loss, lambda x: (x - a) @ h, monkeypatch)
    for t in range(3):
        found, nodes = one.parts(t)
        middle, delta = (path[t] + path[t + 1]) / 2, path[t + 1] - path[t]
        np.testing.assert_allclose(found, ((middle - a) @ h @ basis) * (basis.T @ delta), atol=1e-12)
        np.testing.assert_allclose(found.sum(1), loss(path[t + 1]) - loss(path[t]), atol=1e-12)
        assert nodes == 5


def test_simpson_is_exact_for_cubics():
    for nodes in (3, 5, 9):
        x, w = simpson(nodes)
        assert len(x) == nodes and w.sum() == pytest.approx(1)
        for power in range(4):
            assert (w * x**power).sum() == pytest.approx(1 / (power + 1))


def test_a_segment_gets_more_nodes_where_its_sum_is_off(monkeypatch):
    """A flat segment, then a step: 5 nodes, 4 new ones, and twice as many until the sum is right. No node is taken twice."""
    path = np.array([[0.0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]])
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    loss = lambda x: np.array([-sigmoid(20 * (x[0] - 1.6))])  # noqa: E731

    def gradient(x):
        s = sigmoid(20 * (x[0] - 1.6))
        seen.append(float(x[0]))
        return np.array([[-20 * s * (1 - s), 0, 0, 0]])

    seen: list[float] = []
    one = integrator(Toy(path, np.eye(4)[:, :1]), loss, gradient, monkeypatch, tolerance=0.01)
    found = [one.parts(t) for t in range(2)]
    assert [nodes for _, nodes in found] == [5, 17]
    assert len(seen) == len(set(seen)) == 5 + 16
    np.testing.assert_allclose([p.sum() for p, _ in found], np.diff([loss(x)[0] for x in path]), atol=0.005)
    coarse = integrator(Toy(path, np.eye(4)[:, :1]), loss, gradient, monkeypatch, tolerance=0.01, most=9)
    coarse.parts(0)
    assert coarse.parts(1)[1] == 9  # no more than asked for; completeness says that it is not enough


@pytest.fixture(scope="module")
def taken_apart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    paths = [make_llama(folder / f"checkpoint-{k}", seed=k, scale=0.06) for k in range(4)]
    model = load_model(paths[0], dtype="float32", device="cpu")
    segments = Segments(model, paths)
    rng = np.random.default_rng(3)
    rows = [Encoded(rng.integers(3, 40, 12).astype(np.int32), 6) for _ in range(6)]
    rows.insert(2, Encoded(np.zeros(0, np.int32), 0, problem="no completion"))
    return segments, rows, decompose(segments, rows, tolerance=0.01)


def test_it_adds_up_to_the_real_change_of_loss(taken_apart):
    _segments, _rows, found = taken_apart
    assert found.parts.shape == (7, 3, 3)
    assert found.rows.tolist() == [0, 1, 3, 4, 5, 6]
    off = found.completeness()
    assert off["mean"] < 0.01 and off["total"] < 0.01
    for row in found.rows:
        ends = [found.trajectories(b)[row, -1] for b in range(3)]
        assert sum(ends) == pytest.approx(found.losses[row, -1] - found.losses[row, 0], abs=0.02)
    assert found.loss_share().sum() == pytest.approx(1)


def test_each_direction_is_what_many_nodes_give(taken_apart):
    """Completeness cannot see what one direction loses to another: 33 nodes of the same integral can."""
    segments, rows, found = taken_apart
    at, weights = simpson(33)
    total = 0.0
    for u, w in zip(at, weights):
        segments.put(1, float(u))
        total = total + w * projections.by_gradients(segments.model, rows, segments.basis)
    wanted = (total * segments.steps[:, 1])[found.rows]
    assert np.abs(found.parts[found.rows, 1] - wanted).mean() < 0.01 * np.abs(np.diff(found.losses[found.rows])).mean()


def test_completeness_by_hand():
    losses = np.array([[2.0, 1.0, 1.5], [4.0, 2.0, 1.0], [np.nan] * 3])  # Δ: −1, .5 | −2, −1
    parts = np.array(
        [[[-0.5, -0.4], [0.5, 0.0]], [[-2.0, 0.2], [-1.0, 0.0]], [[np.nan] * 2] * 2]
    )  # off by .1, 0 | .2, 0
    found = Decomposition(losses, parts, np.array([0.7, 0.3])).completeness()
    unit = 4.5 / 4
    assert found["mean"] == pytest.approx(0.3 / 4 / unit)
    assert found["median"] == pytest.approx(0.05 / unit)
    assert found["worst_segment"] == pytest.approx(0.15 / unit)
    assert found["total"] == pytest.approx(0.15 / (3.5 / 2))
