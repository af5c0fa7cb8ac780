"""Log-normalised genes of a stream -> principal components, fitted on the sketch, applied to any block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from schelix_scale.genes.normalize import CLIP, gene_moments


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
    """

    genes: np.ndarray
    cap: np.ndarray
    loadings_hd: np.ndarray
    offset_d: np.ndarray

    def apply(self, x_ng: sparse.csr_matrix) -> np.ndarray:
        """Project (m, g) log-normalised values of all genes to (m, d) float32 components."""
        block = clip_genes(x_ng[:, self.genes], self.cap)
        return np.asarray(block @ self.loadings_hd - self.offset_d, dtype=np.float32)


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
) -> tuple[Projection, np.ndarray]:
    """Fit the PCA of ``genes`` on the sketch; return it with the sketch's (n, d) components.

    Each gene is capped at mean + 10 sd, divided by sd**scale_power, multiplied by its weight if there are ``weights``
    (h,), above 0, and centred, the last implicitly: nothing (n, h) is dense.
    """
    from sklearn.decomposition import PCA

    x_nh = x_ng[:, genes]
    mean, variance = gene_moments(x_nh)
    cap = (mean + CLIP * np.sqrt(variance)).astype(np.float32)
    x_nh = clip_genes(x_nh, cap)
    _, variance = gene_moments(x_nh)
    scale = np.where(variance > 0, np.sqrt(variance), 1.0) ** scale_power
    scale = scale if weights is None else scale / weights
    x_nh = (x_nh.astype(np.float64) @ sparse.diags(1 / scale)).tocsr()
    dims = min(dims, len(genes) - 1, len(x_nh.indptr) - 2)
    pca = PCA(dims, svd_solver="arpack", random_state=0).fit(x_nh)
    loadings = pca.components_.T / scale[:, None]
    offset = pca.mean_ @ pca.components_.T
    projection = Projection(np.asarray(genes), cap, loadings.astype(np.float32), offset.astype(np.float32))
    return projection, np.asarray(x_nh @ pca.components_.T - offset, dtype=np.float32)
