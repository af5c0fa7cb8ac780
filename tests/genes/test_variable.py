from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from schelix_scale.genes.variable import variable_genes
from tests.synthetic import dense_log_normalize

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
