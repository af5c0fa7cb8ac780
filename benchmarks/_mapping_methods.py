"""What maps a query onto a reference: schelix, Symphony and scArches (scVI), each as its documentation says.

A method is a function of a `Job` that returns arrays: the label of each query cell, the probability it gives to that
label, how novel the cell is, and embeddings of query and reference. A joint integration, with which the mapping is
compared, is a function that returns the embedding of all cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

N_HVG, N_PCS = 2_000, 30
SCARCHES_NEIGHBORS, SCARCHES_EPOCHS = 15, 200
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """A method to run: on which files, with which columns.

    ``query`` is empty for a joint integration of the cells of ``reference``. ``epochs`` bounds scVI's training; None:
    its own rule. ``settings`` are for schelix.
    """

    method: str
    reference: str
    query: str
    batch_key: str
    label_key: str
    seed: int = 0
    epochs: int | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """How to map, how to integrate jointly, and the distributions that takes."""

    map: Callable[[Job, Path], Arrays]
    joint: Callable[[Job, Path], np.ndarray]
    libraries: tuple[str, ...] = ()


def schelix_joint(job: Job, scratch: Path) -> np.ndarray:
    """scHelix-Scale with its defaults."""
    from schelix_scale import integrate, load_config
    from schelix_scale.progress import QuietReporter

    config = load_config(overrides=[*job.settings, f"seed={job.seed}"])
    run = integrate(
        job.reference, batch_key=job.batch_key, out=scratch / "run", config=config, reporter=QuietReporter()
    )
    return run.embedding


def schelix(job: Job, scratch: Path) -> Arrays:
    """`schelix integrate`, then `schelix map` with its defaults."""
    from schelix_scale import map_cells
    from schelix_scale.progress import QuietReporter

    z_reference = schelix_joint(job, scratch)
    started = time.perf_counter()
    mapped = map_cells(
        scratch / "run", job.query, batch_key=job.batch_key, label_key=job.label_key, reporter=QuietReporter()
    )
    seconds = time.perf_counter() - started
    obs, key = mapped.obs, f"schelix_{job.label_key}"
    return {
        "label": obs[key].astype(str).to_numpy(),
        "probability": obs[f"{key}_probability"].to_numpy(),
        "set": obs[f"{key}_set"].astype(str).to_numpy(),
        "novelty": obs["schelix_novelty"].to_numpy(),
        "flagged": obs[key].to_numpy() == "unknown",
        "z_query": mapped.embedding,
        "z_reference": z_reference,
        "map_seconds": np.array(seconds),
    }


def _log_normalized(path: str, batch_key: str) -> AnnData:
    """Read cells, log-normalised; logarithms (decided as schelix decides it) as they are."""
    import scanpy as sc
    from _prepare import _kind_of_values

    adata = sc.read_h5ad(path)
    adata.obs[batch_key] = adata.obs[batch_key].astype(str).astype("category")
    adata.X = adata.X.astype(np.float32)
    if _kind_of_values(adata, batch_key) != "log":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    return adata


def _symphony_reference(job: Job) -> AnnData:
    """Variable genes, scaled, PCA, Harmony: as in symphonypy's tutorial."""
    import scanpy as sc
    import symphonypy as sp

    adata = _log_normalized(job.reference, job.batch_key)
    adata.var["highly_variable"] = True
    if adata.n_vars > N_HVG:
        sc.pp.highly_variable_genes(adata, n_top_genes=N_HVG, batch_key=job.batch_key)
    adata.raw = adata
    adata = adata[:, adata.var["highly_variable"]].copy()
    sc.pp.scale(adata, max_value=10)
    sc.pp.pca(adata, n_comps=N_PCS, zero_center=False, random_state=job.seed)
    sp.pp.harmony_integrate(adata, key=job.batch_key, verbose=False, random_seed=job.seed)
    return adata


def symphony_joint(job: Job, scratch: Path) -> np.ndarray:
    """Harmony of all cells."""
    return np.asarray(_symphony_reference(job).obsm["X_pca_harmony"])


def symphony(job: Job, scratch: Path) -> Arrays:
    """Symphony (symphonypy): its mapping, its classifier (5 neighbours), its Mahalanobis confidence for novelty."""
    import symphonypy as sp
    from sklearn.neighbors import KNeighborsClassifier

    reference = _symphony_reference(job)
    started = time.perf_counter()
    query = _log_normalized(job.query, job.batch_key)
    sp.tl.map_embedding(query, reference, key=job.batch_key)
    classifier = KNeighborsClassifier()  # that of transfer_labels_kNN, which does not return probabilities
    classifier.fit(reference.obsm["X_pca_harmony"], reference.obs[job.label_key].astype(str))
    found = classifier.predict_proba(query.obsm["X_pca_harmony"])
    sp.tl.per_cell_confidence(query, reference, obs="distance")
    return {
        "label": np.asarray(classifier.classes_)[found.argmax(axis=1)].astype(str),
        "probability": found.max(axis=1),
        "novelty": query.obs["distance"].to_numpy(),
        "z_query": np.asarray(query.obsm["X_pca_harmony"]),
        "z_reference": np.asarray(reference.obsm["X_pca_harmony"]),
        "map_seconds": np.array(time.perf_counter() - started),
    }


