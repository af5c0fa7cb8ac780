"""Clustered sketch cells -> how much of each gene's variation is batch, how much biology (METHOD section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from schelix_scale.stores.base import Measured

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
        Share of the cells that are in a cluster (and level) with two batches or more to compare; 0 if fewer than two
        genes are comparable.
    comparable_g
        (g,) bool: whether two batches that measured the gene are in one cluster (and level). None: all genes were
        measured in all cells.
    """

    beta: np.ndarray
    gamma: np.ndarray
    within: np.ndarray
    comparable: float
    comparable_g: np.ndarray | None = None

    @property
    def rho(self) -> np.ndarray:
        """Batch sensitivity beta / (beta + gamma), in [0, 1]; 0 where both vanish.

        1 for a gene that no two batches measured in the same cluster: nothing shows that it is insensitive.
        """
        rho = np.asarray(self.beta / np.maximum(self.beta + self.gamma, TINY))
        return rho if self.comparable_g is None else np.where(self.comparable_g, rho, 1.0)


def batch_sensitivity(
    x_ng: sparse.csr_matrix,
    cluster_n: np.ndarray,
    batch_n: np.ndarray,
    level_n: np.ndarray | None = None,
    measured: Measured | None = None,
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
    measured
        Which genes were measured in these cells; None: all in all. A gene's numbers are then those of the cells that
        measured it, as if there were no others: the size of a group of cells, and so whether it is large enough, the
        number of groups and clusters, and N differ between genes.

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
    per_gene = 1 if measured is None else g  # what follows is the same for all genes, or (g,)
    n_groups, n_clusters, n_cells = np.zeros((3, per_gene), int)
    comparable_g = np.zeros(per_gene, bool)
    total = np.zeros(g)
    means: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for cluster in np.unique(cluster_n):
        members = np.flatnonzero(cluster_n == cluster)
        levels = np.zeros(len(members), int) if level_n is None else level_n[members]
        cluster_sum, cluster_size = np.zeros(g), np.zeros(per_gene, int)
        for level in np.unique(levels):
            groups = _group_moments(x_ng, members[levels == level], batch_n, min_cells, measured)
            if groups is None:
                continue
            size_bg, sum_bg, square_bg = groups
            mean_bg = sum_bg / np.maximum(size_bg, 1)
            centre = sum_bg.sum(axis=0) / np.maximum(size_bg.sum(axis=0), 1)
            between += (size_bg * (mean_bg - centre) ** 2).sum(axis=0)
            residual += (square_bg - size_bg * mean_bg**2).sum(axis=0)
            counted = (size_bg > 0).sum(axis=0)
            n_groups += counted
            n_clusters += counted > 0
            comparable_g |= counted > 1
            cluster_sum += sum_bg.sum(axis=0)
            cluster_size += size_bg.sum(axis=0)
        if cluster_size.any():
            means.append(cluster_sum / np.maximum(cluster_size, 1))
            sizes.append(cluster_size)
            total += cluster_sum
            n_cells += cluster_size
    apart = None if measured is None else comparable_g
    if not n_cells.any():
        return Sensitivity(np.zeros(g), np.full(g, TINY), np.zeros(g), 0.0, apart)
    within = residual / np.maximum(n_cells - n_groups, 1)
    mean = total / np.maximum(n_cells, 1)
    across = (np.asarray(sizes) * (np.asarray(means) - mean) ** 2).sum(axis=0)
    beta = np.maximum(0.0, (between - (n_groups - n_clusters) * within) / np.maximum(n_cells, 1))
    n_means = (np.asarray(sizes) > 0).sum(axis=0)
    gamma = np.maximum(TINY, (across - n_means * within) / np.maximum(n_cells, 1))
    none = measured is not None and comparable_g.sum() < 2
    comparable = 0.0 if none else comparable_share(cluster_n, batch_n, level_n, min_cells)
    return Sensitivity(beta, gamma, within, comparable, apart)


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
    x_ng: sparse.csr_matrix, members: np.ndarray, batch_n: np.ndarray, min_cells: int, measured: Measured | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Sizes (b, 1), sums (b, g) and sums of squares (b, g) of the batches with enough of these cells.

    With ``measured`` sizes are (b, g) and enough cells have to have measured the gene; where they have not, all is 0.
    """
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
    if measured is None:
        return counts[keep][:, None], sums[keep], squares[keep]
    group_n = measured.group_n[members]
    cells_bp = np.zeros((len(batches), len(measured.names)), int)
    np.add.at(cells_bp, (codes, group_n), 1)
    groups = np.flatnonzero(cells_bp.any(axis=0))
    size_bg = cells_bp[keep][:, groups] @ measured.measured_pg[groups].astype(int)
    enough = size_bg >= min_cells
    return size_bg * enough, sums[keep] * enough, squares[keep] * enough
