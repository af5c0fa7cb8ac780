"""Complete values -> values of which some groups of cells did not measure some genes, with NaN where that is so."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from schelix_scale.stores.base import Measured


def measured_by(group_n: np.ndarray, measured_pg: np.ndarray) -> Measured:
    names = tuple(f"set{i}" for i in range(len(measured_pg)))
    return Measured(np.asarray(group_n, np.int32), names, np.asarray(measured_pg, bool))


def with_nan(x_ng: np.ndarray, measured: Measured) -> np.ndarray:
    return np.where(measured.measured_pg[measured.group_n], x_ng, np.nan).astype(np.float64)


def without(x_ng: np.ndarray, measured: Measured) -> sparse.csr_matrix:
    """Store nothing where a gene was not measured."""
    return sparse.csr_matrix(np.nan_to_num(with_nan(x_ng, measured)).astype(np.float32))


def two_of_three(group_n: np.ndarray, g: int, share: float = 0.3, seed: int = 0) -> Measured:
    """Let group 2 not measure a share of the genes, and group 1 not the next tenth of them."""
    order, n_lost = np.random.default_rng(seed).permutation(g), int(share * g)
    measured_pg = np.ones((3, g), bool)
    measured_pg[2, order[:n_lost]] = False
    measured_pg[1, order[n_lost : n_lost + g // 10]] = False
    return measured_by(group_n, measured_pg)
