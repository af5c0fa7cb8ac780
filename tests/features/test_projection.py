from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA

from schelix_scale.features.projection import fit_projection
from tests.synthetic import make_cells
from tests.unmeasured import measured_by, two_of_three, with_nan, without

DIMS = 6


@pytest.fixture(scope="module")
def log_ng() -> np.ndarray:
    """300 cells; gene 0 has outliers beyond 10 standard deviations, gene 5 is on in none."""
    x_ng = make_cells(n_types=4, n_batches=3, per_group=25, n_genes=90, seed=5).log_ng.astype(np.float32)
    x_ng[:, 0] = 0
    x_ng[:2, 0] = 5
    x_ng[:, 5] = 0
    return x_ng


def dense_components(x_nh: np.ndarray, power: float, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Components of the dense scaled, clipped matrix by scikit-learn's full SVD."""
    x_nh = x_nh.astype(np.float64)
    clipped = np.minimum(x_nh, x_nh.mean(axis=0) + 10 * x_nh.std(axis=0))
    spread = clipped.std(axis=0)
    scaled = (clipped - clipped.mean(axis=0)) / np.where(spread > 0, spread, 1) ** power
    return PCA(DIMS, svd_solver="full").fit_transform(scaled * weights)


def up_to_sign(found_nd: np.ndarray, expected_nd: np.ndarray) -> np.ndarray:
    return found_nd * np.sign((found_nd * expected_nd).sum(axis=0))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_equals_dense_pca(log_ng: np.ndarray, power: float) -> None:
    genes = np.arange(0, 90, 2)
    _, found = fit_projection(sparse.csr_matrix(log_ng), genes, DIMS, power)
    expected = dense_components(log_ng[:, genes], power)
    assert found.dtype == np.float32
    np.testing.assert_allclose(up_to_sign(found, expected), expected, atol=1e-4 * np.abs(expected).max())


def test_weights_scale_the_genes(log_ng: np.ndarray) -> None:
    genes = np.arange(0, 90, 2)
    weights = np.random.default_rng(2).uniform(0.05, 1, len(genes))
    projection, found = fit_projection(sparse.csr_matrix(log_ng), genes, DIMS, 0.75, weights)
    expected = dense_components(log_ng[:, genes], 0.75, weights)
    np.testing.assert_allclose(up_to_sign(found, expected), expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(projection.apply(sparse.csr_matrix(log_ng)), found, atol=2e-5 * np.abs(found).max())
    unweighted = dense_components(log_ng[:, genes], 0.75)
    assert np.abs(up_to_sign(found, unweighted) - unweighted).max() > 0.1 * np.abs(unweighted).max()


def test_outliers_are_clipped(log_ng: np.ndarray) -> None:
    """Gene 0 lies in two cells only, more than 10 sd from its mean; a third such cell counts no more than the cap."""
    genes = np.arange(0, 90, 2)
    projection, _ = fit_projection(sparse.csr_matrix(log_ng), genes, DIMS)
    mean, spread = log_ng[:, 0].mean(dtype=np.float64), log_ng[:, 0].std(dtype=np.float64)
    assert projection.cap[0] == pytest.approx(mean + 10 * spread, rel=1e-5)
    assert projection.cap[0] < 5
    cells = np.repeat(log_ng[10:11], 3, axis=0)
    cells[1:, 0] = [projection.cap[0], 50.0]
    none, capped, beyond = projection.apply(sparse.csr_matrix(cells))
    assert np.abs(capped - none).max() > 1e-3
    np.testing.assert_allclose(beyond, capped, atol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_blocks_are_projected_as_the_sketch_was(log_ng: np.ndarray, power: float) -> None:
    x_ng = sparse.csr_matrix(log_ng)
    projection, found = fit_projection(x_ng, np.arange(3, 80), DIMS, power)
    blocks = [projection.apply(x_ng[start : start + 70]) for start in range(0, x_ng.shape[0], 70)]
    np.testing.assert_allclose(np.vstack(blocks), found, atol=2e-5 * np.abs(found).max())
    assert np.vstack(blocks).dtype == np.float32


def test_genes_in_other_positions(log_ng: np.ndarray) -> None:
    genes = np.arange(0, 60, 3)
    _, expected = fit_projection(sparse.csr_matrix(log_ng), genes, DIMS)
    order = np.random.default_rng(0).permutation(log_ng.shape[1])
    moved = np.argsort(order)[genes]
    projection, found = fit_projection(sparse.csr_matrix(log_ng[:, order]), moved, DIMS)
    np.testing.assert_allclose(up_to_sign(found, expected), expected, atol=1e-4)
    np.testing.assert_array_equal(projection.genes, moved)
    np.testing.assert_allclose(projection.apply(sparse.csr_matrix(log_ng[:, order])), found, atol=1e-4)


def test_unsorted_columns_of_a_sparse_row_are_no_matter(log_ng: np.ndarray) -> None:
    x_ng = sparse.csr_matrix(log_ng)
    projection, found = fit_projection(x_ng, np.arange(40), DIMS)
    reversed_rows = sparse.csr_matrix(
        (
            np.concatenate([x_ng[i].data[::-1] for i in range(x_ng.shape[0])]),
            np.concatenate([x_ng[i].indices[::-1] for i in range(x_ng.shape[0])]),
            x_ng.indptr,
        ),
        shape=x_ng.shape,
    )
    np.testing.assert_allclose(projection.apply(reversed_rows), found, atol=2e-5 * np.abs(found).max())


def test_fewer_dimensions_than_asked(log_ng: np.ndarray) -> None:
    _, few_genes = fit_projection(sparse.csr_matrix(log_ng), np.arange(10, 15), DIMS)
    _, few_cells = fit_projection(sparse.csr_matrix(log_ng[:5]), np.arange(10, 60), DIMS)
    assert few_genes.shape == (len(log_ng), 4)
    assert few_cells.shape == (5, 4)
    assert np.isfinite(few_genes).all()
    assert np.isfinite(few_cells).all()


def test_the_input_is_not_changed(log_ng: np.ndarray) -> None:
    x_ng = sparse.csr_matrix(log_ng)
    projection, _ = fit_projection(x_ng, np.arange(90), DIMS)
    projection.apply(x_ng)
    np.testing.assert_array_equal(x_ng.toarray(), log_ng)


def imputed_components(known_nh: np.ndarray, power: float, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Components of the dense matrix in which NaN is the gene's mean, by scikit-learn's full SVD."""
    clipped = np.fmin(known_nh, np.nanmean(known_nh, axis=0) + 10 * np.nanstd(known_nh, axis=0))
    clipped[np.isnan(known_nh)] = np.nan
    spread = np.nanstd(clipped, axis=0)
    mean = np.nanmean(clipped, axis=0)
    scaled = (np.where(np.isnan(clipped), mean, clipped) - mean) / np.where(spread > 0, spread, 1) ** power * weights
    return PCA(DIMS, svd_solver="full").fit_transform(scaled)


@pytest.mark.parametrize("power", [0.0, 0.75])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_was_not_measured_counts_as_the_mean(log_ng: np.ndarray, power: float, weighted: bool) -> None:
    genes, rng = np.arange(0, 90, 2), np.random.default_rng(3)
    measured = two_of_three(rng.integers(0, 3, len(log_ng)), 90)
    weights = rng.uniform(0.05, 1, len(genes)) if weighted else None
    x_ng = without(log_ng, measured)
    projection, found = fit_projection(x_ng, genes, DIMS, power, weights, measured)
    expected = imputed_components(with_nan(log_ng, measured)[:, genes], power, 1.0 if weights is None else weights)
    assert found.dtype == np.float32
    np.testing.assert_allclose(up_to_sign(found, expected), expected, atol=1e-4 * np.abs(expected).max())
    blocks = [projection.apply(x_ng[i : i + 70], measured.group_n[i : i + 70]) for i in range(0, len(log_ng), 70)]
    np.testing.assert_allclose(np.vstack(blocks), found, atol=2e-5 * np.abs(found).max())
    as_zeros = dense_components(x_ng.toarray()[:, genes], power, 1.0 if weights is None else weights)
    assert np.abs(up_to_sign(as_zeros, expected) - expected).max() > 0.2 * np.abs(expected).max()


def test_a_group_that_measured_nothing_lies_at_the_centre(log_ng: np.ndarray) -> None:
    group_n = np.arange(len(log_ng)) % 3
    measured = measured_by(group_n, np.repeat([[True], [True], [False]], 90, axis=1))
    _, found = fit_projection(without(log_ng, measured), np.arange(90), DIMS, measured=measured)
    assert not found[group_n == 2].any()
    np.testing.assert_allclose(found[group_n != 2].mean(axis=0), 0, atol=1e-4)


def test_everything_measured_gives_the_same_components(log_ng: np.ndarray) -> None:
    x_ng, genes = sparse.csr_matrix(log_ng), np.arange(0, 90, 2)
    everywhere = measured_by(np.arange(len(log_ng)) % 2, np.ones((2, 90)))
    _, found = fit_projection(x_ng, genes, DIMS, measured=everywhere)
    _, expected = fit_projection(x_ng, genes, DIMS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg="signs are the same too")


def test_groups_have_to_be_given_where_they_count(log_ng: np.ndarray) -> None:
    x_ng, group_n = sparse.csr_matrix(log_ng), np.zeros(len(log_ng), np.int32)
    plain, _ = fit_projection(x_ng, np.arange(90), DIMS)
    masked, _ = fit_projection(x_ng, np.arange(90), DIMS, measured=measured_by(group_n, np.ones((1, 90))))
    with pytest.raises(AssertionError, match="do not fit what was measured"):
        plain.apply(x_ng, group_n)
    with pytest.raises(AssertionError, match="do not fit what was measured"):
        masked.apply(x_ng)
