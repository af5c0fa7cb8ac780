"""Sketch -> highly variable genes, chosen by scanpy within batches."""

from __future__ import annotations

import numpy as np
from scipy import sparse

MIN_CELLS_EXPRESSING = 3


def variable_genes(x_ng: sparse.csr_matrix, batch_n: np.ndarray, n_hvg: int, min_batch_cells: int) -> np.ndarray:
    """Choose genes that vary within batches (scanpy, flavor ``seurat``, batch-aware).

    Parameters
    ----------
    x_ng
        (n, g) log-normalised sketch.
    batch_n
        (n,) batch codes; batches of fewer than ``min_batch_cells`` do not vote, unless all are that small.

    Returns
    -------
    Sorted positions of the chosen genes, at most ``n_hvg``. Genes that fewer than 3 cells
    express are never chosen; if no more than ``n_hvg`` others are left, all of those are.
    """
    expressed = _expressed(x_ng)
    if len(expressed) <= n_hvg:
        return expressed
    codes, sizes = np.unique(batch_n, return_counts=True)
    voting = codes[sizes >= min_batch_cells]
    if not len(voting):
        voting = codes
    rows = np.flatnonzero(np.isin(batch_n, voting))
    expressed = np.intersect1d(expressed, _expressed(x_ng[rows]))
    if len(expressed) <= n_hvg:
        return expressed
    import anndata
    import pandas as pd
    import scanpy

    obs = pd.DataFrame({"batch": pd.Categorical(batch_n[rows].astype(str))}, index=rows.astype(str))
    sketch = anndata.AnnData(x_ng[rows][:, expressed], obs=obs)
    key = "batch" if len(voting) > 1 else None
    table = scanpy.pp.highly_variable_genes(sketch, n_top_genes=n_hvg, batch_key=key, flavor="seurat", inplace=False)
    return np.asarray(expressed[table["highly_variable"].to_numpy()])


def _expressed(x_ng: sparse.csr_matrix) -> np.ndarray:
    counts = np.bincount(x_ng.indices[x_ng.data > 0], minlength=x_ng.shape[1])
    return np.flatnonzero(counts >= MIN_CELLS_EXPRESSING)
