"""Values as stored -> log-normalised values, the same for the sketch and for every streamed block."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from schelix_scale.stores.base import Measured

TARGET_SUM = 1e4
CLIP = 10.0


def log_normalize(x_ng: sparse.csr_matrix, values: str, kept_g: np.ndarray | None = None) -> sparse.csr_matrix:
    """Return log1p of size-factor normalised values; log values come back as they are.

    Parameters
    ----------
    x_ng
        (n, g) CSR, all genes of the cells: the size factor is the cell's sum over all of them, which is to say over
        those that were measured in it. Of a cell in which fewer were, the others' values are so much the larger.
    values
        ``counts`` or ``linear`` (normalised to 1e4 a cell, log1p) or ``log`` (unchanged).
    kept_g
        (g,) bool: the genes whose values are returned, those of the others are left out (the shape stays); all by
        default. Logarithms of genes that nobody looks at are most of the work.
    """
    if values == "log":
        return x_ng if kept_g is None else _only(x_ng, kept_g)
    totals = np.asarray(x_ng.sum(axis=1), dtype=np.float64).ravel()
    factors = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
    if kept_g is not None:
        x_ng = _only(x_ng, kept_g)
    data = np.log1p(x_ng.data * np.repeat(factors, np.diff(x_ng.indptr)))
    return sparse.csr_matrix((data.astype(np.float32), x_ng.indices, x_ng.indptr), shape=x_ng.shape)


def _only(x_ng: sparse.csr_matrix, kept_g: np.ndarray) -> sparse.csr_matrix:
    """Return the stored values of some genes, in the same shape."""
    places = np.flatnonzero(kept_g[x_ng.indices])
    indptr = np.searchsorted(places, x_ng.indptr)
    return sparse.csr_matrix((x_ng.data[places], x_ng.indices[places], indptr), shape=x_ng.shape)


def gene_moments(x_ng: sparse.csr_matrix, measured: Measured | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (ddof 0) of each gene, (g,) float64 each, without a dense copy.

    With ``measured`` (of these cells and genes; no value is stored where a gene was not measured) each is over the
    cells in which the gene was measured, and 0 where there are none.
    """
    g = x_ng.shape[1]
    n = x_ng.shape[0] if measured is None else np.maximum(measured.cells_g(), 1)
    sums = np.bincount(x_ng.indices, weights=x_ng.data, minlength=g)
    squares = np.bincount(x_ng.indices, weights=x_ng.data.astype(np.float64) ** 2, minlength=g)
    mean = sums / n
    return mean, np.maximum(squares / n - mean**2, 0.0)
