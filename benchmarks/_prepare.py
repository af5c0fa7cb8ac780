"""What methods share: the cells of a task with its variable genes, and the labels that a method may see.

A task comes in; an `AnnData` or an array in row order of the file goes out. All methods but schelix, which reads the
file itself, get the genes chosen here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from _tasks import Task

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

N_HVG = 2_000
N_PCS = 50
UNKNOWN = "Unknown"
_LABELLED = 0.2
_SAMPLE = 20_000


def selected(task: Task) -> AnnData:
    """Return the cells with at most 2,000 variable genes: log-normalised values in X, those of the file in ``raw``.

    Values that are logarithms already (decided as schelix decides it) are not normalised again. What the values are
    (counts, linear or log) is in ``uns["values"]``.
    """
    import anndata
    import scanpy as sc

    adata = anndata.read_h5ad(task.data)
    adata.obs[task.batch_key] = adata.obs[task.batch_key].astype(str).astype("category")
    adata.uns["values"] = _kind_of_values(adata, task.batch_key)
    adata.layers["raw"] = adata.X.copy()
    if adata.uns["values"] != "log":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    if adata.n_vars > N_HVG:
        sc.pp.highly_variable_genes(adata, n_top_genes=N_HVG, flavor="seurat", batch_key=task.batch_key)
        adata = adata[:, adata.var["highly_variable"]].copy()
    return adata


def prepared(task: Task) -> AnnData:
    """Return the cells with ``obsm["X_pca"]`` of their variable genes, the common start of the linear methods."""
    import scanpy as sc

    adata = selected(task)
    n_comps = min(N_PCS, adata.n_obs - 1, adata.n_vars - 1)
    sc.pp.pca(adata, n_comps=n_comps, zero_center=True, mask_var=None, random_state=task.seed)
    return adata


def partial_labels(task: Task) -> np.ndarray:
    """Return the labels of a random fifth of the cells, drawn by the task's seed, and "Unknown" for the others."""
    import anndata
    import h5py
    import numpy as np

    with h5py.File(task.data) as file:
        labels_n = anndata.io.read_elem(file["obs"])[task.label_key].astype(str).to_numpy(dtype=object)
    n = len(labels_n)
    known = np.random.default_rng([task.seed, 20]).choice(n, round(_LABELLED * n), replace=False)
    partial_n = np.full(n, UNKNOWN, dtype=object)
    partial_n[known] = labels_n[known]
    return partial_n


def note(scratch: Path, text: str) -> None:
    """Say something about a run that belongs beside its results."""
    with (scratch / "notes.txt").open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def _kind_of_values(adata: AnnData, batch_key: str) -> str:
    """Decide what the values are, from at most 20,000 cells."""
    import numpy as np
    from scipy import sparse

    from schelix_scale.stores.values import decide_values

    rng = np.random.default_rng(0)
    n = adata.n_obs
    rows = np.arange(n) if n <= _SAMPLE else np.sort(rng.choice(n, _SAMPLE, replace=False))
    batches = adata.obs[batch_key].cat
    x_ng = sparse.csr_matrix(adata.X[rows])
    decision = decide_values(x_ng, batches.codes.to_numpy()[rows], list(batches.categories))
    print(decision.reason)
    return decision.kind
