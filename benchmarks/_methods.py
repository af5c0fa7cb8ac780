"""The methods: each a function of a task and an empty directory that returns its embeddings, run as its users run it.

A new method is one function and one line in `METHODS`. Import its libraries inside the function: each method is
measured in a process of its own, and what is imported counts. Embeddings are (n, d), in row order of the file, under
the names of their rows in the table: the name of the method, or ``method:part``; None stands for a part that this run
does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _tasks import Task

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

Embeddings = dict[str, "np.ndarray | None"]
N_HVG = 2_000
N_PCS = 50
PARTS = ("backbone", "anchor", "variant")
_SAMPLE = 20_000


def pca(task: Task, scratch: Path) -> Embeddings:
    """50 principal components of centred, log-normalised, batch-aware variable genes: no integration."""
    return {"pca": prepared(task).obsm["X_pca"]}


def harmony(task: Task, scratch: Path) -> Embeddings:
    """Harmony with its defaults, on the embedding of `pca`."""
    import harmonypy
    import numpy as np

    adata = prepared(task)
    fitted = harmonypy.run_harmony(
        adata.obsm["X_pca"], adata.obs, task.batch_key, random_state=task.seed, verbose=False
    )
    corrected = np.asarray(fitted.Z_corr)  # (d, n) in harmonypy 1, (n, d) in 2
    return {"harmony": corrected if corrected.shape[0] == adata.n_obs else corrected.T}


def schelix(task: Task, scratch: Path) -> Embeddings:
    """scHelix-Scale from the file: the embedding its users get, the backbone it grew from, and both streams."""
    from schelix_scale import integrate, load_config
    from schelix_scale.progress import QuietReporter

    reporter = QuietReporter()
    config = load_config(overrides=[*task.settings, "embed.streams=true", f"seed={task.seed}"])
    run = integrate(task.data, batch_key=task.batch_key, out=scratch / "run", config=config, reporter=reporter)
    print(*reporter.messages, sep="\n")
    obsm = run.to_anndata().obsm
    return {"schelix": obsm["X_schelix"]} | {f"schelix:{part}": _part(obsm, f"X_schelix_{part}") for part in PARTS}


METHODS: dict[str, Callable[[Task, Path], Embeddings]] = {"schelix": schelix, "pca": pca, "harmony": harmony}


def prepared(task: Task) -> AnnData:
    """Return the cells with ``obsm["X_pca"]`` of their variable genes, the common start of the linear methods.

    Values that are logarithms already (decided as schelix decides it) are not normalised again.
    """
    import anndata
    import scanpy as sc

    adata = anndata.read_h5ad(task.data)
    adata.obs[task.batch_key] = adata.obs[task.batch_key].astype(str).astype("category")
    decision = _values(adata, task.batch_key)
    print(decision.reason)
    if decision.kind != "log":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    if adata.n_vars > N_HVG:
        sc.pp.highly_variable_genes(adata, n_top_genes=N_HVG, flavor="seurat", batch_key=task.batch_key)
        adata = adata[:, adata.var["highly_variable"]].copy()
    n_comps = min(N_PCS, adata.n_obs - 1, adata.n_vars - 1)
    sc.pp.pca(adata, n_comps=n_comps, zero_center=True, mask_var=None, random_state=task.seed)
    return adata


def _values(adata: AnnData, batch_key: str) -> Any:
    """Decide what the values are, from at most 20,000 cells."""
    import numpy as np
    from scipy import sparse

    from schelix_scale.stores.values import decide_values

    rng = np.random.default_rng(0)
    n = adata.n_obs
    rows = np.arange(n) if n <= _SAMPLE else np.sort(rng.choice(n, _SAMPLE, replace=False))
    batches = adata.obs[batch_key].cat
    return decide_values(sparse.csr_matrix(adata.X[rows]), batches.codes.to_numpy()[rows], list(batches.categories))


def _part(obsm: Any, key: str) -> np.ndarray | None:
    """Return a stream, or None where the run has it not, or only as zeros or NaN (a single-stream run)."""
    import numpy as np

    z_nd = np.asarray(obsm[key]) if key in obsm else np.zeros((0, 0))
    return z_nd if np.nan_to_num(z_nd).any() else None
