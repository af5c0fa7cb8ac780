"""The index keeps every cell once, in the list of a near centroid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schelix_scale.graph.lists import CellIndex, NearLists
from schelix_scale.graph.vectors import unit_rows
from tests.synthetic import gaussian_cells

N = 3_000


@pytest.fixture(scope="module")
def features_nd() -> np.ndarray:
    return np.asarray(gaussian_cells(n=N, d=12, n_types=8)[0], np.float32)


@pytest.fixture(scope="module")
def index(features_nd: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> CellIndex:
    return CellIndex.build(features_nd, tmp_path_factory.mktemp("index"), 0, 2, list_cells=30)


def test_every_cell_is_there_once_with_its_vector(index: CellIndex, features_nd: np.ndarray) -> None:
    np.testing.assert_array_equal(np.sort(index.cells), np.arange(N))
    np.testing.assert_array_equal(index.cells[index.positions()], np.arange(N))
    np.testing.assert_array_equal(index.vectors_nd, unit_rows(features_nd)[index.cells])
    assert index.starts[0] == 0
    assert index.starts[-1] == N
    assert 60 <= len(index.lists.centroids_md) <= 140


def test_cells_are_in_lists_of_near_centroids(index: CellIndex) -> None:
    """Centroids far away are not looked at, so the nearest of all may be missed, but seldom and by little."""
    list_n = np.repeat(np.arange(len(index.lists.centroids_md)), np.diff(index.starts))
    distances = np.linalg.norm(index.vectors_nd[:, None] - index.lists.centroids_md[None], axis=2)
    chosen = distances[np.arange(N), list_n]
    assert (chosen <= distances.min(axis=1) + 1e-5).mean() > 0.98
    np.testing.assert_array_equal(index.lists.assign(np.asarray(index.vectors_nd)), list_n)


def test_near_lists_come_first(index: CellIndex) -> None:
    centroids = index.lists.centroids_md
    for chosen in (0, 17, len(centroids) - 1):
        near = index.lists.near(chosen)
        assert near[0] == chosen
        assert len(set(near.tolist())) == len(near)
        away = np.linalg.norm(centroids[near] - centroids[chosen], axis=1)
        assert (np.diff(away) >= -1e-5).all()
        nearest = np.argsort(np.linalg.norm(centroids - centroids[chosen], axis=1))[:6]
        assert len(set(nearest) & set(near[:12])) >= 5


@pytest.mark.parametrize("probes", [1, 7, 10_000])
def test_lists_near_those_of_a_group_are_those_near_each(index: CellIndex, probes: int) -> None:
    """In any order, and whether a list is asked for once, twice or not at all."""
    lists = len(index.lists.centroids_md)
    for asked in (range(0, lists, 3), [lists - 1, 0, 0, 5, lists // 2], [7]):
        near = NearLists(index.lists, probes)
        for chosen in asked:
            np.testing.assert_array_equal(near.of(chosen), index.lists.near(chosen, probes))


def test_members_of_lists(index: CellIndex) -> None:
    lists = np.array([5, 2, 9])
    expected = np.concatenate([np.arange(index.starts[one], index.starts[one + 1]) for one in lists])
    np.testing.assert_array_equal(index.members(lists), expected)


def test_the_same_with_any_number_of_threads(features_nd: np.ndarray, index: CellIndex, tmp_path: Path) -> None:
    again = CellIndex.build(features_nd, tmp_path, 0, 1, list_cells=30)
    np.testing.assert_array_equal(again.cells, index.cells)
    np.testing.assert_array_equal(again.lists.centroids_md, index.lists.centroids_md)


def test_identical_cells(tmp_path: Path) -> None:
    features = np.repeat(gaussian_cells(n=3)[0], 200, axis=0)
    index = CellIndex.build(features, tmp_path, 0, 1, list_cells=20)
    np.testing.assert_array_equal(np.sort(index.cells), np.arange(600))
