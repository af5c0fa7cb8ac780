"""Values as stored -> log-normalised values, the same for the sketch and for every streamed block."""

from __future__ import annotations

import numpy as np
from scipy import sparse

TARGET_SUM = 1e4
CLIP = 10.0


def log_normalize(x_ng: sparse.csr_matrix, values: str) -> sparse.csr_matrix:
    """Return log1p of size-factor normalised values; log values come back as they are.

    Parameters
    ----------
    x_ng
        (n, g) CSR, all genes of the cells: the size factor is the cell's sum over all of them.
    values
        ``counts`` or ``linear`` (normalised to 1e4 a cell, log1p) or ``log`` (unchanged).
    """
    if values == "log":
        return x_ng
    totals = np.asarray(x_ng.sum(axis=1), dtype=np.float64).ravel()
    factors = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
    data = np.log1p(x_ng.data * np.repeat(factors, np.diff(x_ng.indptr)))
    return sparse.csr_matrix((data.astype(np.float32), x_ng.indices, x_ng.indptr), shape=x_ng.shape)


def gene_moments(x_ng: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (ddof 0) of each gene, (g,) float64 each, without a dense copy."""
    n, g = x_ng.shape
    sums = np.bincount(x_ng.indices, weights=x_ng.data, minlength=g)
    squares = np.bincount(x_ng.indices, weights=x_ng.data.astype(np.float64) ** 2, minlength=g)
    mean = sums / n
    return mean, np.maximum(squares / n - mean**2, 0.0)
