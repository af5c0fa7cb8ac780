from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from schelix_scale.genes.normalize import gene_moments, log_normalize
from tests.synthetic import dense_log_normalize
from tests.unmeasured import two_of_three, with_nan, without


def counts(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x_ng = rng.poisson(rng.gamma(0.5, 3.0, 30), (40, 30)).astype(np.float32)
    x_ng[7] = 0
    x_ng[:, 11] = 0
    return x_ng


@pytest.mark.parametrize(("values", "factor"), [("counts", 1.0), ("linear", 0.37)])
def test_log_normalize_equals_dense(values: str, factor: float) -> None:
    x_ng = counts() * np.float32(factor)
    found = log_normalize(sparse.csr_matrix(x_ng), values)
    np.testing.assert_allclose(found.toarray(), dense_log_normalize(x_ng.astype(np.float64)), rtol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("values", ["counts", "log"])
def test_values_of_some_genes_are_those_of_all(values: str) -> None:
    x_ng = sparse.csr_matrix(counts())
    kept_g = np.arange(30) % 3 == 1
    found = log_normalize(x_ng, values, kept_g)
    np.testing.assert_array_equal(found.toarray(), log_normalize(x_ng, values).toarray() * kept_g)
    assert found.nnz == x_ng[:, np.flatnonzero(kept_g)].nnz
    assert log_normalize(x_ng, values, np.zeros(30, bool)).nnz == 0


def test_cells_without_counts_stay_zero() -> None:
    found = log_normalize(sparse.csr_matrix(counts()), "counts").toarray()
    assert np.isfinite(found).all()
    assert not found[7].any()
    assert np.expm1(found[np.arange(40) != 7]).sum(axis=1) == pytest.approx(1e4, rel=1e-4)


def test_log_values_are_left_alone() -> None:
    x_ng = np.log1p(counts())
    np.testing.assert_array_equal(log_normalize(sparse.csr_matrix(x_ng), "log").toarray(), x_ng)


def test_the_input_is_not_changed() -> None:
    given = sparse.csr_matrix(counts())
    log_normalize(given, "counts")
    np.testing.assert_array_equal(given.toarray(), counts())


def test_gene_moments_equal_numpy() -> None:
    x_ng = counts()
    mean, variance = gene_moments(sparse.csr_matrix(x_ng))
    np.testing.assert_allclose(mean, x_ng.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(variance, x_ng.var(axis=0, dtype=np.float64), rtol=1e-9, atol=1e-12)


def test_moments_of_constant_genes() -> None:
    mean, variance = gene_moments(sparse.csr_matrix(np.full((1000, 3), [0.1, 0.7, 5.3], np.float32)))
    np.testing.assert_allclose(mean, [0.1, 0.7, 5.3], rtol=1e-6)
    assert (variance >= 0).all()
    np.testing.assert_allclose(variance, 0, atol=1e-12)


def test_moments_are_of_the_cells_that_measured_a_gene() -> None:
    rng = np.random.default_rng(3)
    x_ng, group_n = counts().astype(np.float64), rng.integers(0, 3, len(counts()))
    measured = two_of_three(group_n, x_ng.shape[1])
    measured.measured_pg[:, 0] = False
    mean, variance = gene_moments(without(x_ng, measured), measured)
    known = with_nan(x_ng, measured)[:, 1:]
    np.testing.assert_allclose(mean[1:], np.nanmean(known, axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance[1:], np.nanvar(known, axis=0), rtol=1e-5, atol=1e-9)
    assert (mean[0], variance[0]) == (0, 0), "no cell measured gene 0"
    as_zeros, _ = gene_moments(without(x_ng, measured))
    assert np.abs(mean - as_zeros).max() > 0.1 * mean.max()