def _counts(path: str, batch_key: str) -> AnnData:
    """Read cells with layer ``counts``; values that are no counts are rounded, logarithms after exp(x) - 1."""
    import scanpy as sc
    from _prepare import _kind_of_values
    from scipy import sparse

    adata = sc.read_h5ad(path)
    adata.obs[batch_key] = adata.obs[batch_key].astype(str).astype("category")
    kind = _kind_of_values(adata, batch_key)
    counts = sparse.csr_matrix(adata.X, dtype=np.float32, copy=True)
    if kind == "log":
        counts.data = np.expm1(counts.data)
    counts.data = np.rint(counts.data)
    counts.eliminate_zeros()
    adata.layers["counts"] = counts
    return adata


def _scvi_reference(job: Job, scratch: Path) -> tuple[AnnData, object]:
    """scVI with the settings that scArches' documentation asks for, on batch-aware variable genes."""
    import scanpy as sc
    import scvi

    scvi.settings.seed = job.seed
    adata = _counts(job.reference, job.batch_key)
    if adata.n_vars > N_HVG:
        logs = adata.copy()
        sc.pp.normalize_total(logs, target_sum=1e4)
        sc.pp.log1p(logs)
        sc.pp.highly_variable_genes(logs, n_top_genes=N_HVG, batch_key=job.batch_key)
        adata = adata[:, logs.var["highly_variable"]].copy()
    scvi.model.SCVI.setup_anndata(adata, layer="counts", batch_key=job.batch_key)
    model = scvi.model.SCVI(
        adata,
        n_layers=2,
        n_latent=30,
        encode_covariates=True,
        deeply_inject_covariates=False,
        use_layer_norm="both",
        use_batch_norm="none",
    )
    _fit(model, scratch, max_epochs=job.epochs, early_stopping=True)
    return adata, model


def _fit(model: object, scratch: Path, **options: object) -> None:
    model.train(accelerator="cpu", enable_progress_bar=False, default_root_dir=str(scratch), **options)


def scvi_joint(job: Job, scratch: Path) -> np.ndarray:
    """scVI of all cells."""
    _, model = _scvi_reference(job, scratch)
    return np.asarray(model.get_latent_representation())


def scarches(job: Job, scratch: Path) -> Arrays:
    """scArches: scVI's load_query_data, 200 epochs on the query; labels by scArches' weighted neighbours.

    These are 15, weighted by exp(-d / (2 / sd)^2); novelty is one minus the probability.
    """
    import scvi
    from sklearn.neighbors import NearestNeighbors

    adata, model = _scvi_reference(job, scratch)
    z_reference = np.asarray(model.get_latent_representation())
    started = time.perf_counter()
    query = _counts(job.query, job.batch_key)
    scvi.model.SCVI.prepare_query_anndata(query, model)
    surgery = scvi.model.SCVI.load_query_data(query, model)
    epochs = SCARCHES_EPOCHS if job.epochs is None else min(SCARCHES_EPOCHS, job.epochs)
    _fit(surgery, scratch, max_epochs=epochs, plan_kwargs={"weight_decay": 0.0})
    z_query = np.asarray(surgery.get_latent_representation())
    distances, near = NearestNeighbors(n_neighbors=SCARCHES_NEIGHBORS).fit(z_reference).kneighbors(z_query)
    spread = np.maximum(distances.std(axis=1, keepdims=True), 1e-9)
    weights = np.exp(-distances / (2.0 / spread) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    labels = adata.obs[job.label_key].astype(str).astype("category")
    votes = np.zeros((len(z_query), len(labels.cat.categories)))
    for column in range(near.shape[1]):
        np.add.at(votes, (np.arange(len(votes)), labels.cat.codes.to_numpy()[near[:, column]]), weights[:, column])
    return {
        "label": np.asarray(labels.cat.categories)[votes.argmax(axis=1)].astype(str),
        "probability": votes.max(axis=1),
        "novelty": 1 - votes.max(axis=1),
        "z_query": z_query,
        "z_reference": z_reference,
        "map_seconds": np.array(time.perf_counter() - started),
    }


METHODS = {
    "schelix": Method(schelix, schelix_joint),
    "symphony": Method(symphony, symphony_joint, ("symphonypy", "harmonypy", "scanpy")),
    "scarches": Method(scarches, scvi_joint, ("scvi-tools", "torch", "scanpy")),
}


def joint_job(job: Job, data: Path) -> Job:
    """Return the joint integration that a mapping is compared with: the same method, on all cells."""
    return replace(job, reference=str(data), query="")
