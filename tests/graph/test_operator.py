from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from schelix_scale.graph.knn import Neighbors, find_neighbors
from schelix_scale.graph.operator import Operator, blend, build_operator, jaccard
from schelix_scale.graph.vectors import row_blocks
from tests.synthetic import gaussian_cells


def graph(n: int = 200, k: int = 12, seed: int = 0) -> tuple[Neighbors, np.ndarray, np.ndarray]:
    z_nd, _, batch_n = gaussian_cells(n=n, seed=seed)
    return find_neighbors(z_nd, k, "exact", 0, 1), batch_n, z_nd


def dense(operator: Operator) -> np.ndarray:
    matrix = np.zeros((operator.n_cells, operator.n_cells))
    for row, (columns, weights) in enumerate(zip(operator.indices_nk, operator.weights_nk, strict=True)):
        for column, weight in zip(columns, weights, strict=True):
            matrix[row, column] += weight
    return matrix


def random_operator(n: int, k: int, seed: int) -> Operator:
    rng = np.random.default_rng(seed)
    indices = np.array([rng.choice(n, k, replace=False) for _ in range(n)])
    weights = rng.dirichlet(np.ones(k), n)
    return Operator(indices.astype(np.int32), weights.astype(np.float32))


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("kernel_neighbor", [1, 7, 50])
def test_equals_the_dense_formula(theta: float, kernel_neighbor: int) -> None:
    """From (n, n) distances: the kernel of cells i and j, divided by the share of j's batch among i's neighbours."""
    n, k = 200, 12
    neighbors, batch_n, z_nd = graph(n, k)
    distances = cdist(z_nd, z_nd, "cosine")
    np.fill_diagonal(distances, np.inf)
    sigma = np.sort(distances, axis=1)[:, min(kernel_neighbor, k) - 1]
    expected = np.zeros((n, n))
    for i in range(n):
        near = np.argsort(distances[i])[:k]
        for j in near:
            share = np.mean([batch_n[other] == batch_n[j] for other in near])
            expected[i, j] = np.exp(-(distances[i, j] ** 2) / (sigma[i] * sigma[j])) / share**theta
        expected[i] /= expected[i].sum()
    found = build_operator(neighbors, batch_n, theta, kernel_neighbor)
    np.testing.assert_allclose(dense(found), expected, atol=2e-4)
    np.testing.assert_allclose(found.weights_nk.sum(axis=1), 1, atol=1e-6)
    assert found.weights_nk.dtype == np.float32
    assert found.indices_nk.dtype == np.int32


def test_theta_raises_the_rarer_batch() -> None:
    """Nine neighbours of one batch, one of the other, all equally far: with theta 1 both batches weigh the same."""
    n, k = 44, 10
    indices = np.tile(np.arange(k), (n, 1))
    indices[:k] = np.arange(20, 30)
    batch_n = np.zeros(n, int)
    batch_n[9] = 1
    neighbors = Neighbors(indices, np.full((n, k), 0.3, np.float32), "exact")
    rare = [float(build_operator(neighbors, batch_n, theta, 7).weights_nk[40, 9]) for theta in (0.0, 0.5, 1.0)]
    assert rare == pytest.approx([0.1, 0.25, 0.5], abs=1e-6)


def test_duplicated_cells_get_finite_weights() -> None:
    z_nd = np.repeat(gaussian_cells(n=10)[0], 20, axis=0)
    neighbors = find_neighbors(z_nd, 15, "exact", 0, 1)
    found = build_operator(neighbors, np.tile([0, 1], 100), 1.0, 7)
    np.testing.assert_allclose(found.weights_nk.sum(axis=1), 1, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(3, 40),
    st.integers(2, 10),
    st.integers(1, 5),
    st.floats(0, 3),
    st.sampled_from([1e-12, 1e-3, 1.0]),
)
def test_rows_sum_to_one(seed: int, n: int, k: int, n_batches: int, theta: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    k = min(k, n - 1)
    indices = np.array([rng.choice(np.delete(np.arange(n), i), k, replace=False) for i in range(n)])
    distances = np.sort(rng.exponential(scale, (n, k)) * rng.integers(0, 2, (n, 1)), axis=1).astype(np.float32)
    found = build_operator(Neighbors(indices, distances, "exact"), rng.integers(0, n_batches, n), theta, 7)
    np.testing.assert_allclose(found.weights_nk.sum(axis=1), 1, atol=1e-5)
    assert (found.weights_nk > 0).all()
    np.testing.assert_array_equal(found.indices_nk, indices)


def test_block_is_those_rows() -> None:
    operator = random_operator(30, 4, 0)
    np.testing.assert_allclose(operator.block(slice(7, 19)).toarray(), dense(operator)[7:19], atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_blend_is_the_heaviest_of_the_average(weight: float) -> None:
    """The average of two rows has k to 2 k entries; the k heaviest stay and are made to sum to 1."""
    n, k = 40, 6
    old, new = random_operator(n, k, 3), random_operator(n, k, 4)
    new.indices_nk[:5] = old.indices_nk[:5]  # their union has exactly k entries
    found = blend(old, new, weight)
    average = (1 - weight) * dense(old) + weight * dense(new)
    expected = np.zeros_like(average)
    for row in range(n):
        heaviest = np.argsort(-average[row])[:k]
        expected[row, heaviest] = average[row, heaviest] / average[row, heaviest].sum()
    np.testing.assert_allclose(dense(found), expected, atol=1e-6)
    assert found.indices_nk.shape == found.weights_nk.shape == (n, k)
    assert all(len(set(row)) == k for row in found.indices_nk.tolist())
    assert found.weights_nk.dtype == np.float32


def test_blend_on_disk(tmp_path: Path) -> None:
    old, new = random_operator(40, 6, 3), random_operator(40, 6, 4)
    here, there = blend(old, new, 0.3), blend(old, new, 0.3, tmp_path)
    assert all(isinstance(values, np.memmap) for values in (there.indices_nk, there.weights_nk))
    np.testing.assert_array_equal(there.indices_nk, here.indices_nk)
    np.testing.assert_array_equal(there.weights_nk, here.weights_nk)


def test_blend_with_itself_is_itself() -> None:
    operator = random_operator(30, 5, 5)
    np.testing.assert_allclose(dense(blend(operator, operator, 0.5)), dense(operator), atol=1e-6)


def test_jaccard() -> None:
    one = Operator(np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]]), np.full((3, 3), 1 / 3, np.float32))
    two = Operator(np.array([[2, 1, 0], [3, 4, 9], [0, 1, 2]]), np.full((3, 3), 1 / 3, np.float32))
    assert jaccard(one, two, np.array([0])) == 1
    assert jaccard(one, two, np.array([1])) == pytest.approx(2 / 4)
    assert jaccard(one, two, np.array([2])) == 0
    assert jaccard(one, two, np.arange(3)) == pytest.approx((1 + 2 / 4 + 0) / 3)


@given(st.integers(0, 500), st.integers(1, 60))
def test_blocks_cover_every_row_once(n: int, block: int) -> None:
    rows = [row for start, stop in row_blocks(n, block) for row in range(start, stop)]
    assert rows == list(range(n))
    assert all(stop - start <= block for start, stop in row_blocks(n, block))
