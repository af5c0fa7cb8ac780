from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from schelix_scale.config import GraphConfig
from schelix_scale.errors import GraphError
from schelix_scale.graph.knn import choose_method, exact_neighbors, find_neighbors
from schelix_scale.graph.vectors import unit_rows
from tests.synthetic import gaussian_cells


def dense_cosine(features_nd: np.ndarray) -> np.ndarray:
    """(n, n) cosine distances with infinity on the diagonal."""
    distances = cdist(features_nd.astype(np.float64), features_nd.astype(np.float64), "cosine")
    np.fill_diagonal(distances, np.inf)
    return distances


def check_rows(indices_nk: np.ndarray, n: int) -> None:
    """Every row names k different other cells."""
    assert ((indices_nk >= 0) & (indices_nk < n)).all()
    assert not (indices_nk == np.arange(n)[:, None]).any()
    assert all(len(set(row)) == indices_nk.shape[1] for row in indices_nk.tolist())


def test_exact_equals_dense_ranking() -> None:
    z_nd, _, _ = gaussian_cells(n=300)
    found = find_neighbors(z_nd * np.random.default_rng(1).lognormal(size=(300, 1)), 12, "exact", 0, 1)
    distances = dense_cosine(z_nd)
    check_rows(found.indices_nk, 300)
    expected = np.sort(distances, axis=1)[:, :12]
    np.testing.assert_allclose(found.distances_nk, expected, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(distances, found.indices_nk, axis=1), expected, atol=2e-6)
    assert (np.diff(found.distances_nk, axis=1) >= 0).all()
    assert found.distances_nk.dtype == np.float32
    assert found.method == "exact"


@pytest.mark.parametrize("copies", [2, 5, 40])
def test_duplicated_cells_are_neighbours_but_not_of_themselves(copies: int) -> None:
    """With more copies than k, a cell's own number may be pushed off the list of ties."""
    z_nd = np.repeat(gaussian_cells(n=20)[0], copies, axis=0)
    found = find_neighbors(z_nd, 9, "exact", 0, 1)
    check_rows(found.indices_nk, len(z_nd))
    np.testing.assert_allclose(found.distances_nk, np.sort(dense_cosine(z_nd), axis=1)[:, :9], atol=2e-6)


def test_cells_at_the_origin_have_neighbours_too() -> None:
    z_nd = gaussian_cells(n=40)[0]
    z_nd[3] = 0
    found = find_neighbors(z_nd, 5, "exact", 0, 1)
    check_rows(found.indices_nk, 40)
    assert np.isfinite(found.distances_nk).all()


@pytest.mark.parametrize("method", ["exact", "pynndescent"])
@pytest.mark.parametrize(("k", "n"), [(8, 8), (9, 8)])
def test_too_few_cells(method: str, k: int, n: int) -> None:
    with pytest.raises(GraphError, match=f"k = {k} neighbours need more than {k} cells, got {n}"):
        find_neighbors(gaussian_cells(n=n)[0], k, method, 0, 1)


def test_all_other_cells() -> None:
    found = find_neighbors(gaussian_cells(n=8)[0], 7, "exact", 0, 1)
    check_rows(found.indices_nk, 8)


def test_queries_that_are_not_in_the_reference() -> None:
    z_nd, _, _ = gaussian_cells(n=200)
    query, reference = unit_rows(z_nd[:50]), unit_rows(z_nd[50:])
    indices, distances = exact_neighbors(query, reference, 6)
    expected = cdist(query, reference, "cosine")
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :6], atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, indices, axis=1), distances, atol=2e-6)


@pytest.mark.slow  # compiling takes half a minute
def test_pynndescent_finds_nearly_all() -> None:
    """Distances too are those of the neighbours that it names; duplicates (the last 50 cells) included."""
    z_nd, _, _ = gaussian_cells(n=3_000, d=10, n_types=6)
    z_nd[-50:] = z_nd[0]
    found = find_neighbors(z_nd, 15, "pynndescent", 0, 2)
    distances = dense_cosine(z_nd)
    check_rows(found.indices_nk, 3_000)
    named = np.take_along_axis(distances, found.indices_nk, axis=1)
    np.testing.assert_allclose(found.distances_nk, named, atol=5e-6)
    limit = np.sort(distances, axis=1)[:, 14:15]
    assert (named <= limit + 1e-9).mean() >= 0.95
    assert found.method == "pynndescent"


@pytest.mark.parametrize(
    ("n", "method", "expected"),
    [
        (99, "auto", "exact"),
        (100, "auto", "ivf"),
        (99, "pynndescent", "pynndescent"),
        (100, "exact", "exact"),
    ],
)
def test_choose_method(n: int, method: str, expected: str) -> None:
    assert choose_method(n, GraphConfig(method=method, exact_below=100)) == expected
