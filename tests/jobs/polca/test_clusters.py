"""Clusters of trajectories: planted groups are found, outliers stay apart, and what breaks where is said as defined."""

from __future__ import annotations

import numpy as np
import pytest

from curate.jobs.polca.clusters import breakthrough, central, find_clusters, homogeneity, turns

EARLY = np.array([0.0, -2.0, -2.0, -2.0, -2.0])
LATE = np.array([0.0, 0.0, 0.0, -2.0, -2.0])


def test_planted_groups_are_found_and_outliers_stay_apart():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    noise = lambda n: 0.05 * rng.normal(size=(n, 5))  # noqa: E731
    strays = np.array([[0.0, 9, 9, 9, 9], [0.0, -9, 9, -9, 9]])
    trajectories = np.concatenate([EARLY + noise(30), strays, LATE + noise(40)])
    plain = np.concatenate([LATE + noise(30), strays, LATE + noise(40)])
    clusters, outliers = find_clusters(trajectories, plain, smallest=10)
    assert [c.rows.tolist() for c in clusters] == [list(range(32, 72)), list(range(30))]  # the larger first
    assert outliers.tolist() == [30, 31]
    assert set(clusters[1].medoids) <= set(range(30)) and len(clusters[1].medoids) == 3
    assert [(c.breakthrough, c.hidden) for c in clusters] == [(2, False), (1, True)]
    np.testing.assert_allclose(clusters[1].mean, EARLY, atol=0.05)
    alone, _ = find_clusters(plain, smallest=10)
    assert all(c.hidden is None for c in alone)
    none, everyone = find_clusters(trajectories[:15], smallest=10)
    assert none == [] and len(everyone) == 15


@pytest.mark.parametrize(
    ("trajectory", "at", "turn"),
    [
        ([0.0, 0.0, -3.0, -3.5], 1, -3.0),  # the fall begins at checkpoint 1
        ([0.0, -1.0, -1.0, -1.0], 1, 1.0),  # and ends there: the turn is positive
        ([0.0, 1.0, 2.0, 2.0, -4.0], 3, -6.0),
        ([0.0, -1.0], None, np.nan),
    ],
)
def test_a_breakthrough_is_the_largest_second_difference(trajectory, at, turn):
    found = breakthrough(np.array(trajectory))
    assert found[0] == at
    np.testing.assert_equal(found[1], turn)


def test_what_turns():
    plain = np.array([0.0, 0.0, -2.0, -4.0, -3.1])  # second differences: −2 at 1, 0 at 2, 2.9 at 3
    assert [turns(plain, at) for at in (1, 2, 3)] == [True, False, True]


def test_the_medoid_is_the_point_nearest_to_all():
    points = np.array([[0.0], [1.0], [2.0], [10.0]])  # summed distances 13, 11, 11, 27
    assert central(points, 2).tolist() == [1, 2]
    many = np.random.default_rng(0).normal(size=(600, 3))  # more than one block
    distances = np.linalg.norm(many[:, None] - many[None], axis=2).sum(1)
    assert central(many, 5).tolist() == np.argsort(distances)[:5].tolist()


def test_homogeneity_by_hand():
    truth = np.array([1, 1, 0, 0, 0, 1, 1])
    assert homogeneity(np.array([0, 0, 0, 1, 1, -1, 1]), truth) == pytest.approx((2 + 2) / 6)
    seen = np.array([1, 1, 0, 1, 0, 0, 0], bool)  # majorities 1 and 0; of the others 0, (0, 1): one is right
    assert homogeneity(np.array([0, 0, 0, 1, 1, -1, 1]), truth, seen=seen) == pytest.approx(1 / 3)
    assert homogeneity(np.zeros(7, int), truth) == pytest.approx(4 / 7)  # one cluster: the majority's share
    assert np.isnan(homogeneity(np.full(7, -1), truth))
