"""Clustered sketch cells -> how much of each gene's variation is batch, how much biology (METHOD section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

MIN_CELLS, FEWEST_CELLS = 10, 2
COVERED = 0.5
TINY = 1e-12


@dataclass(frozen=True)
class Sensitivity:
    """Noise-debiased variance components of each gene, (g,) float64 each.

    Attributes
    ----------
    beta
        Between batches, inside clusters.
    gamma
        Between clusters.
    within
        Residual variance inside (cluster, batch) cells.
    comparable
        Share of the cells that are in a cluster (and level) with two batches or more to compare.
    """

    beta: np.ndarray
    gamma: np.ndarray
    within: np.ndarray
    comparable: float

    @property
    def rho(self) -> np.ndarray:
        """Batch sensitivity beta / (beta + gamma), in [0, 1]; 0 where both vanish."""
        return np.asarray(self.beta / np.maximum(self.beta + self.gamma, TINY))


def batch_sensitivity(
    x_ng: sparse.csr_matrix, cluster_n: np.ndarray, batch_n: np.ndarray, level_n: np.ndarray | None = None
) -> Sensitivity:
    """Decompose each gene's variance by a one-way layout of batches inside clusters.

    Cluster by cluster, so memory is (batches, g) and not (clusters, batches, g). Cells of the same cluster
    and batch form a group; groups of fewer than 10 cells are left out, or of fewer than 2 if that would leave
    less than half of the cells to compare: the estimates are free of noise for any size, small groups only make
    them less precise.

    Parameters
    ----------
    x_ng
        (n, g) CSR log-normalised values.
    cluster_n, batch_n
        (n,) integer codes.
    level_n
        (n,) integer codes of protected levels (condition, time): clusters are split by them, so that a
        difference between levels is not counted as batch. None protects nothing.

    Notes
    -----
    beta_g = max(0, (sum_cb n_cb (m_cb - m_c)^2 - df w_g) / N), gamma_g = max(eps, (sum_c n_c (m_c - m)^2 - C w_g) / N)
    """
    min_cells = MIN_CELLS
    if comparable_share(cluster_n, batch_n, level_n, MIN_CELLS) < COVERED:
        min_cells = FEWEST_CELLS
    g = x_ng.shape[1]
    between = np.zeros(g)
    residual = np.zeros(g)
    n_groups = n_clusters = n_cells = 0
    total = np.zeros(g)
    means: list[np.ndarray] = []
    sizes: list[int] = []
    for cluster in np.unique(cluster_n):
        members = np.flatnonzero(cluster_n == cluster)
        levels = np.zeros(len(members), int) if level_n is None else level_n[members]
        cluster_sum, cluster_size = np.zeros(g), 0
        for level in np.unique(levels):
            groups = _group_moments(x_ng, members[levels == level], batch_n, min_cells)
            if groups is None:
                continue
            size_b, sum_bg, square_bg = groups
            mean_bg = sum_bg / size_b[:, None]
            centre = sum_bg.sum(axis=0) / size_b.sum()
            between += (size_b[:, None] * (mean_bg - centre) ** 2).sum(axis=0)
            residual += (square_bg - size_b[:, None] * mean_bg**2).sum(axis=0)
            n_groups += len(size_b)
            n_clusters += 1
            cluster_sum += sum_bg.sum(axis=0)
            cluster_size += int(size_b.sum())
        if cluster_size:
            means.append(cluster_sum / cluster_size)
            sizes.append(cluster_size)
            total += cluster_sum
            n_cells += cluster_size
    if not n_cells:
        return Sensitivity(np.zeros(g), np.full(g, TINY), np.zeros(g), 0.0)
    within = residual / max(n_cells - n_groups, 1)
    mean = total / n_cells
    across = (np.asarray(sizes)[:, None] * (np.asarray(means) - mean) ** 2).sum(axis=0)
    beta = np.maximum(0.0, (between - (n_groups - n_clusters) * within) / n_cells)
    gamma = np.maximum(TINY, (across - len(means) * within) / n_cells)
    return Sensitivity(beta, gamma, within, comparable_share(cluster_n, batch_n, level_n, min_cells))


def comparable_share(cluster_n: np.ndarray, batch_n: np.ndarray, level_n: np.ndarray | None, min_cells: int) -> float:
    """Share of cells in a cluster (and level) where two batches or more have ``min_cells`` cells."""
    levels = np.zeros_like(cluster_n) if level_n is None else level_n
    groups, sizes = np.unique(np.column_stack([cluster_n, levels, batch_n]), axis=0, return_counts=True)
    groups, sizes = groups[sizes >= min_cells], sizes[sizes >= min_cells]
    if not len(groups):
        return 0.0
    _, stratum, n_batches = np.unique(groups[:, :2], axis=0, return_inverse=True, return_counts=True)
    return float(sizes[n_batches[stratum.ravel()] >= 2].sum() / len(cluster_n))


def _group_moments(
    x_ng: sparse.csr_matrix, members: np.ndarray, batch_n: np.ndarray, min_cells: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Sizes (b,), sums (b, g) and sums of squares (b, g) of the batches with enough of these cells."""
    batches, codes, counts = np.unique(batch_n[members], return_inverse=True, return_counts=True)
    keep = counts >= min_cells
    if not keep.any():
        return None
    indicator = sparse.csr_matrix(
        (np.ones(len(members)), (codes, np.arange(len(members)))), (len(batches), len(members))
    )
    block = x_ng[members].astype(np.float64)
    sums = (indicator @ block).toarray()
    block.data **= 2
    squares = (indicator @ block).toarray()
    return counts[keep].astype(float), sums[keep], squares[keep]
