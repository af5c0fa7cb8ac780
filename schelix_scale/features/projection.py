"""Log-normalised genes of a stream -> principal components, fitted on the sketch, applied to any block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from schelix_scale.genes.normalize import CLIP, gene_moments
from schelix_scale.stores.base import Measured


@dataclass(frozen=True)
class Projection:
    """PCA of scaled, clipped genes as one affine map of a sparse block.

    Attributes
    ----------
    genes
        (h,) positions of the stream's genes among all genes.
    cap
        (h,) largest log-normalised value of each gene (mean + 10 standard deviations).
    loadings_hd
        (h, d) loadings divided by the gene scale.
    offset_d
        (d,) projection of the mean, subtracted.
    offset_pd
        (p, d) the same of the genes that each group of cells measured: a gene that was not measured in a cell counts
        as its mean, and adds nothing. None: all genes were measured in all cells.
    """

    genes: np.ndarray
    cap: np.ndarray
    loadings_hd: np.ndarray
    offset_d: np.ndarray
    offset_pd: np.ndarray | None = None

    def apply(self, x_ng: sparse.csr_matrix, group_n: np.ndarray | None = None) -> np.ndarray:
        """Project (m, g) log-normalised values of all genes to (m, d) float32 components.

        ``group_n`` (m,), the groups that say what was measured, is needed if and only if there is an ``offset_pd``.
        """
        assert (group_n is None) == (self.offset_pd is None), "groups of cells do not fit what was measured"
        offset = self.offset_d if self.offset_pd is None else self.offset_pd[group_n]
        block = clip_genes(x_ng[:, self.genes], self.cap)
        return np.asarray(block @ self.loadings_hd - offset, dtype=np.float32)


def clip_genes(x_nh: sparse.csr_matrix, cap: np.ndarray) -> sparse.csr_matrix:
    """Limit each gene's values to its cap; zeros stay zeros."""
    data = np.minimum(x_nh.data, cap[x_nh.indices]).astype(np.float32)
    return sparse.csr_matrix((data, x_nh.indices, x_nh.indptr), shape=x_nh.shape)


def fit_projection(
    x_ng: sparse.csr_matrix,
    genes: np.ndarray,
    dims: int,
    scale_power: float = 1.0,
    weights: np.ndarray | None = None,
    measured: Measured | None = None,
) -> tuple[Projection, np.ndarray]:
    """Fit the PCA of ``genes`` on the sketch; return it with the sketch's (n, d) components.

    Each gene is capped at mean + 10 sd, divided by sd**scale_power, multiplied by its weight if there are ``weights``
    (h,), above 0, and centred, the last implicitly: nothing (n, h) is dense.

    With ``measured`` (of the sketch's cells and all g genes) mean and sd are over the cells in which a gene was
    measured, and in all others it counts as its mean.
    """
    x_nh = x_ng[:, genes]
    known = None if measured is None else measured.of_genes(genes)
    mean, variance = gene_moments(x_nh, known)
    cap = (mean + CLIP * np.sqrt(variance)).astype(np.float32)
    x_nh = clip_genes(x_nh, cap)
    mean, variance = gene_moments(x_nh, known)
    scale = np.where(variance > 0, np.sqrt(variance), 1.0) ** scale_power
    scale = scale if weights is None else scale / weights
    x_nh = (x_nh.astype(np.float64) @ sparse.diags(1 / scale)).tocsr()
    dims = min(dims, len(genes) - 1, len(x_nh.indptr) - 2)
    offset_pd = offset_nd = None
    if known is None:
        from sklearn.decomposition import PCA

        pca = PCA(dims, svd_solver="arpack", random_state=0).fit(x_nh)
        components = pca.components_.T
        offset_d = offset_nd = pca.mean_ @ components
    else:
        centre_ph = known.measured_pg * (mean / scale)
        components = _components(x_nh, centre_ph, known.group_n, dims)
        offset_d, offset_pd = (mean / scale) @ components, (centre_ph @ components).astype(np.float32)
        offset_nd = offset_pd[known.group_n]
    loadings = (components / scale[:, None]).astype(np.float32)
    projection = Projection(np.asarray(genes), cap, loadings, offset_d.astype(np.float32), offset_pd)
    return projection, np.asarray(x_nh @ components - offset_nd, dtype=np.float32)


def _components(x_nh: sparse.csr_matrix, centre_ph: np.ndarray, group_n: np.ndarray, dims: int) -> np.ndarray:
    """First right singular vectors (h, dims) of the matrix less the centre (p, h) of each row's group, never dense.

    If the centres are the columns' means where they were measured and 0 elsewhere, these are the components of the
    matrix in which what was not measured is the column's mean.
    """
    from scipy.sparse.linalg import LinearOperator, svds
    from sklearn.utils.extmath import svd_flip

    n, p = x_nh.shape[0], len(centre_ph)
    of_group_pn = sparse.csr_matrix((np.ones(n), (group_n, np.arange(n))), shape=(p, n))
    x_hn = x_nh.T.tocsr()
    centred = LinearOperator(
        shape=x_nh.shape,
        dtype=np.float64,
        matvec=lambda v: x_nh @ v - (centre_ph @ v)[group_n],
        matmat=lambda v: x_nh @ v - (centre_ph @ v)[group_n],
        rmatvec=lambda u: x_hn @ u - centre_ph.T @ (of_group_pn @ u),
        rmatmat=lambda u: x_hn @ u - centre_ph.T @ (of_group_pn @ u),
    )
    start = np.random.default_rng(0).uniform(-1, 1, min(x_nh.shape))
    left, _, right = svds(centred, k=dims, v0=start)
    _, right = svd_flip(left[:, ::-1], right[::-1], u_based_decision=False)
    return np.asarray(right).T
