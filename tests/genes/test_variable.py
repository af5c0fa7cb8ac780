from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from schelix_scale.genes.variable import variable_genes
from tests.synthetic import dense_log_normalize
from tests.unmeasured import measured_by, without

SIZES = (300, 250, 40)
VARIABLE, TINY_ONLY = np.arange(20), np.arange(20, 30)


def sketch(seed: int = 0, g: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Genes 0-19 are on in half of the cells of every batch, genes 20-29 in half of those of the last, tiny batch."""
    rng = np.random.default_rng(seed)
    batch_n = np.repeat(np.arange(3), SIZES)
    mean_ng = np.broadcast_to(rng.uniform(2, 4, g), (len(batch_n), g)).copy()
    kind_n = rng.integers(0, 2, len(batch_n))
    mean_ng[:, VARIABLE] *= np.where(kind_n, 1.9, 0.1)[:, None]
    tiny = batch_n == 2
    mean_ng[np.ix_(tiny, TINY_ONLY)] *= np.where(kind_n[tiny], 1.95, 0.05)[:, None]
    return dense_log_normalize(rng.poisson(mean_ng)), batch_n


def chosen(log_ng: np.ndarray, batch_n: np.ndarray, n_hvg: int, min_batch_cells: int) -> np.ndarray:
    return variable_genes(sparse.csr_matrix(log_ng.astype(np.float32)), batch_n, n_hvg, min_batch_cells)


def test_variable_genes_are_chosen() -> None:
    log_ng, batch_n = sketch()
    found = chosen(log_ng, batch_n, 40, 100)
    assert set(VARIABLE) <= set(found)
    np.testing.assert_array_equal(found, np.unique(found))
    assert len(found) == 40


def test_small_batches_do_not_vote() -> None:
    """What only the tiny batch finds variable is chosen if it votes, and not if it does not."""
    log_ng, batch_n = sketch()
    with_vote, without = chosen(log_ng, batch_n, 40, 1), chosen(log_ng, batch_n, 40, 100)
    assert len(np.intersect1d(TINY_ONLY, with_vote)) >= 8
    assert len(np.intersect1d(TINY_ONLY, without)) <= 2
    others = batch_n != 2
    np.testing.assert_array_equal(without, chosen(log_ng[others], batch_n[others], 40, 100))


def test_a_single_batch_votes_alone() -> None:
    log_ng, batch_n = sketch()
    first = batch_n == 0
    np.testing.assert_array_equal(chosen(log_ng, batch_n, 30, 280), chosen(log_ng[first], batch_n[first], 30, 280))


def test_all_vote_if_all_are_small() -> None:
    log_ng, batch_n = sketch()
    np.testing.assert_array_equal(chosen(log_ng, batch_n, 30, 10_000), chosen(log_ng, batch_n, 30, 1))


@pytest.mark.parametrize("n_hvg", [30, 1495, 2000])
def test_genes_of_two_cells_are_never_chosen(n_hvg: int) -> None:
    log_ng, batch_n = sketch()
    log_ng[:, 50:60] = 0
    log_ng[5:7, 50:55] = 9.0
    log_ng[5:8, 55:60] = 9.0
    found = chosen(log_ng, batch_n, n_hvg, 100)
    assert not set(range(50, 55)) & set(found)
    assert len(found) == min(n_hvg, 1495)
    if n_hvg >= 1495:
        assert set(range(55, 60)) <= set(found)


@pytest.mark.parametrize("min_batch_cells", [1, 100])
def test_all_measured_is_as_if_not_said(min_batch_cells: int) -> None:
    """Votes of scanpy, batch by batch, give the genes that scanpy chooses between batches."""
    log_ng, batch_n = sketch()
    everywhere = measured_by(batch_n, np.ones((3, log_ng.shape[1])))
    found = variable_genes(sparse.csr_matrix(log_ng.astype(np.float32)), batch_n, 40, min_batch_cells, everywhere)
    np.testing.assert_array_equal(found, chosen(log_ng, batch_n, 40, min_batch_cells))


def test_votes_are_counted_where_a_gene_was_measured() -> None:
    """Genes 0-9 vary, but only batches 4 and 5 of six measured them; 10-19 vary in batches 0, 1 and 2."""
    rng = np.random.default_rng(2)
    batch_n = np.repeat(np.arange(6), 250)
    mean_ng = np.broadcast_to(rng.uniform(2, 4, 1500), (1500, 1500)).copy()
    factor_n = np.where(rng.integers(0, 2, 1500), 1.9, 0.1)[:, None]
    mean_ng[:, :10] *= factor_n
    mean_ng[batch_n < 3, 10:20] *= factor_n[batch_n < 3]
    measured_pg = np.ones((6, 1500), bool)
    measured_pg[:4, :10] = False
    measured = measured_by(batch_n, measured_pg)
    values = without(dense_log_normalize(rng.poisson(mean_ng)), measured)
    found = variable_genes(values, batch_n, 12, 100, measured)
    assert set(range(10)) <= set(found), "two votes of two"
    as_zeros = chosen(values.toarray(), batch_n, 12, 100)
    assert np.isin(as_zeros, np.arange(10, 20)).sum() >= 8, "three votes of six beat two of six"


def test_batches_that_measured_few_genes_do_not_vote_for_all_of_them() -> None:
    """Three batches of five measured 60 genes, of which 20 vary."""
    log_ng, _ = sketch(seed=2)
    batch_n = np.arange(len(log_ng)) % 5
    measured_pg = np.ones((5, log_ng.shape[1]), bool)
    measured_pg[2:, 60:] = False
    measured = measured_by(batch_n, measured_pg)
    found = variable_genes(without(log_ng, measured), batch_n, 60, 1, measured)
    assert set(VARIABLE) <= set(found)
    assert np.isin(found, np.arange(30, 60)).sum() <= 8, "30 genes that vary nowhere"


def test_a_gene_of_one_group_is_never_chosen() -> None:
    log_ng, batch_n = sketch(seed=2)
    measured_pg = np.ones((3, log_ng.shape[1]), bool)
    measured_pg[1:, :5] = False
    measured = measured_by(batch_n, measured_pg)
    values = without(log_ng, measured)
    for n_hvg in (40, 5000):
        found = variable_genes(values, batch_n, n_hvg, 100, measured)
        assert not set(range(5)) & set(found)
        assert set(range(5, 20)) <= set(found)
    alone = np.flatnonzero(batch_n == 0)
    found = variable_genes(values[alone], batch_n[alone], 40, 100, measured.of_cells(alone))
    assert set(range(20)) <= set(found), "of a single group all genes can be compared"


@pytest.mark.parametrize("masked", [False, True])
def test_batches_of_one_cell_do_not_vote(masked: bool) -> None:
    log_ng, _ = sketch(seed=4)
    many = np.arange(len(log_ng)) % 3
    measured = measured_by(np.zeros(len(log_ng), int), np.ones((1, log_ng.shape[1]), bool)) if masked else None
    alone = many.copy()
    alone[:5] = np.arange(5) + 3  # five batches of a cell each, beside three large ones
    found = variable_genes(sparse.csr_matrix(log_ng), alone, 20, 1, measured)
    assert set(VARIABLE) <= set(found)
    single = variable_genes(sparse.csr_matrix(log_ng), np.arange(len(log_ng)), 20, 1, measured)
    assert set(VARIABLE) <= set(single), "cells that are each a batch vote together"
