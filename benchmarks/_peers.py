"""The peers: integration methods of others, as their documentation says, on the genes that all methods share.

Each is a function of a task and an empty directory that returns its embeddings in row order of the file (see
`_methods`). Their libraries come with the extra [benchmark].
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from _prepare import UNKNOWN, note, partial_labels, prepared, selected
from _tasks import Task

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

Embeddings = dict[str, "np.ndarray | None"]
_N_DIMRED = 100


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


def scanorama(task: Task, scratch: Path) -> Embeddings:
    """Scanorama with its defaults: 100 dimensions, batches as data sets in order of their names."""
    import scanorama

    adata = selected(task)
    batches, rows = by_batch(adata, task.batch_key)
    dimred = min(_N_DIMRED, adata.n_obs - 1, adata.n_vars - 1)
    scanorama.integrate_scanpy(batches, dimred=dimred, seed=task.seed)
    return {"scanorama": in_file_order([batch.obsm["X_scanorama"] for batch in batches], rows)}


def by_batch(adata: AnnData, batch_key: str) -> tuple[list[AnnData], list[np.ndarray]]:
    """Return the cells of each batch as data of their own, and their rows."""
    import numpy as np
    from scipy import sparse

    rows = [np.flatnonzero(adata.obs[batch_key] == name) for name in adata.obs[batch_key].cat.categories]
    batches = [adata[row].copy() for row in rows]
    for batch in batches:
        batch.X = sparse.csr_matrix(batch.X)
    return batches, rows


def in_file_order(parts: list[np.ndarray], rows: list[np.ndarray]) -> np.ndarray:
    """Put what was computed batch by batch back into the rows it came from."""
    import numpy as np

    z_nd = np.empty((sum(map(len, rows)), parts[0].shape[1]))
    for row, part in zip(rows, parts, strict=True):
        z_nd[row] = part
    return z_nd


def concord(task: Task, scratch: Path) -> Embeddings:
    """CONCORD with its defaults on log-normalised values, held dense in memory as its documentation advises."""
    import concord
    import torch

    adata = selected(task)
    model = concord.Concord(
        adata=adata,
        input_feature=list(adata.var_names),
        domain_key=task.batch_key,
        seed=task.seed,
        preload_dense=True,
        save_dir=scratch / "concord",
        device=torch.device("cpu"),
    )
    model.fit_transform(output_key="concord", save_model=False)
    return {"concord": adata.obsm["concord"]}


def scvi(task: Task, scratch: Path) -> Embeddings:
    """scVI: two layers, 30 latent dimensions, negative binomial, early stopping; all else its defaults."""
    return {"scvi": _fitted_scvi(task, _countable(task, scratch), scratch).get_latent_representation()}


def scanvi(task: Task, scratch: Path) -> Embeddings:
    """scANVI from the model of `scvi`, with the labels of a fifth of the cells; 20 epochs, as in its tutorial."""
    from scvi.model import SCANVI

    adata = _countable(task, scratch)
    adata.obs["known_labels"] = partial_labels(task)
    base = _fitted_scvi(task, adata, scratch)
    model = SCANVI.from_scvi_model(base, unlabeled_category=UNKNOWN, labels_key="known_labels")
    model.train(max_epochs=20, n_samples_per_label=100, accelerator="cpu", enable_progress_bar=False)
    return {"scanvi": model.get_latent_representation()}


def _countable(task: Task, scratch: Path) -> AnnData:
    """Return the cells with layer ``counts``; values that are no counts are rounded, logarithms after exp(x) - 1."""
    import numpy as np
    from scipy import sparse

    adata = selected(task)
    counts_ng = sparse.csr_matrix(adata.layers["raw"], dtype=np.float32, copy=True)
    if adata.uns["values"] == "log":
        counts_ng.data = np.expm1(counts_ng.data)
        note(scratch, "values are logarithms: its counts are exp(x) - 1, rounded")
    if adata.uns["values"] == "linear":
        note(scratch, "values are not all integral: its counts are rounded")
    if adata.uns["values"] != "counts":
        counts_ng.data = np.rint(counts_ng.data)
        counts_ng.eliminate_zeros()
    adata.layers["counts"] = counts_ng
    return adata


def _fitted_scvi(task: Task, adata: AnnData, scratch: Path) -> Any:
    """Return scVI, fitted to layer ``counts``."""
    import scvi

    scvi.settings.seed = task.seed
    scvi.model.SCVI.setup_anndata(adata, layer="counts", batch_key=task.batch_key)
    model = scvi.model.SCVI(adata, n_layers=2, n_latent=30, gene_likelihood="nb")
    model.train(early_stopping=True, accelerator="cpu", enable_progress_bar=False, default_root_dir=str(scratch))
    return model
