"""Sketch -> highly variable genes, chosen by scanpy within batches."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from schelix_scale.errors import DataError
from schelix_scale.stores.base import Measured

MIN_CELLS_EXPRESSING = 3
FEWEST_VOTERS = 2


def variable_genes(
    x_ng: sparse.csr_matrix,
    batch_n: np.ndarray,
    n_hvg: int,
    min_batch_cells: int,
    measured: Measured | None = None,
) -> np.ndarray:
    """Choose genes that vary within batches (scanpy, flavor ``seurat``, batch-aware).

    Parameters
    ----------
    x_ng
        (n, g) log-normalised sketch.
    batch_n
        (n,) batch codes; batches of fewer than ``min_batch_cells`` do not vote, unless all are that small.
    measured
        Which genes were measured in these cells; None: all in all. Then those of a batch that are in one group vote
        together, and only on genes that were measured in them; see `_most_voted`. A gene that only one of several
        groups measured is never chosen: it would tell this group from the others, whatever it varies with.

    Returns
    -------
    Sorted positions of the chosen genes, at most ``n_hvg``. Genes that fewer than 3 cells
    express are never chosen; if no more than ``n_hvg`` others are left, all of those are.
    """
    expressed = _expressed(x_ng)
    if measured is not None:
        expressed = np.intersect1d(expressed, _shared_genes(measured))
        pairs = np.column_stack([batch_n, measured.group_n])
        batch_n = np.unique(pairs, axis=0, return_inverse=True)[1].ravel()
    if len(expressed) <= n_hvg:
        return expressed
    voting = _voters(x_ng[:, expressed], batch_n, min_batch_cells)
    if not len(voting):  # no batch has two different cells: those that may be taken together vote together
        batch_n = np.zeros_like(batch_n) if measured is None else measured.group_n
        voting = _voters(x_ng[:, expressed], batch_n, FEWEST_VOTERS)
    if not len(voting):
        raise DataError(
            "no two sampled cells that measured the same genes differ, so no gene varies. Raise sketch.max_cells."
        )
    rows = np.flatnonzero(np.isin(batch_n, voting))
    expressed = np.intersect1d(expressed, _expressed(x_ng[rows]))
    if len(expressed) <= n_hvg:
        return expressed
    if measured is not None:
        return _most_voted(x_ng, batch_n, voting, expressed, n_hvg, measured)
    import anndata
    import pandas as pd
    import scanpy

    obs = pd.DataFrame({"batch": pd.Categorical(batch_n[rows].astype(str))}, index=rows.astype(str))
    sketch = anndata.AnnData(x_ng[rows][:, expressed], obs=obs)
    key = "batch" if len(voting) > 1 else None
    table = scanpy.pp.highly_variable_genes(sketch, n_top_genes=n_hvg, batch_key=key, flavor="seurat", inplace=False)
    return np.asarray(expressed[table["highly_variable"].to_numpy()])


def _voters(x_nh: sparse.csr_matrix, batch_n: np.ndarray, min_cells: int) -> np.ndarray:
    """Return the batches that may vote: of ``min_cells``, or all if none is that large, and with cells that differ.

    The variance of a single cell is rounding noise, and its vote would be too.
    """
    codes, sizes = np.unique(batch_n, return_counts=True)
    differ = np.array(
        [size >= FEWEST_VOTERS and _differ(x_nh[batch_n == code]) for code, size in zip(codes, sizes, strict=True)]
    )
    large = differ & (sizes >= min_cells)
    chosen: np.ndarray = codes[large if large.any() else differ]
    return chosen


def _differ(x_nh: sparse.csr_matrix) -> bool:
    """Whether any gene has two different values among these cells."""
    most, least = (np.asarray(found.todense()) for found in (x_nh.max(axis=0), x_nh.min(axis=0)))
    return bool((most > least).any())


def _expressed(x_ng: sparse.csr_matrix) -> np.ndarray:
    counts = np.bincount(x_ng.indices[x_ng.data > 0], minlength=x_ng.shape[1])
    return np.flatnonzero(counts >= MIN_CELLS_EXPRESSING)


def _shared_genes(measured: Measured) -> np.ndarray:
    """Return the positions of genes that two groups of these cells measured, or all of them if there is one group."""
    groups = np.unique(measured.group_n)
    return np.flatnonzero(measured.measured_pg[groups].sum(axis=0) >= min(2, len(groups)))


def _most_voted(
    x_ng: sparse.csr_matrix,
    batch_n: np.ndarray,
    voting: np.ndarray,
    expressed: np.ndarray,
    n_hvg: int,
    measured: Measured,
) -> np.ndarray:
    """Choose as scanpy does between batches, with votes counted among the batches that measured a gene.

    A batch that measured a share of the ``expressed`` genes has this share of ``n_hvg`` votes, which also is what each
    of them counts: one that measured a few chosen genes can neither vote for all of them nor tell them from the rest.
    Genes are ordered by (votes + v) / (batches + 1), both so weighted, v being the share of genes that are chosen: a
    share of votes, drawn a little to what is expected, so that the only vote of a gene is no more than nine votes of
    ten. If all is measured, the order is that of the votes, which is scanpy's.

    Parameters
    ----------
    batch_n
        (n,) codes, each of cells of one group.
    voting
        The codes of those that vote.

    Returns
    -------
    ``n_hvg`` sorted positions.
    """
    import anndata
    import scanpy

    g = len(expressed)
    votes, batches, spread, spreads = np.zeros((4, g))
    for code in voting:
        rows = np.flatnonzero(batch_n == code)
        known = measured.measured_pg[measured.group_n[rows[0]], expressed]
        weight = known.mean()
        batches += weight * known
        x_nh = x_ng[rows][:, expressed]
        on = np.flatnonzero(known & (x_nh.getnnz(axis=0) > 0))
        spreads[np.flatnonzero(known & (x_nh.getnnz(axis=0) == 0))] += 1
        if not len(on):
            continue
        n_votes = min(len(on), max(1, round(n_hvg * weight)))
        sketch = anndata.AnnData(x_nh[:, on])
        table = scanpy.pp.highly_variable_genes(sketch, n_top_genes=n_votes, flavor="seurat", inplace=False)
        votes[on] += weight * table["highly_variable"].to_numpy()
        dispersion = table["dispersions_norm"].to_numpy(dtype=np.float64)
        spread[on] += np.nan_to_num(dispersion)
        spreads[on] += np.isfinite(dispersion)
    score = (votes + n_hvg / g) / (batches + 1)
    tie = np.where(spreads > 0, spread / np.maximum(spreads, 1), -np.inf)
    return np.asarray(np.sort(expressed[np.lexsort((-tie, -score))[:n_hvg]]))
